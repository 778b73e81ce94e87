"""An endpoint gives the encoder's own vectors: Tokay's application, and a plain OpenAI server."""

import asyncio
import gzip
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from actors.encoder import Encoder
from cluster.errors import TokayError, UserError
from pipelines.datasets.retrieval import RetrievalDataset, TitledText
from pipelines.evaluation import endpoint as endpoint_module
from pipelines.evaluation.endpoint import BATCH_TEXTS, EndpointEncoder
from pipelines.evaluation.evaluate import evaluate
from serving.api import create_app
from serving.metrics import Metrics
from serving.served_model import ServedModel

TEXTS = [f"passage number {i} about subject {i % 7}" for i in range(2 * BATCH_TEXTS + 5)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load("title: {title} | text: {text}")


def load(passage_template: str) -> Encoder:
    return Encoder.load(
        "embedded:all-MiniLM-L6-v2",
        device="cpu",
        max_tokens=32,
        query_template="task: {task} | query: {text}",
        passage_template=passage_template,
    )


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Runs an application on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def tokay(encoder: Encoder) -> Iterator[str]:
    with served(tokay_app(encoder)) as url:
        yield url


def tokay_app(encoder: Encoder) -> FastAPI:
    model = ServedModel(
        encoder,
        name="student",
        task="question answering",
        batch_tokens=4096,
        max_queued_tokens=1_000_000,
        metrics=Metrics(),
    )
    return create_app(model)


def test_endpoint_of_tokay_gives_the_encoders_vectors(encoder: Encoder, tokay: str) -> None:
    endpoint = EndpointEncoder(tokay)
    assert (endpoint.model, endpoint.is_tokay) == ("student", True)
    np.testing.assert_allclose(
        endpoint.encode_passages(TEXTS), encoder.encode_passages(TEXTS), atol=1e-5
    )
    queries = endpoint.encode_queries(["how?"], task="fact checking")
    np.testing.assert_allclose(
        queries, encoder.encode_queries(["how?"], task="fact checking"), atol=1e-5
    )
    other = endpoint.encode_queries(["how?"], task="search result")
    assert np.abs(queries - other).max() > 1e-3


def test_endpoint_takes_empty_over_long_and_titled_passages(encoder: Encoder, tokay: str) -> None:
    long = "word " * 500
    found = EndpointEncoder(tokay).encode_passages(["", long, "text"], ["", None, "Title"])
    expected = encoder.encode_passages(["", long, "text"], ["", None, "Title"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("template", ["title: {title} | text: {text}", "{text}"])
def test_endpoint_and_encoder_evaluate_alike_on_titled_passages(template: str) -> None:
    encoder = load(template)
    passages = {str(n): TitledText(f"Title {n % 13}" if n % 5 else "", TEXTS[n]) for n in range(90)}
    queries = {f"q{n}": f"title {n % 13} passage {n}" for n in range(0, 90, 7)}
    qrels = {f"q{n}": {str(n): 1} for n in range(0, 90, 7)}
    data = RetrievalDataset(name="titled", passages=passages, queries=queries, qrels=qrels)
    with served(tokay_app(encoder)) as url:
        theirs = evaluate(EndpointEncoder(url), data)
    ours = evaluate(encoder, data)
    for query, hits in ours.top_results.items():
        there = theirs.top_results[query]
        assert [cosine for _, cosine in there] == pytest.approx([c for _, c in hits], abs=1e-4)
    bare = {id_: TitledText("", passage.text) for id_, passage in passages.items()}
    untitled = evaluate(encoder, replace(data, passages=bare))
    assert ours.top_results["q7"][0][1] - untitled.top_results["q7"][0][1] > 1e-3


def plain_server(encoder: Encoder, requests: list[dict[str, object]]) -> FastAPI:
    """An OpenAI-compatible server with two models, whose vectors are not of unit length."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        names = ("small", "large")
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "acme"} for name in names]
        return {"object": "list", "data": rows}

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> JSONResponse:
        body = await request.json()
        requests.append(body)
        if "refuse" in body["input"]:
            return JSONResponse({"error": {"message": "no such luck"}}, 400)
        vectors = 3 * encoder.encode(body["input"])
        data = [
            {"object": "embedding", "index": index, "embedding": vector.tolist()}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        answer = {"object": "list", "model": body["model"], "data": data[::-1], "usage": usage}
        return JSONResponse(answer)

    return app


def test_endpoint_of_others_gets_texts_alone_and_is_normalised(encoder: Encoder) -> None:
    requests: list[dict[str, object]] = []
    with served(plain_server(encoder, requests)) as url:
        with pytest.raises(UserError, match=f"serves small, large.*choose one with {url}#NAME"):
            EndpointEncoder(url)
        endpoint = EndpointEncoder(f"{url}#large")
        assert not endpoint.is_tokay
        found = endpoint.encode_queries(["a", "b"], task="fact checking")
        np.testing.assert_allclose(found, encoder.encode(["a", "b"]), atol=1e-5)
        assert requests[0]["input"] == ["a", "b"]
        assert requests[0]["model"] == "large"
        assert not {"task", "input_type", "title", "truncate"} & requests[0].keys()
        endpoint.encode_passages(["text", "alone"], ["Title", None])
        assert requests[1]["input"] == ["Title text", "alone"]
        assert "title" not in requests[1]
        with pytest.raises(TokayError, match="no such luck"):
            endpoint.encode_passages(["refuse"])


def test_endpoint_that_is_none_is_refused(tokay: str) -> None:
    with pytest.raises(UserError, match=r"no endpoint answers at http://127\.0\.0\.1:9/v1"):
        EndpointEncoder("http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="up to and with /v1"):
        EndpointEncoder(tokay.removesuffix("/v1"))


MODELS = {"data": [{"id": "m", "object": "model", "created": 0, "owned_by": "acme"}]}


def vectors(*rows: object) -> dict[str, object]:
    return {"data": [{"index": at, "embedding": row} for at, row in enumerate(rows)]}


@contextmanager
def hostile(answers: dict[str, Response]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server with one answer for each path; also gives the headers of what was asked."""
    app = FastAPI()
    asked: list[dict[str, str]] = []

    @app.api_route("/v1/{path}", methods=["GET", "POST"])
    async def answer(path: str, request: Request) -> Response:
        asked.append(dict(request.headers))
        return answers[path]

    with served(app) as url:
        yield url, asked


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "none of OpenAI's answers"),
        (b"<html>", "none of OpenAI's answers"),
        (b"[" * 100_000, "none of OpenAI's answers"),
        (b'{"data": null}', "none of OpenAI's answers"),
        (b'{"data": [{"index": 0, "embedding": null}]}', "none of OpenAI's answers"),
        (json.dumps(vectors([1.0, 2.0])), "2 texts with 1 vectors"),
        (json.dumps({"data": [{"index": 1, "embedding": [1.0]}] * 2}), "2 texts with 2 vectors"),
        (json.dumps(vectors([1.0], [1.0, 2.0])), "vectors of several lengths"),
        (json.dumps(vectors([], [])), "no vector of finite numbers"),
        (json.dumps(vectors([float("nan")], [1.0])), "no vector of finite numbers"),
        (json.dumps(vectors([1e300], [1.0])), "no vector of finite numbers"),
        (json.dumps(vectors("!!", "!!")), "no vector of finite numbers"),
        (json.dumps(vectors("AAA=", "AAA=")), "no vector of finite numbers"),
        (json.dumps(vectors("AADAfw==", "AADAfw==")), "no vector of finite numbers"),  # NaN
        (json.dumps(vectors("\U0001f98e", "a")), "no vector of finite numbers"),
    ],
)
def test_endpoint_that_answers_no_vectors_is_told_in_one_line(content: bytes, says: str) -> None:
    answers = {"models": JSONResponse(MODELS), "embeddings": Response(content)}
    with hostile(answers) as (url, _):
        endpoint = EndpointEncoder(url)
        with pytest.raises(TokayError, match=says) as refusal:
            endpoint.encode_passages(["a", "b"])
    message = str(refusal.value)
    assert message.startswith(f"{url}/embeddings answered ")
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize("content", [b"", b"<html>" * 10**5, b"{}", b'{"data": [{"id": 3}]}'])
def test_endpoint_without_a_list_of_models_is_no_endpoint(content: bytes) -> None:
    with (
        hostile({"models": Response(content)}) as (url, _),
        pytest.raises(UserError, match="up to and with /v1") as refusal,
    ):
        EndpointEncoder(url)
    assert len(str(refusal.value)) < 500


