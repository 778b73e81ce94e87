"""The endpoint of a finished run, through real Ray Serve and the `openai` client."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pyarrow as pa
import pytest

from actors.encoder import Encoder
from cluster.artifacts import Manifest, list_files, write_artifact, write_shards
from cluster.session import free_port
from cluster.storage import Storage, open_storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PASSAGES = [
    ("sum", "sum", "Adds up the numbers of an iterable and returns the total."),
    ("sleep", "time.sleep", "Suspends execution of the calling thread for some seconds."),
    ("shuffle", "random.shuffle", "Puts the items of a list in random order, in place."),
    ("sqrt", "math.sqrt", "Returns the square root of a number."),
]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    url: str
    port: int
    model: Path
    process: subprocess.Popen[str]
    output: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0)


def finish(storage: Storage, step: str) -> None:
    manifest = Manifest(step=step, fingerprint="f", config={}, inputs={})
    write_artifact(storage, manifest, list_files(storage))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "serving", *arguments]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    run = tmp_path_factory.mktemp("runs") / "small"
    encoder = Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu")
    encoder.save(run / "export/model", model_card="# A test")
    finish(open_storage(run / "export"), "export")
    ids, titles, texts = map(list, zip(*PASSAGES, strict=True))
    columns = {"id": ids, "title": titles, "text": texts}
    table = pa.table({**columns, "embedding": list(encoder.encode_passages(texts, titles))})
    index = open_storage(run / "index")
    write_shards(index, table, rows_per_shard=3)
    finish(index, "index")
    del encoder

    port = free_port()
    output = run / "output.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    with output.open("w") as sink:
        process = subprocess.Popen(
            command(str(run), "--port", str(port)),
            cwd=ROOT,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        deadline = time.monotonic() + 300
        while "answers at" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield Endpoint(
            url=f"http://127.0.0.1:{port}",
            port=port,
            model=run / "export/model",
            process=process,
            output=output,
        )
    finally:
        process.terminate()
        process.wait(60)


def test_openai_client_gets_the_vectors_of_sentence_transformers(endpoint: Endpoint) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [text for _, _, text in PASSAGES] + ["Größe, 東京 🦎", "x", "gecko " * 100]
    expected = SentenceTransformer(str(endpoint.model), device="cpu").encode(texts)
    with endpoint.client() as client:
        # Its default asks for base64 and decodes it.
        whole = client.embeddings.create(model="small", input=texts)
        floats = client.embeddings.create(model="small", input=texts, encoding_format="float")
        short = client.embeddings.create(model="small", input=texts, dimensions=128)
    vectors = np.array([row.embedding for row in whole.data])
    assert vectors.shape == (len(texts), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * expected).sum(1).min() > 0.9999
    np.testing.assert_allclose([row.embedding for row in floats.data], vectors, atol=1e-5)
    cut = vectors[:, :128] / np.linalg.norm(vectors[:, :128], axis=1, keepdims=True)
    np.testing.assert_allclose([row.embedding for row in short.data], cut, atol=1e-5)
    assert whole.usage.prompt_tokens == floats.usage.total_tokens > len(texts)


def test_openai_client_raises_its_own_errors(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        with pytest.raises(openai.BadRequestError, match="1 to 384"):
            client.embeddings.create(model="small", input="a", dimensions=1000)
        with pytest.raises(openai.NotFoundError, match="'small'"):
            client.embeddings.create(model="other", input="a")
        assert [model.id for model in client.models.list()] == ["small"]


def test_search_uses_the_index_of_the_run(endpoint: Endpoint) -> None:
    body = {"query": "how do I wait a moment", "top_k": 2}
    hits = httpx.post(f"{endpoint.url}/v1/search", json=body).json()["results"]
    assert [hit["id"] for hit in hits][:1] == ["sleep"]
    assert hits[0]["title"] == "time.sleep"
    assert 1 > hits[0]["score"] > hits[1]["score"]


def test_concurrent_requests_share_passes_of_the_model(endpoint: Endpoint) -> None:
    def passes() -> tuple[float, float]:
        text = httpx.get(f"{endpoint.url}/metrics").text
        found = re.search(r"tokay_batch_texts_count\{.*?\} (\S+)", text)
        texts = re.search(r"tokay_texts_total\{.*?\} (\S+)", text)
        assert found and texts
        return float(found[1]), float(texts[1])

    passes_before, texts_before = passes()
    with endpoint.client() as client, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> list[float]:
            text = f"number {number} " * 20
            return client.embeddings.create(model="small", input=text).data[0].embedding

        answers = list(pool.map(ask, range(64)))
        alone = ask(40)
    passes_after, texts_after = passes()
    np.testing.assert_allclose(answers[40], alone, atol=1e-5)
    assert texts_after - texts_before == 65
    assert passes_after - passes_before < 50


def test_network_cannot_reach_the_server_or_its_ray(endpoint: Endpoint) -> None:
    listening: set[tuple[str, str]] = set()
    own = psutil.Process(endpoint.process.pid)
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # a worker that ends meanwhile
            name = process.name()
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.add((connection.laddr.ip.removeprefix("::ffff:"), name))
    assert len(listening) > 3
    # Serve gives each replica a port for other deployments, which asks for Ray's token.
    open_ports = {(ip, name) for ip, name in listening if ip not in ("127.0.0.1", "::1")}
    assert {name.partition(":tokay")[0] for _, name in open_ports} <= {"ray::ServeReplica"}


def test_other_hosts_and_pages_are_refused(endpoint: Endpoint) -> None:
    body = {"query": "how do I wait a moment"}
    for headers in ({"host": f"evil.example:{endpoint.port}"}, {"origin": "https://evil.example"}):
        refused = httpx.post(f"{endpoint.url}/v1/search", json=body, headers=headers)
        assert refused.status_code == 403
        assert refused.headers["x-frame-options"] == "DENY"
    own = {"host": f"localhost:{endpoint.port}", "origin": f"http://localhost:{endpoint.port}"}
    assert httpx.post(f"{endpoint.url}/v1/search", json=body, headers=own).is_success


def test_long_bodies_are_refused_whole_and_in_pieces(endpoint: Endpoint) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 2**16

    for content in (b" " * (8 * 2**20 + 1), pieces()):
        refused = httpx.post(f"{endpoint.url}/v1/embeddings", content=content)
        assert refused.status_code == 413
        assert "accepted are 8388608" in refused.json()["error"]["message"]


def test_taken_port_is_refused_in_one_line(endpoint: Endpoint) -> None:
    refused = subprocess.run(
        command(str(endpoint.model), "--port", str(endpoint.port)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"port {endpoint.port}" in refused.stderr


# Last: it ends the server.
def test_sigterm_stops_cleanly(endpoint: Endpoint) -> None:
    endpoint.process.send_signal(signal.SIGTERM)
    assert endpoint.process.wait(60) == 0
    output = endpoint.output.read_text()
    assert output.endswith("stopping\n")
    assert output.startswith("small (embeddings and search) answers at")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{endpoint.url}/healthz")
