"""Whatever comes, the endpoint answers, and never that it failed."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from actors.embedded import embedded_model
from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from actors.passage_index import PassageIndex
from serving.api import create_app
from serving.corpus import Corpus
from serving.guard import Access
from serving.metrics import Metrics
from serving.protocol import RequestLimits
from serving.served_model import ServedModel

DIMENSIONS = 4
ROUTES = ("/v1/embeddings", "/v1/search")


class FakeEncoder:
    """A real tokenizer, whose vectors are made of the first token's id."""

    dimensions = DIMENSIONS
    max_tokens = 16
    device = SimpleNamespace(type="cpu")
    model = SimpleNamespace(get_input_embeddings=lambda: None)
    templates = PromptTemplates(query="task: {task} | query: {text}", passage="{title} {text}")

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(embedded_model("embedded:all-MiniLM-L6-v2"))

    format_passages = Encoder.format_passages

    def tokenize(self, texts: list[str], *, truncate: bool) -> list[list[int]]:
        assert not truncate  # too long a text is refused
        rows: list[list[int]] = self.tokenizer(texts)["input_ids"]
        return rows

    def embed_tokens(self, rows: Any, batch_tokens: int) -> torch.Tensor:
        assert all(0 <= token < len(self.tokenizer) for row in rows for token in row)
        assert all(0 < len(row) <= self.max_tokens for row in rows)
        vectors = torch.zeros(len(rows), DIMENSIONS)
        vectors[range(len(rows)), [row[0] % DIMENSIONS for row in rows]] = 1
        return vectors


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    index = PassageIndex(DIMENSIONS)
    index.add(np.eye(3, DIMENSIONS, dtype=np.float32))
    columns = {"id": ["a", "b", "c"], "title": ["", "B", ""], "text": ["one", "two", "three"]}
    model = ServedModel(
        cast(Encoder, FakeEncoder()),
        name="m",
        task="search result",
        batch_tokens=64,
        max_queued_tokens=4096,
        metrics=Metrics(),
        corpus=Corpus(passages=pa.table(columns), index=index),
        limits=RequestLimits(max_bytes=6000, max_texts=5, max_characters=300, token_ids=True),
    )
    app = create_app(model, Access(hosts=frozenset({"testserver"})))
    with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


def check(response: httpx.Response) -> None:
    """Fails unless this is an answer that a client can read."""
    assert response.status_code < 500, response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    if response.is_success:
        return
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 600
    assert error["message"].isprintable()


HUGE = "a number of 5000 digits"  # Python writes none, and reads none
LITERALS = st.none() | st.booleans() | st.integers() | st.floats()
# Halves of surrogate pairs too, which JSON can write and UTF-8 cannot.
TEXTS = st.text(st.characters(), max_size=40) | st.sampled_from(["m", "query", "base64", "float"])
NUMBERS = st.integers(-2, 40_000) | st.integers() | st.just(HUGE)
VALUES = st.recursive(
    LITERALS | TEXTS | NUMBERS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
FIELDS = {
    "input": TEXTS | st.lists(TEXTS, max_size=6) | st.lists(st.lists(NUMBERS, max_size=5)),
    "model": st.just("m"),
    "dimensions": st.integers(-1, 5),
    "encoding_format": st.sampled_from(["float", "base64", None]),
    "user": TEXTS,
    "input_type": st.sampled_from(["query", "passage", None]),
    "task": TEXTS,
    "title": TEXTS | st.lists(TEXTS, max_size=6),
    "truncate": st.booleans(),
    "query": TEXTS,
    "top_k": st.integers(0, 5),
}
NAMES = {
    "/v1/embeddings": [name for name in FIELDS if name not in ("query", "top_k")],
    "/v1/search": ["query", "top_k", "task"],
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """Requests that are nearly right: some fields of any kind, or unknown, or given twice."""
    path = draw(st.sampled_from(ROUTES))
    needed = ["input", "model"] if path == "/v1/embeddings" else ["query"]
    names = dict.fromkeys([*needed, *draw(st.lists(st.sampled_from(NAMES[path]), max_size=4))])
    names = [*names, *draw(st.just([]) | st.lists(st.sampled_from(sorted(FIELDS)) | TEXTS))]
    pairs = []
    for name in names:
        usual = FIELDS.get(name, VALUES)
        value = draw(VALUES if draw(st.integers(0, 11)) == 11 else usual)
        pairs.append(f"{json.dumps(name)}: {json.dumps(value)}")
    body = "{" + ", ".join(pairs) + "}"
    return path, body.replace(f'"{HUGE}"', "9" * 5000).encode()


@given(request=requests())
def test_request_of_any_json_is_answered(client: TestClient, request: tuple[str, bytes]) -> None:
    path, body = request
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    check(response)
    if response.is_success and path == "/v1/embeddings":
        given_input = json.loads(body)["input"]
        many = isinstance(given_input, list) and not isinstance(given_input[0], int)
        assert len(response.json()["data"]) == (len(given_input) if many else 1)


@given(
    path=st.sampled_from(ROUTES),
    body=st.binary(max_size=7000)
    | st.text(st.sampled_from('{}[]",:\\ud8001e-.ntrNaI "input'), max_size=60).map(str.encode)
    | st.builds(
        lambda text, n: text * n, st.sampled_from([b"[", b'{"a":', b'"']), st.integers(0, 5000)
    ),
)
def test_body_of_any_bytes_is_answered(client: TestClient, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    check(client.post(path, content=body, headers=headers))


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "TRACE"]),
    path=st.sampled_from(["/", "/v1/models", "/v1/models/m", "/metrics", "/healthz", *ROUTES])
    | st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: "/" + quote(text)),
    headers=st.dictionaries(
        st.sampled_from(["host", "origin", "content-type", "authorization", "content-length"]),
        st.binary(max_size=30) | st.sampled_from([b"testserver", b"[::1]", b"application/json"]),
        max_size=3,
    ),
)
def test_request_of_any_head_is_answered(
    client: TestClient, method: str, path: str, headers: dict[str, bytes]
) -> None:
    response = client.request(method, path, headers=headers, content=b"{}")
    if method == "HEAD":
        assert response.status_code < 500
    else:
        check(response)
