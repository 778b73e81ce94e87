"""What several tests need: real data where it lies beside the checkout, an S3 stand-in, Ray."""

import os
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


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on this machine, as `tokay run` starts it."""
    import ray

    from cluster.session import connect

    # Workers import the stages that a test module defines.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "integration"))
        connect()
    yield
    ray.shutdown()
