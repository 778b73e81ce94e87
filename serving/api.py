"""The HTTP application: OpenAI's embeddings API, search, health, metrics and the console."""

import base64
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.metrics import Metrics
from serving.protocol import (
    ApiError,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    Hit,
    Model,
    ModelList,
    SearchRequest,
    SearchResponse,
    Usage,
)
from serving.served_model import ServedModel

_INPUT_FORMS = (
    "input must be a string, a list of strings, a list of token ids, or a list of lists of token"
    " ids"
)
_CONSOLE = Path(__file__).with_name("console.html")
_ERRORS: dict[int | str, dict[str, str]] = {
    400: {"description": "The request cannot be answered; the message says why"},
    404: {"description": "Another model's name, or no corpus for a search"},
    429: {"description": "Too much is waiting; Retry-After says how many seconds to wait"},
}

logger = logging.getLogger(__name__)


def create_app(model: ServedModel) -> FastAPI:
    """Makes the application around one model."""
    # Without /docs, whose page would load scripts from another host.
    app = FastAPI(
        title="Tokay",
        description="Embeddings in OpenAI's API, and search",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(_Measured, metrics=model.metrics)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)
    listed = Model(
        id=model.name,
        created=model.created,
        dimensions=model.encoder.dimensions,
        max_tokens=model.encoder.max_tokens,
        num_passages=len(model.corpus) if model.corpus else 0,
    )
    console = _CONSOLE.read_text(encoding="utf-8")

    @app.post("/v1/embeddings", response_model=EmbeddingResponse, responses=_ERRORS)
    async def embeddings(request: EmbeddingRequest) -> Response:
        """Embeds texts into vectors of length 1."""
        _check_name(request.model, model.name)
        size = _checked_dimensions(request.dimensions, model.encoder.dimensions)
        embedded = await model.embed(
            _input_list(request.input),
            role=request.input_type,
            task=request.task,
            truncate=request.truncate,
        )
        vectors = shorten(embedded.vectors, size)
        written = _base64(vectors) if request.encoding_format == "base64" else vectors.tolist()
        return _json(
            EmbeddingResponse.model_construct(
                data=[
                    Embedding.model_construct(index=index, embedding=vector)
                    for index, vector in enumerate(written)
                ],
                model=model.name,
                usage=_usage(embedded.num_tokens),
            )
        )

    @app.post("/v1/search", response_model=SearchResponse, responses=_ERRORS)
    async def search(request: SearchRequest) -> Response:
        """Finds the passages nearest to a query."""
        found = await model.search(request.query, top_k=request.top_k, task=request.task)
        return _json(
            SearchResponse(
                results=[
                    Hit(id=passage.id, title=passage.title, text=passage.text, score=score)
                    for passage, score in found.hits
                ],
                model=model.name,
                usage=_usage(found.num_tokens),
            )
        )

    @app.get("/v1/models")
    async def models() -> ModelList:
        """Lists the one model that is served."""
        return ModelList(data=[listed])

    @app.get("/v1/models/{name:path}", responses={404: _ERRORS[404]})
    async def one_model(name: str) -> Model:
        """Describes the model that is served."""
        _check_name(name, model.name)
        return listed

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answers while the replica can."""
        return {"status": "ok", "model": model.name}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters of this replica for Prometheus."""
        content = model.metrics.exposition(model.batcher.queued_tokens)
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(console)

    return app


def shorten(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """Keeps the first dimensions and brings every row back to length 1.

    Args:
        vectors: float32 `[texts, all dimensions]`.
        dimensions: How many to keep.

    Returns:
        float32 `[texts, dimensions]`; a row of zeros stays one.
    """
    if dimensions == vectors.shape[1]:
        return vectors
    kept = vectors[:, :dimensions]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    renormalised: np.ndarray = kept / np.maximum(lengths, 1e-12)
    return renormalised


def _input_list(
    given: str | list[str] | list[int] | list[list[int]],
) -> Sequence[str] | Sequence[Sequence[int]]:
    """Brings OpenAI's four forms of input to a list."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]
    return cast(list[str] | list[list[int]], given)


def _check_name(asked: str, served: str) -> None:
    if asked != served:
        raise ApiError(
            404,
            f"model {asked!r} does not exist here: this server serves {served!r}",
            param="model",
            code="model_not_found",
        )


def _checked_dimensions(asked: int | None, size: int) -> int:
    if asked is None:
        return size
    if not 1 <= asked <= size:
        raise ApiError(
            400,
            f"dimensions {asked}: this model has {size}, accepted are 1 to {size}",
            param="dimensions",
        )
    return asked


def _base64(vectors: np.ndarray) -> list[str]:
    little = vectors.astype("<f4")
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in little]


def _usage(num_tokens: int) -> Usage:
    return Usage(prompt_tokens=num_tokens, total_tokens=num_tokens)


def _json(body: BaseModel) -> Response:
    """Writes a body that we made ourselves: without FastAPI's second validation of every float."""
    return Response(body.model_dump_json(), media_type="application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    # ASCII, because the body may quote a key that is no valid Unicode.
    body = json.dumps(error.body())
    return Response(body, error.status, headers, media_type="application/json")


async def _refuse_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    if first["type"] == "json_invalid":
        message, param = "the body is not valid JSON", None
    elif first["type"] == "extra_forbidden":
        message = f"unknown field {param!r}: see /openapi.json for those that are accepted"
    elif param == "input" and first["type"] != "missing":
        message = _INPUT_FORMS
    elif param is None:
        message = "the body must be a JSON object, sent with content-type application/json"
    else:
        message = f"{param}: {first['msg']}"
    return await _refuse(request, ApiError(400, message, param=param))


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; see /openapi.json"
    return await _refuse(request, ApiError(error.status_code, message))


async def _fail(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _refuse(request, ApiError(500, "the server failed; its log says why"))


class _Measured:
    """Counts answers and their seconds; plain ASGI, so that a client's leaving still cancels."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 499  # nginx' number for a client that left before the answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            # The route's pattern, so that random paths cannot make endless series.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.count_request(path, status, time.perf_counter() - began)
