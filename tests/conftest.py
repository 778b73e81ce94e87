"""What several tests need: real data where it lies beside the checkout, an S3 stand-in, Ray."""

import http.server
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public test sets, `TOKAY_DATA` or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("TOKAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no test data: set TOKAY_DATA to a folder with retrieval/cranfield in it")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A moto server on loopback, for processes that boto3's mocks do not reach."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket's URI, with credentials in the environment."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"tokay-{os.urandom(4).hex()}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


_KEPT = ("etag", "content-type", "content-range", "last-modified")


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on to `target`; refuses every third, and breaks off every fourth answer."""

    target = ""
    numbers = itertools.count(1)
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
        import httpx  # here, since tests/gpu runs where it may be absent

        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        number = next(self.numbers)
        if number % 3 == 0:
            self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        with httpx.Client(base_url=self.target) as client:
            got = client.request(self.command, self.path, content=body, headers=headers)
        kept = {k: v for k, v in got.headers.items() if k.lower() in _KEPT}
        time.sleep(0.05)
        self.answer(got.status_code, kept, got.content, broken=number % 4 == 0)

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, broken: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if broken else body)
        self.close_connection = broken

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def faulty_bucket(bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket behind an S3 that refuses, breaks off and takes its time."""
    FaultyProxy.target = s3_server
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    yield bucket
    proxy.shutdown()


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """Ray on this machine, as `tokay run` starts it; anew for each module, whose actors it ends."""
    import ray

    from cluster.session import connect

    # Workers import the stages that a test module defines.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "integration"))
        connect()
    yield
    ray.shutdown()
