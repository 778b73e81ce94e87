"""An endpoint gives the encoder's own vectors: Tokay's application, and a plain OpenAI server."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from actors.encoder import Encoder, PromptTemplates
from cluster.errors import TokayError, UserError
from pipelines.evaluation.endpoint import BATCH_TEXTS, EndpointEncoder
from serving.api import create_app
from serving.metrics import Metrics
from serving.served_model import ServedModel

TEXTS = [f"passage number {i} about subject {i % 7}" for i in range(2 * BATCH_TEXTS + 5)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    encoder = Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu", max_tokens=32)
    encoder.templates = PromptTemplates(
        query="task: {task} | query: {text}", passage="title: {title} | text: {text}"
    )
    return encoder


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
    model = ServedModel(
        encoder,
        name="student",
        task="question answering",
        batch_tokens=4096,
        max_queued_tokens=1_000_000,
        metrics=Metrics(),
    )
    with served(create_app(model)) as url:
        yield url


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
    expected = encoder.encode_passages(["", long, "Title text"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


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
        assert not {"task", "input_type", "truncate"} & requests[0].keys()
        with pytest.raises(TokayError, match="no such luck"):
            endpoint.encode_passages(["refuse"])


def test_endpoint_that_is_none_is_refused(tokay: str) -> None:
    with pytest.raises(UserError, match=r"no endpoint answers at http://127\.0\.0\.1:9/v1"):
        EndpointEncoder("http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="up to and with /v1"):
        EndpointEncoder(tokay.removesuffix("/v1"))
