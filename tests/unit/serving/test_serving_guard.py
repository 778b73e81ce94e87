import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from actors.encoder import Encoder
from serving import guard
from serving.api import create_app
from serving.guard import Access
from serving.served_model import ServedModel

BODY = {"input": "a", "model": "minilm"}
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def model(encoder: Encoder, make_model: Callable[..., ServedModel]) -> ServedModel:
    return make_model(encoder, max_bytes=5000)


@pytest.fixture(scope="module")
def local(model: ServedModel) -> TestClient:
    """As `tokay serve --allowed-host search.example.org` answers on loopback."""
    access = Access(hosts=frozenset({"127.0.0.1", "search.example.org"}))
    return TestClient(create_app(model, access))


def ask(client: TestClient, **headers: str) -> httpx.Response:
    return client.post("/v1/embeddings", json=BODY, headers=headers)


def code(response: httpx.Response, status: int) -> Any:
    assert response.status_code == status, response.text
    return response.json()["error"]["code"]


@pytest.mark.parametrize(
    "host",
    [
        "localhost:8000",
        "localhost",
        "LOCALHOST:9000",
        "127.0.0.1:8000",
        "[::1]:8000",
        "search.example.org",
        "search.example.org:443",
    ],
)
def test_hosts_of_loopback_and_those_allowed_are_answered(local: TestClient, host: str) -> None:
    assert ask(local, host=host).is_success


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example:8000",
        "127.0.0.1.evil.example",
        "evil.example:80@localhost",
        "localhost@evil.example",
        "[::1].evil.example",
        "[::2]",
        "0.0.0.0:8000",
        "10.0.0.1",
        "[",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/openapi.json", "/metrics", "/none"])
def test_other_hosts_are_refused_on_every_path(local: TestClient, host: str, path: str) -> None:
    assert code(local.get(path, headers={"host": host}), 403) == "host_not_allowed"


def test_open_server_answers_any_host(model: ServedModel) -> None:
    for host in ("10.0.0.1:8000", "a.example", "["):
        assert ask(TestClient(create_app(model)), host=host).is_success


@pytest.mark.parametrize(
    ("host", "origin", "answered"),
    [
        ("localhost:8000", "http://localhost:8000", True),
        ("search.example.org", "https://search.example.org", True),
        ("127.0.0.1:8000", "https://search.example.org", True),  # behind a proxy
        ("localhost:8000", "http://localhost:3000", False),
        ("localhost:8000", "https://evil.example", False),
        ("localhost:8000", "https://localhost:8000.evil.example", False),
        ("localhost:8000", "null", False),
        ("localhost:8000", "", False),
    ],
)
def test_pages_of_other_origins_are_refused(
    local: TestClient, host: str, origin: str, answered: bool
) -> None:
    response = ask(local, host=host, origin=origin)
    if answered:
        assert response.is_success
    else:
        assert code(response, 403) == "origin_not_allowed"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "a/b/c"]
)
def test_what_a_form_can_post_is_refused(local: TestClient, kind: str) -> None:
    for path in ("/v1/embeddings", "/v1/search"):
        headers = {"content-type": kind, "host": "localhost"}
        response = local.post(path, content=json.dumps(BODY), headers=headers)
        assert code(response, 400) is None
        assert "application/json" in response.json()["error"]["message"]