def test_endpoint_may_not_change_the_length_of_its_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {"models": JSONResponse(MODELS), "embeddings": JSONResponse(vectors([1.0, 0.0]))}
    with hostile(answers) as (url, _):
        endpoint = EndpointEncoder(url)
        assert endpoint.encode_passages(["a"]).shape == (1, 2)
        answers["embeddings"] = JSONResponse(vectors([1.0]))
        with pytest.raises(TokayError, match="vectors of 1 and of 2 numbers"):
            endpoint.encode_passages(["a"])


def test_endpoint_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_ANSWER_BYTES", 10_000)
    sent = []

    async def endless() -> AsyncIterator[bytes]:
        while len(sent) < 10_000:
            sent.append(1)
            await asyncio.sleep(0.001)
            yield b" " * 1000

    answers: dict[str, Response] = {"models": JSONResponse(MODELS)}
    with hostile(answers) as (url, asked):
        endpoint = EndpointEncoder(url)
        for status, says in (
            (200, "answers without end: accepted are 10000"),
            (400, "without end|code: 400"),
        ):
            answers["embeddings"] = StreamingResponse(endless(), status)
            with pytest.raises(TokayError, match=says):
                endpoint.encode_passages(["a"])
        assert len(sent) < 1000
        assert len(asked) == 3  # such an answer is not asked for again
        packed = Response(gzip.compress(b" " * 10**7), headers={"content-encoding": "gzip"})
        answers["embeddings"] = packed
        with pytest.raises(TokayError, match="packs its answers"):
            endpoint.encode_passages(["a"])


@pytest.mark.parametrize("path", ["models", "embeddings"])
def test_endpoint_cannot_send_the_key_elsewhere(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with hostile({"models": JSONResponse(MODELS)}) as (other, stolen):
        answers: dict[str, Response] = {"models": JSONResponse(MODELS)}
        answers[path] = RedirectResponse(f"{other}/{path}", 307)
        with hostile(answers) as (url, asked), pytest.raises(TokayError, match=f"go to {other}"):
            EndpointEncoder(url).encode_passages(["a"])
    assert asked[0]["authorization"] == "Bearer secret"
    assert stolen == []


@pytest.mark.parametrize("url", ["http://[/v1", "http://host:port/v1", "http:///v1"])
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError):
        EndpointEncoder(url)
