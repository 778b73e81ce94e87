"""A model behind an OpenAI-compatible endpoint, measured like one in this process.

What users get is the endpoint's vectors, after its batching, precision and prompts; measuring
those shows whether serving has changed the model.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeVar
from urllib.parse import urldefrag

import httpx2
import numpy as np
import openai
from pydantic import BaseModel, ValidationError

from actors.encoder_templates import PromptTemplates
from actors.text_encoder import TextEncoder
from actors.vectors import unit
from cluster.errors import TokayError, UserError, excerpt

# OpenAI takes 2048 texts; fewer keep an answer in seconds on a small server.
BATCH_TEXTS = 64
# Enough that the server always has the next batch while it answers one.
MAX_IN_FLIGHT = 4
TIMEOUT_S = 120
# Vectors of 16,384 numbers in 64 texts take 20 MB as decimal fractions.
MAX_ANSWER_BYTES = 64 * 2**20
MAX_ANSWER_S = 600


class _Model(BaseModel):
    id: str
    owned_by: str | None = None


class _Models(BaseModel):
    data: list[_Model]


class _Vector(BaseModel):
    index: int
    embedding: list[float] | str


class _Vectors(BaseModel):
    data: list[_Vector]


_Answer = TypeVar("_Answer", _Models, _Vectors)


class EndpointEncoder(TextEncoder):
    """Queries and passages to unit vectors through ``POST /v1/embeddings``.

    A Tokay server is given the texts' role, task and titles and applies the model's templates; any
    other gets the texts alone, with their titles in front. An API key is taken from
    ``OPENAI_API_KEY``.

    Attributes:
        model: Name under which the server knows the model.
        is_tokay: The server is ours.
    """

    def __init__(self, url: str) -> None:
        """Asks the server for its models.

        Args:
            url: Address up to and with ``/v1``; ``#NAME`` behind it chooses among several models.

        Raises:
            UserError: Nothing answers there, or it does not say which model to take.
        """
        base_url, name = urldefrag(url)
        self._url = base_url
        self._dimensions: int | None = None
        try:
            self._client = openai.OpenAI(
                base_url=base_url,
                api_key=os.environ.get("OPENAI_API_KEY", "none"),
                timeout=TIMEOUT_S,
                max_retries=5,
                # An answer that is not packed cannot be larger than what is counted.
                default_headers={"accept-encoding": "identity"},
                # The key and the texts are meant for the host that was named.
                http_client=openai.DefaultHttpxClient(
                    follow_redirects=False, event_hooks={"response": [_bound]}
                ),
            )
            answer = self._client.with_options(max_retries=1).get(
                "/models", cast_to=httpx2.Response
            )
        except httpx2.InvalidURL as error:
            raise UserError(f"endpoint {excerpt(url)} is no address: {excerpt(error)}") from error
        except openai.APIConnectionError as error:
            raise UserError(
                f"no endpoint answers at {base_url} ({excerpt(error.__cause__ or error)}); start"
                " one with `tokay serve MODEL`, or give the address that ends in /v1"
            ) from error
        except openai.APIError as error:
            raise UserError(
                f"{base_url}/models answered {_reason(error)!r}; give the address of an"
                " OpenAI-compatible endpoint, up to and with /v1"
            ) from error
        served = {each.id: each for each in self._parse(_Models, answer, "models").data}
        if not name and len(served) == 1:
            name = next(iter(served))
        if name not in served:
            raise UserError(
                f"{base_url} serves {excerpt(', '.join(served)) or 'no model'}, not"
                f" {name or 'just one'}; "
                f"choose one with {base_url}#NAME"
            )
        self.model = name
        self.is_tokay = served[name].owned_by == "tokay"

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        """Returns float32 ``[queries, dimensions]``, unit length."""
        return self._encode(queries, {"input_type": "query", "task": task})

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Returns float32 ``[texts, dimensions]``, unit length."""
        named = [title or "" for title in titles or [""] * len(texts)]
        if not self.is_tokay:
            join = PromptTemplates().format_passage
            texts = [join(text, title) for text, title in zip(texts, named, strict=True)]
        return self._encode(texts, {"input_type": "passage"}, named if any(named) else None)

    def _encode(
        self, texts: Sequence[str], role: Mapping[str, str], titles: Sequence[str] | None = None
    ) -> np.ndarray:
        def request(batch: slice) -> np.ndarray:
            named = {"title": titles[batch]} if titles else {}
            return self._request(texts[batch], {**role, **named})

        batches = [slice(at, at + BATCH_TEXTS) for at in range(0, len(texts), BATCH_TEXTS)]
        with ThreadPoolExecutor(MAX_IN_FLIGHT) as threads:
            parts = list(threads.map(request, batches))
        sizes = {self._dimensions or parts[0].shape[1], *(part.shape[1] for part in parts)}
        if len(sizes) > 1:
            shown = " and of ".join(map(str, sorted(sizes)))
            self._refuse("embeddings", f"vectors of {shown} numbers")
        (self._dimensions,) = sizes
        return unit(np.concatenate(parts))

    def _request(self, texts: Sequence[str], role: Mapping[str, object]) -> np.ndarray:
        body = {
            "model": self.model,
            # Servers refuse an empty text, and a blank one has the same tokens.
            "input": [text or " " for text in texts],
            "encoding_format": "base64",
            # An encoder in this process cuts long texts too.
            **({**role, "truncate": True} if self.is_tokay else {}),
        }
        try:
            answer = self._client.post("/embeddings", cast_to=httpx2.Response, body=body)
        except openai.APIError as error:
            raise TokayError(f"{self._url}/embeddings failed: {_reason(error)}") from error
        rows = sorted(self._parse(_Vectors, answer, "embeddings").data, key=lambda row: row.index)
        if [row.index for row in rows] != list(range(len(texts))):
            self._refuse("embeddings", f"{len(texts)} texts with {len(rows)} vectors")
        vectors = [_read_vector(row.embedding) for row in rows]
        if len({len(vector) for vector in vectors}) != 1:
            self._refuse("embeddings", "vectors of several lengths")
        stacked = np.stack(vectors)
        if not stacked.size or not np.isfinite(stacked).all():
            self._refuse("embeddings", "what is no vector of finite numbers")
        return stacked

    def _parse(self, kind: type[_Answer], answer: httpx2.Response, path: str) -> _Answer:
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            self._refuse(path, f"what is none of OpenAI's answers ({where}: {first['msg']})")

    def _refuse(self, path: str, what: str) -> NoReturn:
        kind = UserError if path == "models" else TokayError  # what is asked first is the address
        raise kind(
            f"{self._url}/{path} answered {excerpt(what)}: give the address of an"
            " OpenAI-compatible endpoint, up to and with /v1"
        )


