"""The HTTP application: OpenAI's embeddings API, search, health, metrics and the console."""

import base64
import gc
import hashlib
import json
import re
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from actors.vectors import shorten
from cluster.errors import excerpt
from cluster.json_lines import parse_json
from serving.guard import Access, Guard, refusal
from serving.protocol import (
    INPUT_FORMS,
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

_CONSOLE = Path(__file__).with_name("console.html")
_TOP_K = 10
_ERRORS: dict[int | str, dict[str, str]] = {
    400: {"description": "The request cannot be answered; the message says why"},
    401: {"description": "The API key is missing or wrong"},
    403: {"description": "Another host, or a page of another origin"},
    404: {"description": "Another model's name, or no corpus for a search"},
    413: {"description": "The body or its texts are too long"},
    429: {"description": "Too much is waiting; Retry-After says how many seconds to wait"},
}


class _StrictRequest(Request):
    """A request whose JSON is read by our own rules."""

    async def json(self) -> Any:
        body = await self.body()
        # Millions of empty lists would set off collection after collection, though JSON has no
        # cycles: seconds, in which nobody else is answered.
        gc.disable()
        try:
            return parse_json(body)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error
        finally:
            gc.enable()


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


def create_app(model: ServedModel, access: Access | None = None) -> FastAPI:
    """Makes the application around one model; anybody may ask if `access` is None."""
    # Without /docs, whose page would load scripts from another host.
    app = FastAPI(
        title="Tokay",
        description="Embeddings in OpenAI's API, and search",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to the host that the request names
    )
    app.router.route_class = _StrictRoute
    app.add_middleware(
        Guard, access=access or Access(), max_bytes=model.limits.max_bytes, metrics=model.metrics
    )
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(HTTPException, _refuse_route)
    listed = Model(
        id=model.name,
        created=model.created,
        dimensions=model.encoder.dimensions,
        max_tokens=model.encoder.max_tokens,
        num_passages=len(model.corpus) if model.corpus else 0,
    )
    console = _CONSOLE.read_text(encoding="utf-8")
    console_headers = {"content-security-policy": content_security_policy(console)}

    @app.post("/v1/embeddings", response_model=EmbeddingResponse, responses=_ERRORS)
    async def embeddings(request: EmbeddingRequest) -> Response:
        """Embeds texts into vectors of length 1."""
        _check_name(request.model, model.name)
        size = _checked_dimensions(request.dimensions, model.encoder.dimensions)
        embedded = await model.embed(
            _input_list(request.input),
            role=request.input_type,
            titles=[request.title] if isinstance(request.title, str) else request.title,
            task=request.task,
            truncate=bool(request.truncate),
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
        answer = await model.search(request.query, top_k=request.top_k or _TOP_K, task=request.task)
        return _json(
            SearchResponse(
                results=[
                    Hit(id=passage.id, title=passage.title, text=passage.text, score=score)
                    for passage, score in answer.hits
                ],
                model=model.name,
                usage=_usage(answer.num_tokens),
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
        return HTMLResponse(console, headers=console_headers)

    return app


def content_security_policy(page: str) -> str:
    """Allows a page its own inline style and script, by their hashes, and requests to its host."""

    def hashes(tag: str) -> str:
        contents = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(content.encode()).digest() for content in contents]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


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
            f"model {excerpt(asked, 80)!r} does not exist here: this server serves {served!r}",
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


async def _refuse_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    if first["type"] == "json_invalid":
        message, param = f"the body is not valid JSON: {first['ctx']['error']}", None
    elif first["type"] == "extra_forbidden":
        message = (
            f"unknown field {excerpt(param or '', 80)!r}: see /openapi.json for those accepted"
        )
    elif param == "input" and first["type"] != "missing":
        message = INPUT_FORMS
    elif param is None:
        message = "the body must be a JSON object, sent with content-type application/json"
    else:
        message = f"{param}: {first['msg'].removeprefix('Value error, ')}"
    return refusal(ApiError(400, message, param=param and param[:80]))


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]  # `request.url` also reads Host, which may be malformed
    message = f"{request.method} {excerpt(path, 80)!r}: {error.detail}; see /openapi.json"
    return refusal(ApiError(error.status_code, message))
