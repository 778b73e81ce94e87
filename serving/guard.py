"""What stands in front of the routes: who may ask, how much may be sent, what browsers may do.

A server on this machine can be reached by any page that its user opens: the page's own host name
may be made to lead here (DNS rebinding), and a form may post here. So names in `Host` and `Origin`
are checked, answers may not be framed or run anything but the console's own script, and no answer
allows another origin.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import excerpt
from serving.metrics import Metrics
from serving.protocol import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# The console holds no data, and a load balancer has no key.
_WITHOUT_KEY = frozenset({"/", "/healthz"})
_BODY_TIMEOUT_S = 60
# This many of the largest bodies may be held at once, waiting for their turn in the encoder.
_BODIES_AT_ONCE = 8
_HEADERS = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:\[\]@/]+))(?::[0-9]*)?", re.IGNORECASE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: Names that `Host` may hold besides those of loopback; None accepts any.
        key_sha256: SHA-256 in hex of the key that clients send as `Authorization: Bearer KEY`;
            None asks for no key. The hash, so that Ray's records of the application hold no key.
    """

    hosts: frozenset[str] | None = None
    key_sha256: str | None = None

    def check(self, scope: Scope) -> None:
        """Refuses a request by its headers.

        Raises:
            ApiError: 403 for another host or origin, 401 without the key.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _host_name(host)
        if self.hosts is not None and name not in LOOPBACK_NAMES | self.hosts:
            raise ApiError(
                403,
                f"host {excerpt(host, 80)!r} is not served here: ask for localhost, or have the"
                " operator start the server with --allowed-host NAME",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            raise ApiError(
                403,
                f"a page of {excerpt(origin, 80)!r} may not call this server: have the operator"
                " start it with --allowed-host NAME",
                code="origin_not_allowed",
            )
        if self.key_sha256 is None or scope["path"] in _WITHOUT_KEY:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.key_sha256):
            raise ApiError(
                401,
                "the API key is missing or wrong: send `Authorization: Bearer KEY` (api_key"
                " in OpenAI's clients)",
                code="invalid_api_key",
            )

    def _is_own(self, origin: str, host: str) -> bool:
        """Says whether a page came from this server, perhaps through a proxy that renames it."""
        _, _, place = origin.partition("://")
        return place.lower() == host.lower() or _host_name(place) in (self.hosts or ())


class Guard:
    """Checks, limits, counts and labels; plain ASGI, so that a disconnect still cancels."""

    def __init__(self, app: ASGIApp, *, access: Access, max_bytes: int, metrics: Metrics) -> None:
        self.app = app
        self._access = access
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, whatever happens inside."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 499  # nginx's code for a client that left before the answer
        started = False

        async def watched(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            try:
                self._access.check(scope)
                await self._pass_on(scope, receive, watched)
            except ApiError as error:
                await refusal(error)(scope, receive, watched)
            except ClientDisconnect:
                pass  # nobody is left to answer
            except Exception as error:
                logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
                if started:
                    raise
                failed = ApiError(500, "the server failed; its log says why")
                await refusal(failed)(scope, receive, watched)
        finally:
            # The route's pattern, so that random paths cannot make endless time series.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.count_request(path, status, time.perf_counter() - began)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body within its limits, then runs the application on it."""
        held = bytearray()
        try:
            await self._read_body(Headers(scope=scope), receive, held)
            body: bytes | None = bytes(held)

            async def replay() -> Message:
                nonlocal body
                if body is None:
                    return await receive()
                content, body = body, None
                return {"type": "http.request", "body": content, "more_body": False}

            await self.app(scope, replay, send)
        finally:
            self._held_bytes -= len(held)

    async def _read_body(self, headers: Headers, receive: Receive, held: bytearray) -> None:
        declared = headers.get("content-length", "")
        # A declared length may be refused, but not trusted: more may come.
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._max_bytes):
            raise self._too_long(f"of {declared[:18]} bytes")
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ClientDisconnect
                    more = message.get("more_body", False)
                    chunk = message.get("body", b"")
                    held += chunk
                    self._held_bytes += len(chunk)
                    if len(held) > self._max_bytes:
                        raise self._too_long(f"of more than {self._max_bytes} bytes")
                    if self._held_bytes > _BODIES_AT_ONCE * self._max_bytes:
                        raise ApiError(
                            429,
                            f"the server is busy: {self._held_bytes} bytes of requests are waiting;"
                            " try again in 1 s",
                            code="rate_limit_exceeded",
                            retry_after_s=1,
                        )
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not arrive within {_BODY_TIMEOUT_S} s: send it faster"
            ) from error

    def _too_long(self, given: str) -> ApiError:
        return ApiError(
            413,
            f"a body {given}: accepted are {self._max_bytes} in one request; send fewer texts at"
            " once",
            code="request_too_large",
        )


def refusal(error: ApiError) -> Response:
    """Writes an error in OpenAI's shape."""
    headers = {}
    if error.retry_after_s:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    # ASCII, because the body may quote a key that is not valid Unicode.
    return Response(json.dumps(error.body()), error.status, headers, "application/json")


def _host_name(place: str) -> str:
    """Returns the name in `NAME:PORT`, in lower case; empty where it is malformed."""
    match = _HOST.fullmatch(place)
    return (match[1] or match[2]).lower().removesuffix(".") if match else ""
