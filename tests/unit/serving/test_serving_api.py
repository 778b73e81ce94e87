import asyncio
import base64
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from fastapi.testclient import TestClient

from actors.embedded import embedded_model
from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from actors.passage_index import PassageIndex
from serving.api import create_app
from serving.corpus import Corpus, load_corpus
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


def test_token_ids_equal_their_text_where_they_are_allowed(
    client: TestClient, encoder: Encoder, make_model: Callable[..., ServedModel]
) -> None:
    ours = TestClient(create_app(make_model(encoder, token_ids=True)))
    bare = [row[1:-1] for row in encoder.tokenize(TEXTS)]
    np.testing.assert_allclose(vectors(embed(ours, bare)), vectors(embed(client, TEXTS)), atol=1e-6)
    np.testing.assert_allclose(
        vectors(embed(ours, bare[0]))[0], vectors(embed(client, TEXTS[0]))[0], atol=1e-6
    )


@pytest.mark.parametrize("ids", [[9906, 1917], [[9906, 1917]], [[9906], [1917, 0]], [-1]])
def test_token_ids_are_refused_with_what_langchain_users_must_set(
    client: TestClient, ids: list[Any]
) -> None:
    body = {"input": ids, "model": "minilm"}
    error = refused(client.post("/v1/embeddings", json=body), 400)
    assert "OpenAIEmbeddings(check_embedding_ctx_length=False)" in error["message"]
    assert "--allow-token-ids" in error["message"]
    assert error["param"] == "input"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": [[9906, 1917], [100257]]}, "input", "0 to 30521"),
        ({"input": [-1]}, "input", "0 to 30521"),
        ({"input": [10**400]}, "input", "0 to 30521"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": [[1.0]]}, "input", "lists of token ids"),
        ({"input": [5, True]}, "input", "lists of token ids"),
        ({"input": [5], "input_type": "query"}, "input_type", "texts"),
    ],
)
def test_token_ids_that_are_none_are_refused(
    encoder: Encoder,
    make_model: Callable[..., ServedModel],
    body: dict[str, Any],
    param: str,
    says: str,
) -> None:
    ours = TestClient(create_app(make_model(encoder, token_ids=True)))
    error = refused(ours.post("/v1/embeddings", json={"model": "minilm", **body}), 400)
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 700


def test_null_is_the_default_of_each_optional_field(client: TestClient) -> None:
    optional = ("encoding_format", "dimensions", "user", "input_type", "task", "title", "truncate")
    given, expected = embed(client, "a text", **dict.fromkeys(optional)), embed(client, "a text")
    assert given == expected
    assert isinstance(given["data"][0]["embedding"], list)


