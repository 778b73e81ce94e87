import asyncio
import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from actors.embedded import embedded_model
from actors.encoder import Encoder
from serving.api import create_app, shorten
from serving.corpus import load_corpus
from serving.served_model import ServedModel

TEXTS = [
    "A gecko climbs the wall.",
    "Ray schedules actors on a cluster of machines, each with its own resources.",
    "Größe, naïve, 東京, and an emoji 🦎",
    "x",
]


def embed(client: TestClient, given: Any, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/embeddings", json={"input": given, "model": "minilm", **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def vectors(body: dict[str, Any]) -> np.ndarray:
    assert [row["index"] for row in body["data"]] == list(range(len(body["data"])))
    return np.array([row["embedding"] for row in body["data"]], np.float32)


def refused(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_embeddings_equal_sentence_transformers(client: TestClient) -> None:
    from sentence_transformers import SentenceTransformer

    long = "the tokay gecko is heard at night " * 80
    theirs = SentenceTransformer(str(embedded_model("embedded:all-MiniLM-L6-v2")), device="cpu")
    expected = theirs.encode([*TEXTS, long], normalize_embeddings=True)
    body = embed(client, [*TEXTS, long], truncate=True)
    assert body["object"] == "list"
    assert body["model"] == "minilm"
    np.testing.assert_allclose(vectors(body), expected, atol=1e-5)


def test_one_string_is_a_list_of_one(client: TestClient) -> None:
    one, many = vectors(embed(client, TEXTS[0])), vectors(embed(client, TEXTS))
    assert one.shape == (1, 384)
    np.testing.assert_allclose(one[0], many[0], atol=1e-6)


def test_usage_counts_the_tokens_read(client: TestClient, encoder: Encoder) -> None:
    tokens = sum(map(len, encoder.tokenize(TEXTS)))
    assert embed(client, TEXTS)["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_dimensions_cut_and_renormalise(client: TestClient) -> None:
    whole, short = vectors(embed(client, TEXTS)), vectors(embed(client, TEXTS, dimensions=64))
    by_hand = whole[:, :64] / np.linalg.norm(whole[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(short, by_hand, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)


def test_shorten_keeps_a_row_of_zeros() -> None:
    rows = np.array([[0, 0, 1], [3, 4, 0]], np.float32)
    np.testing.assert_allclose(shorten(rows, 2), [[0, 0], [0.6, 0.8]])


@pytest.mark.parametrize("dimensions", [0, -1, 385])
def test_dimensions_out_of_range_are_refused(client: TestClient, dimensions: int) -> None:
    body = {"input": "x", "model": "minilm", "dimensions": dimensions}
    error = refused(client.post("/v1/embeddings", json=body), 400)
    assert error["param"] == "dimensions"
    assert "1 to 384" in error["message"]


def test_base64_holds_the_same_little_endian_floats(client: TestClient) -> None:
    body = embed(client, TEXTS, encoding_format="base64", dimensions=100)
    decoded = np.array(
        [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in body["data"]]
    )
    assert decoded.shape == (len(TEXTS), 100)
    # float32 -> JSON -> float32 loses nothing.
    np.testing.assert_array_equal(decoded, vectors(embed(client, TEXTS, dimensions=100)))


def test_token_ids_equal_their_text(client: TestClient, encoder: Encoder) -> None:
    bare = [row[1:-1] for row in encoder.tokenize(TEXTS)]
    np.testing.assert_allclose(
        vectors(embed(client, bare)), vectors(embed(client, TEXTS)), atol=1e-6
    )
    np.testing.assert_allclose(
        vectors(embed(client, bare[0]))[0], vectors(embed(client, TEXTS[0]))[0], atol=1e-6
    )


def test_token_ids_of_another_tokenizer_are_refused(client: TestClient) -> None:
    body = {"input": [[9906, 1917], [100257]], "model": "minilm"}
    error = refused(client.post("/v1/embeddings", json=body), 400)
    assert "0 to 30521" in error["message"]
    assert "100257" in error["message"]


def test_input_type_applies_the_templates(
    prompted: Encoder, client: TestClient, make_model: Callable[..., ServedModel]
) -> None:
    ours = TestClient(create_app(make_model(prompted)))
    cases = [
        ({"input_type": "query"}, "task: search result | query: gecko"),
        ({"input_type": "query", "task": "fact checking"}, "task: fact checking | query: gecko"),
        ({"input_type": "passage"}, "title: none | text: gecko"),
        ({}, "gecko"),
    ]
    for fields, text in cases:
        got, expected = embed(ours, "gecko", **fields), embed(client, text)
        np.testing.assert_allclose(vectors(got), vectors(expected), atol=1e-6)
        assert got["usage"] == expected["usage"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": []}, "input", "1 to 2048"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": ["a"] * 2049}, "input", "1 to 2048"),
        ({"input": ["a", 1]}, "input", "a list of strings"),
        ({"input": {"text": "a"}}, "input", "a list of strings"),
        ({"input": None}, "input", "a list of strings"),
        ({"input": [-1]}, "input", "token ids"),
        ({"input": "half \ud800"}, "input", "surrogate"),
        ({}, "input", "required"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({"input": "a", "dimension": 3}, "dimension", "unknown field"),
        ({"input": "a", "task": "t"}, "task", "input_type"),
        ({"input": [5], "input_type": "query"}, "input_type", "texts"),
        ({"input": "word " * 300}, "input", "302 tokens and the model reads 256"),
    ],
)
def test_bad_request_is_refused_in_openai_shape(
    client: TestClient, body: dict[str, Any], param: str, says: str
) -> None:
    content = json.dumps({"model": "minilm", **body})
    headers = {"content-type": "application/json"}
    error = refused(client.post("/v1/embeddings", content=content, headers=headers), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    "content", [b"", b'{"input', b"[1]", b'"text"', b"\xff", b'{"\\ud800": 1}']
)
def test_body_that_is_no_json_object_is_refused(client: TestClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    refused(client.post("/v1/embeddings", content=content, headers=headers), 400)


def test_longest_text_is_accepted_and_one_token_more_is_not(client: TestClient) -> None:
    assert embed(client, "word " * 254)["usage"]["prompt_tokens"] == 256
    body = {"input": ["x", "word " * 255], "model": "minilm"}
    error = refused(client.post("/v1/embeddings", json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("input 1 ")
    assert embed(client, "word " * 255, truncate=True)["usage"]["prompt_tokens"] == 256


def test_other_model_and_path_are_not_found(client: TestClient) -> None:
    body = {"input": "a", "model": "text-embedding-3-small"}
    error = refused(client.post("/v1/embeddings", json=body), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'minilm'" in error["message"]
    refused(client.get("/v1/models/other"), 404)
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/embeddings"), 405)


def test_models_describe_the_one_served(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model == client.get("/v1/models/minilm").json()
    assert (model["id"], model["owned_by"], model["dimensions"]) == ("minilm", "tokay", 384)


def test_full_queue_answers_429_with_retry_after(
    encoder: Encoder, make_model: Callable[..., ServedModel]
) -> None:
    app = create_app(make_model(encoder, max_queued_tokens=600))

    async def burst() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"input": ["word " * 200] * 2, "model": "minilm"}
            return await asyncio.gather(
                *(client.post("/v1/embeddings", json=body) for _ in range(4))
            )

    responses = asyncio.run(burst())
    assert sorted(response.status_code for response in responses) == [200, 429, 429, 429]
    late = next(response for response in responses if response.status_code == 429)
    assert 1 <= int(late.headers["retry-after"]) <= 60
    assert refused(late, 429)["type"] == "rate_limit_error"
    # The queue is empty again: what an idle server can do is not refused.
    assert (
        TestClient(app)
        .post("/v1/embeddings", json={"input": ["word " * 200] * 4, "model": "minilm"})
        .is_success
    )


def test_search_without_a_corpus_says_how_to_load_one(client: TestClient) -> None:
    error = refused(client.post("/v1/search", json={"query": "gecko"}), 404)
    assert "--corpus" in error["message"]


def test_search_finds_the_passage_that_answers(
    prompted: Encoder, make_model: Callable[..., ServedModel], tmp_path: Path
) -> None:
    rows = [
        {"_id": "sum", "title": "sum", "text": "Adds up the numbers of an iterable."},
        {"_id": "sleep", "title": "time.sleep", "text": "Suspends execution for some seconds."},
        {"_id": "shuffle", "title": "random.shuffle", "text": "Puts a list in random order."},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(str(tmp_path), prompted)
    client = TestClient(create_app(make_model(prompted, corpus=corpus)))
    found = client.post("/v1/search", json={"query": "wait a moment", "top_k": 2}).json()
    assert found["results"][0]["id"] == "sleep"
    assert len(found["results"]) == 2
    assert found["results"][0]["title"] == "time.sleep"
    query = prompted.encode_queries(["wait a moment"], task="search result")[0]
    passage = prompted.encode_passages(["Suspends execution for some seconds."], ["time.sleep"])[0]
    assert found["results"][0]["score"] == pytest.approx(float(query @ passage), abs=1e-5)
    other = client.post("/v1/search", json={"query": "wait a moment", "task": "clustering"}).json()
    assert other["results"][0]["score"] != found["results"][0]["score"]
    assert len(other["results"]) == 3
    assert client.get("/v1/models").json()["data"][0]["num_passages"] == 3
    for body in ({"query": "  "}, {"query": "a", "top_k": 0}, {"query": "word " * 300}, {}):
        refused(client.post("/v1/search", json=body), 400)


def test_metrics_count_requests_texts_and_tokens(client: TestClient) -> None:
    usage = embed(client, TEXTS)["usage"]
    client.post("/v1/embeddings", json={"input": "a", "model": "other"})
    client.get("/some/random/path")
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'tokay_requests_total{path="/v1/embeddings",replica="0",status="200"} 1.0',
        'tokay_requests_total{path="/v1/embeddings",replica="0",status="404"} 1.0',
        'tokay_requests_total{path="other",replica="0",status="404"} 1.0',
        f'tokay_texts_total{{replica="0"}} {len(TEXTS)}.0',
        f'tokay_tokens_total{{replica="0"}} {usage["total_tokens"]}.0',
        'tokay_request_seconds_count{path="/v1/embeddings",replica="0"} 2.0',
        'tokay_queued_tokens{replica="0"} 0.0',
    ):
        assert line in lines


def test_failure_behind_the_routes_answers_500_in_openai_shape(
    encoder: Encoder, make_model: Callable[..., ServedModel]
) -> None:
    broken = Encoder(
        encoder.model.embeddings,  # takes no attention mask
        encoder.tokenizer,
        pooling="mean",
        max_tokens=encoder.max_tokens,
        templates=encoder.templates,
    )
    broken.model.config = encoder.model.config
    client = TestClient(create_app(make_model(broken)), raise_server_exceptions=False)
    error = refused(client.post("/v1/embeddings", json={"input": "a", "model": "minilm"}), 500)
    assert error["type"] == "server_error"
    assert "Embeddings" not in error["message"]


def test_console_needs_no_other_host(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "v1/search" in page.text
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page.text)
    assert "innerHTML" not in page.text