def _read_vector(given: list[float] | str) -> np.ndarray:
    """Returns float32 `[dimensions]`; empty where it is none."""
    if isinstance(given, list):
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
            return np.array(given, np.float32)
    try:
        return np.frombuffer(base64.b64decode(given, validate=True), "<f4").astype(np.float32)
    except ValueError:  # of both: not base64, or no whole number of floats
        return np.zeros(0, np.float32)


def _reason(error: openai.APIError) -> str:
    """Returns what a server said, or where it sends others, on one line."""
    if isinstance(error, openai.APIStatusError) and error.response.is_redirect:
        target = error.response.headers.get("location", "")
        return excerpt(f"{error.status_code}, go to {target}")
    return excerpt(error.__cause__ or error.message)


class _Bounded(httpx2.SyncByteStream):
    """An answer's bytes, up to a number and for a time."""

    def __init__(self, stream: httpx2.SyncByteStream, url: str) -> None:
        self._stream = stream
        self._url = url

    def __iter__(self) -> Iterator[bytes]:
        began, num_bytes = time.monotonic(), 0
        for chunk in self._stream:
            num_bytes += len(chunk)
            if num_bytes > MAX_ANSWER_BYTES or time.monotonic() - began > MAX_ANSWER_S:
                raise TokayError(
                    f"{self._url} answers without end: accepted are {MAX_ANSWER_BYTES} bytes"
                    f" in {MAX_ANSWER_S} s"
                )
            yield chunk

    def close(self) -> None:
        """Lets the connection go."""
        self._stream.close()


def _bound(response: httpx2.Response) -> None:
    """Bounds what is read of an answer, before any of it is."""
    packing = response.headers.get("content-encoding", "identity")
    if packing != "identity":
        raise TokayError(
            f"{response.url} packs its answers ({excerpt(packing, 40)}) though it was asked not to"
        )
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _Bounded(response.stream, str(response.url))