def test_key_is_asked_for_everything_but_the_page_and_health(model: ServedModel) -> None:
    access = Access(key_sha256=hashlib.sha256(KEY.encode()).hexdigest())
    client = TestClient(create_app(model, access))
    assert ask(client, authorization=f"Bearer {KEY}").is_success
    assert ask(client, authorization=f"bearer  {KEY} ").is_success
    for wrong in ("", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", "Bearer \xe9"):
        response = client.post(
            "/v1/embeddings", json=BODY, headers={"authorization": wrong.encode("latin-1")}
        )
        assert code(response, 401) == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/v1/models/minilm", "/metrics", "/openapi.json", "/none"):
        assert client.get(path).status_code == 401
    assert client.get("/").is_success
    assert client.get("/healthz").is_success


def test_every_answer_has_the_headers_that_browsers_obey(
    encoder: Encoder, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = TestClient(create_app(model, Access(hosts=frozenset())), base_url="http://localhost")
    answers = [
        client.get("/"),
        client.get("/openapi.json"),
        client.get("/metrics"),
        ask(client),
        client.get("/none"),
        client.options("/v1/embeddings", headers={"origin": "http://localhost"}),
        client.get("/", headers={"host": "evil.example"}),
        client.post("/v1/embeddings", content=b"x" * 6000),
    ]
    monkeypatch.setattr(Encoder, "embed_tokens", None)
    answers.append(ask(client))
    assert [answer.status_code for answer in answers] == [
        200,
        200,
        200,
        200,
        404,
        405,
        403,
        413,
        500,
    ]
    for answer in answers:
        headers = answer.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert not [name for name in headers if name.startswith("access-control")]


def test_console_may_run_its_own_script_and_no_other(local: TestClient) -> None:
    page = local.get("/", headers={"host": "localhost"})
    policy = page.headers["content-security-policy"]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    # A policy with hashes allows none of these.
    assert not re.search(r"\son[a-z]+=[\"']|\sstyle=|javascript:", page.text)
    # Passages come from anywhere, and are put in as text.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(", page.text
    )


def test_failure_is_counted_as_such(
    encoder: Encoder, make_model: Callable[..., ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = TestClient(create_app(make_model(encoder)))
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "embed_tokens", None)
        assert ask(client).status_code == 500
    line = 'tokay_requests_total{path="/v1/embeddings",replica="0",status="500"} 1.0'
    assert line in client.get("/metrics").text.splitlines()


async def in_chunks(content: bytes, taken: list[int]) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 100):
        taken.append(start)
        yield content[start : start + 100]
        await asyncio.sleep(0)


@pytest.mark.parametrize("size", [5000, 5001])
@pytest.mark.parametrize("chunked", [False, True])
def test_body_is_read_to_its_limit_and_not_parsed_beyond(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, size: int, chunked: bool
) -> None:
    parsed = []
    monkeypatch.setattr("serving.api.parse_json", lambda body: parsed.append(len(body)) or {})
    content = b'{"input": "' + b"a" * (size - 13) + b'"}'
    taken: list[int] = []

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(model))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            given = in_chunks(content, taken) if chunked else content
            headers = {"content-type": "application/json"}
            return await client.post("/v1/embeddings", content=given, headers=headers)

    response = asyncio.run(post())
    if size > 5000:
        assert code(response, 413) == "request_too_large"
        assert "5000 in one request" in response.json()["error"]["message"]
        assert parsed == []
    else:
        assert response.status_code == 400
        assert parsed == [5000]


def test_endless_body_is_refused_at_the_limit(model: ServedModel) -> None:
    taken: list[int] = []

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(model))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/embeddings", content=in_chunks(b"a" * 10**6, taken))

    assert code(asyncio.run(post()), 413) == "request_too_large"
    assert max(taken) <= 5000


@pytest.mark.parametrize("length", ["5001", "9" * 5000, "1" + "0" * 30])
def test_declared_length_over_the_limit_is_refused_unread(model: ServedModel, length: str) -> None:
    read: list[str] = []

    async def receive() -> dict[str, Any]:
        read.append("body")
        return {"type": "http.request", "body": b""}

    messages = asyncio.run(call(model, receive, [(b"content-length", length.encode())]))
    assert messages[0]["status"] == 413
    assert len(messages[1]["body"]) < 500
    assert not read


def test_bodies_that_wait_together_are_bounded(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(model)

    async def burst() -> list[int]:
        halted = asyncio.Event()

        async def half() -> AsyncIterator[bytes]:
            yield b"a" * 4900
            await halted.wait()

        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            waiting = [
                asyncio.create_task(client.post("/v1/embeddings", content=half())) for _ in range(8)
            ]
            await asyncio.sleep(0.05)
            late = await client.post("/v1/embeddings", content=b"a" * 4900)
            halted.set()
            first = await asyncio.gather(*waiting)
            again = await client.post("/v1/embeddings", content=b"a" * 4900)
        assert late.headers["retry-after"] == "1"
        return [*(answer.status_code for answer in first), late.status_code, again.status_code]

    assert asyncio.run(burst()) == [400] * 8 + [429, 400]


def test_body_that_does_not_arrive_is_given_up(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_BODY_TIMEOUT_S", 0.05)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError("unreachable")

    messages = asyncio.run(call(model, receive, []))
    assert messages[0]["status"] == 408


def test_client_that_leaves_while_it_sends_gets_nothing(model: ServedModel) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert asyncio.run(call(model, receive, [])) == []


async def call(
    model: ServedModel, receive: Callable[[], Any], headers: list[tuple[bytes, bytes]]
) -> list[dict[str, Any]]:
    """Runs the bare application on one request."""
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/embeddings",
        "raw_path": b"/v1/embeddings",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"test"), (b"content-type", b"application/json"), *headers],
    }
    await create_app(model)(scope, receive, send)
    return messages