def test_input_type_applies_the_templates(
    prompted: Encoder, client: TestClient, make_model: Callable[..., ServedModel]
) -> None:
    ours = TestClient(create_app(make_model(prompted)))
    cases = [
        ({"input_type": "query"}, "task: search result | query: gecko"),
        ({"input_type": "query", "task": "fact checking"}, "task: fact checking | query: gecko"),
        ({"input_type": "passage"}, "title: none | text: gecko"),
        ({"input_type": "passage", "title": ""}, "title: none | text: gecko"),
        ({"input_type": "passage", "title": "Toes"}, "title: Toes | text: gecko"),
        ({"input_type": "passage", "title": ["Toes"]}, "title: Toes | text: gecko"),
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
        ({"input": ["a"] * 2049}, "input", "1 to 2048"),
        ({"input": ["a", 1]}, "input", "a list of strings"),
        ({"input": {"text": "a"}}, "input", "a list of strings"),
        ({"input": "a", "title": "b"}, "title", 'title needs input_type "passage"'),
        ({"input": "a", "title": "b", "input_type": "query"}, "title", "needs input_type"),
        ({"input": ["a", "b"], "title": "c", "input_type": "passage"}, "title", "1 titles and"),
        ({"input": "a", "title": [], "input_type": "passage"}, "title", "0 titles and input 1"),
        (
            {"input": "a", "title": 1, "input_type": "passage"},
            "title",
            "title: give a string, or a list",
        ),
        (
            {"input": "a", "title": [None], "input_type": "passage"},
            "title",
            "title: give a string, or a list",
        ),
        ({"input": None}, "input", "a list of strings"),
        ({"input": ["a", None]}, "input", "a list of strings"),
        ({"input": ["a"], "dimensions": True}, "dimensions", "integer"),
        ({"input": ["a"], "dimensions": 64.5}, "dimensions", "integer"),
        ({"input": ["a"], "dimensions": 10**400}, "dimensions", "1 to 384"),
        ({"input": ["a"], "truncate": 1}, "truncate", "boolean"),
        ({"input": "a", "model": 3}, "model", "string"),
        ({"input": "half \ud800"}, "input", "surrogate"),
        ({}, "input", "required"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({"input": "a", "dimension": 3}, "dimension", "unknown field"),
        ({"input": "a", "task": "t"}, "task", "input_type"),
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
    ("content", "says"),
    [
        (b"", "JSON object"),
        (b'{"input', "not valid JSON"),
        (b"[1]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"\xff", "not UTF-8"),
        (b'{"\\ud800": 1}', "JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"input":' * 100_000, "nested too deeply"),
        (b'{"input": ' + b"[" * 800 + b"]" * 800 + b', "model": "minilm"}', "token ids"),
        (b'{"input": NaN, "model": "minilm"}', "NaN is no number"),
        (b'{"input": "a", "model": "minilm", "dimensions": 1e999}', "integer"),
        (b'{"input": "a", "model": "minilm", "dimensions": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"input": "a", "model": "minilm", "input": "b"}', "the key 'input' twice"),
        (b"{" + b",".join(b'"%d":0' % n for n in range(20_000)) + b"}", "20000 keys"),
    ],
)
def test_body_that_is_no_request_is_refused(client: TestClient, content: bytes, says: str) -> None:
    headers = {"content-type": "application/json"}
    error = refused(client.post("/v1/embeddings", content=content, headers=headers), 400)
    assert says in error["message"]


def test_what_a_refusal_quotes_is_cut(client: TestClient) -> None:
    long = "x" * 100_000
    for body in ({"input": "a", "model": long}, {"input": "a", "model": "minilm", long: 1}):
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 1500
    assert len(client.get(f"/{'y' * 5000}").content) < 1000


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


def test_texts_and_characters_have_their_own_limits(
    encoder: Encoder, prompted: Encoder, make_model: Callable[..., ServedModel]
) -> None:
    app = create_app(make_model(encoder, max_texts=3, max_characters=100))
    client = TestClient(app)
    assert vectors(embed(client, ["a" * 33] * 3, truncate=True)).shape == (3, 384)
    body = {"model": "minilm", "input": ["a"] * 4}
    assert "give 1 to 3" in refused(client.post("/v1/embeddings", json=body), 400)["message"]
    body = {"model": "minilm", "input": ["a" * 34] * 3}
    error = refused(client.post("/v1/embeddings", json=body), 413)
    assert "102 characters; accepted are 100" in error["message"]
    assert error["type"] == "invalid_request_error"


def test_characters_are_counted_in_the_template_before_it_is_filled(
    prompted: Encoder, make_model: Callable[..., ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = TestClient(create_app(make_model(prompted)))
    written = []
    fill = PromptTemplates.format_query
    monkeypatch.setattr(
        PromptTemplates,
        "format_query",
        lambda self, text, **given: written.append(text) or fill(self, text, **given),
    )
    # 30 KB of request, 41 MB in `task: {task} | query: {text}`.
    body = {"model": "minilm", "input": ["a"] * 2048, "input_type": "query", "task": "t" * 20_000}
    assert len(json.dumps(body)) < 31_000
    error = refused(client.post("/v1/embeddings", json=body), 413)
    assert f"{2048 * (20_000 + len('task:  | query: a'))} characters" in error["message"]
    assert error["param"] == "input"
    assert "a" not in written  # only the template around it
    body = {"query": "a", "task": "t" * 2_100_000}
    corpus = Corpus(passages=pa.table({"id": []}), index=PassageIndex(384))
    client = TestClient(create_app(make_model(prompted, corpus=corpus)))
    assert refused(client.post("/v1/search", json=body), 413)["param"] == "query"
    assert "a" not in written


def test_titles_are_counted_and_stand_in_front_without_a_place(
    encoder: Encoder, prompted: Encoder, make_model: Callable[..., ServedModel]
) -> None:
    client = TestClient(create_app(make_model(encoder)))
    got = embed(client, ["gecko", "wall"], input_type="passage", title=["Toes", ""])
    expected = embed(client, ["Toes gecko", "wall"])
    np.testing.assert_allclose(vectors(got), vectors(expected), atol=1e-6)
    strict = TestClient(create_app(make_model(prompted, max_characters=100)))
    body = {"model": "minilm", "input": ["a"] * 2, "input_type": "passage", "title": ["t" * 40] * 2}
    error = refused(strict.post("/v1/embeddings", json=body), 413)
    assert f"{2 * len('title:  | text: a') + 80} characters in the template" in error["message"]


def test_added_token_without_an_embedding_is_read_as_the_encoder_reads_it(
    encoder: Encoder, make_model: Callable[..., ServedModel]
) -> None:
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.add_tokens(["<|image|>"])
    known = Encoder(
        encoder.model,
        tokenizer,
        pooling=encoder.pooling,
        max_tokens=encoder.max_tokens,
        templates=encoder.templates,
    )
    text = "a picture <|image|> of a harbour"
    client = TestClient(create_app(make_model(known, token_ids=True)))
    np.testing.assert_allclose(vectors(embed(client, text)), known.encode([text]), atol=1e-6)
    body = {"input": [tokenizer.convert_tokens_to_ids("<|image|>")], "model": "minilm"}
    error = refused(client.post("/v1/embeddings", json=body), 400)
    assert "token ids must be 0 to 30521" in error["message"]


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


def test_vectors_that_are_no_numbers_are_a_failure(
    encoder: Encoder, make_model: Callable[..., ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Encoder, "embed_tokens", lambda *_, **__: torch.full((1, 384), float("nan"))
    )
    client = TestClient(create_app(make_model(encoder)))
    body = {"input": "a", "model": "minilm"}
    error = refused(client.post("/v1/embeddings", json=body), 500)
    assert "no finite vector" in error["message"]


def test_console_needs_no_other_host(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "v1/search" in page.text
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page.text)
    assert "innerHTML" not in page.text
