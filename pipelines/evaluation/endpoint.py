"""A model behind an OpenAI-compatible endpoint, measured like one in this process.

What users get is the endpoint's vectors, after its batching, precision and prompts; measuring
those shows whether serving has changed the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urldefrag

import numpy as np

from cluster.errors import TokayError, UserError

# OpenAI takes 2048 texts; fewer keep an answer in seconds on a small server.
BATCH_TEXTS = 64
# Enough that the server always has the next batch while it answers one.
MAX_IN_FLIGHT = 4
TIMEOUT_S = 120


class EndpointEncoder:
    """Queries and passages to unit vectors through ``POST /v1/embeddings``.

    A Tokay server is told the role and the task of the texts and applies the model's templates;
    any other gets the texts alone. No endpoint has a field for titles: they stand in front of the
    text. An API key is taken from ``OPENAI_API_KEY``.

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
        import openai

        base_url, name = urldefrag(url)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=TIMEOUT_S,
            max_retries=5,
        )
        self._url = base_url
        try:
            served = {
                each.id: each for each in self._client.with_options(max_retries=1).models.list()
            }
        except openai.APIConnectionError as error:
            raise UserError(
                f"no endpoint answers at {base_url} ({error.__cause__ or error}); start one with "
                "`tokay serve MODEL`, or give the address that ends in /v1"
            ) from error
        except openai.APIError as error:
            raise UserError(
                f"{base_url}/models answered {error.message!r}; give the address of an "
                "OpenAI-compatible endpoint, up to and with /v1"
            ) from error
        if not name and len(served) == 1:
            name = next(iter(served))
        if name not in served:
            raise UserError(
                f"{base_url} serves {', '.join(served) or 'no model'}, not {name or 'just one'}; "
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
        pairs = zip(texts, titles or [None] * len(texts), strict=True)
        joined = [f"{title or ''} {text}".strip() for text, title in pairs]
        return self._encode(joined, {"input_type": "passage"})

    def _encode(self, texts: Sequence[str], role: dict[str, str]) -> np.ndarray:
        batches = [texts[at : at + BATCH_TEXTS] for at in range(0, len(texts), BATCH_TEXTS)]
        with ThreadPoolExecutor(MAX_IN_FLIGHT) as threads:
            parts = list(threads.map(lambda batch: self._request(batch, role), batches))
        vectors = np.concatenate(parts)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(lengths, 1e-12))

    def _request(self, texts: Sequence[str], role: dict[str, str]) -> np.ndarray:
        import openai

        try:
            answer = self._client.embeddings.create(
                model=self.model,
                # Servers refuse an empty text, and a blank one has the same tokens.
                input=[text or " " for text in texts],
                # An encoder in this process cuts long texts too.
                extra_body={**role, "truncate": True} if self.is_tokay else None,
            )
        except openai.APIError as error:
            raise TokayError(f"{self._url}/embeddings failed: {error.message}") from error
        rows = sorted(answer.data, key=lambda row: row.index)
        if len(rows) != len(texts):
            raise TokayError(
                f"{self._url}/embeddings answered {len(texts)} texts with {len(rows)} vectors"
            )
        return np.array([row.embedding for row in rows], dtype=np.float32)
