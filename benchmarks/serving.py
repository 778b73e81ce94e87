"""Throughput and latency of the endpoint beside the server that one would write in an hour.

The rival is FastAPI with one `SentenceTransformer.encode` for each request, in the thread pool,
with the same model, the same cores and the same JSON. Both are up at once and loaded in turns by
the same closed-loop clients on loopback, so that whatever else the machine does affects both. The
processor time of a whole server, Ray's own processes included, is what such other work disturbs
least.

    python benchmarks/serving.py [--rounds 3] [--seconds 8] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import psutil

from actors.embedded import embedded_model
from cluster.plain_json import dump_json
from cluster.session import free_port

ROOT = Path(__file__).parents[1]
MODEL = "embedded:all-MiniLM-L6-v2"
NAME = "all-MiniLM-L6-v2"


@dataclass(frozen=True, kw_only=True)
class Load:
    """Closed loop: each client sends its next request when the last one is answered."""

    name: str
    num_clients: int
    texts_per_request: int
    words: tuple[int, int]


LOADS = (
    Load(name="one query, alone", num_clients=1, texts_per_request=1, words=(4, 12)),
    Load(name="queries", num_clients=16, texts_per_request=1, words=(4, 12)),
    Load(name="passages", num_clients=16, texts_per_request=1, words=(40, 120)),
    Load(name="bulk upload", num_clients=4, texts_per_request=32, words=(10, 120)),
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one server did under one load in one round."""

    texts_per_s: float
    p50_ms: float
    p95_ms: float
    cpu_ms_per_text: float


def main() -> None:
    """Runs both servers and prints a row for each load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="of each load, server and round")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rival-port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rival_port:
        serve_rival(arguments.rival_port)
        return
    ours, rival = free_port(), free_port()
    tokay = [sys.executable, "-m", "serving", MODEL, "--port", str(ours)]
    plain = [sys.executable, __file__, "--rival-port", str(rival)]
    with running(tokay, ours) as first, running(plain, rival) as second:
        servers = {"tokay": (ours, first), "plain": (rival, second)}
        results = measure(servers, arguments.rounds, arguments.seconds)
    print(f"{os.cpu_count()} cores, {arguments.rounds} rounds, medians")
    columns = ("texts/s", "p50 ms", "p95 ms", "CPU ms/text", "texts/s ratio")
    print(f"{'load':<18}{'':>8}" + "".join(f"{column:>14}" for column in columns))
    for load, figures in results.items():
        ratio = figures["tokay"].texts_per_s / figures["plain"].texts_per_s
        for server, row in figures.items():
            shown = f"{ratio:.2f}" if server == "tokay" else ""
            print(
                f"{load if shown else '':<18}{server:>8}{row.texts_per_s:>14.1f}"
                f"{row.p50_ms:>14.0f}{row.p95_ms:>14.0f}{row.cpu_ms_per_text:>14.1f}{shown:>14}"
            )
    if arguments.json:
        written = {
            load: {server: asdict(row) for server, row in figures.items()}
            for load, figures in results.items()
        }
        arguments.json.write_text(dump_json(written, indent=1) + "\n", encoding="utf-8")


def serve_rival(port: int) -> None:
    """The rival: a model, a route, nothing else."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sentence_transformers import SentenceTransformer

    class Body(BaseModel):
        input: list[str]
        model: str

    model = SentenceTransformer(str(embedded_model(MODEL)), device="cpu")
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> str:
        return "ok"

    @app.post("/v1/embeddings")
    def embeddings(body: Body) -> list[list[float]]:
        vectors: list[list[float]] = model.encode(body.input, show_progress_bar=False).tolist()
        return vectors

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[psutil.Process]:
    """Starts a server and waits until it answers; ends it afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        asyncio.run(_wait(process, port))
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


async def _wait(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + 300
    async with aiohttp.ClientSession() as session:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {process.args!r}")
            try:
                async with session.get(f"http://127.0.0.1:{port}/healthz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.3)


def measure(
    servers: dict[str, tuple[int, psutil.Process]], rounds: int, seconds: float
) -> dict[str, dict[str, Figures]]:
    """Loads the servers in turns; medians over the rounds for each load."""
    words = re.findall("[a-z]{3,}", Path(random.__file__).read_text(encoding="utf-8"))
    seen: dict[str, dict[str, list[Figures]]] = {}
    for number in range(rounds + 1):
        for load in LOADS:
            for server, (port, process) in servers.items():
                # The first round warms both up, and is not counted.
                duration = seconds if number else min(seconds, 2)
                figures = asyncio.run(_drive(port, process, load, duration, words))
                if number:
                    seen.setdefault(load.name, {}).setdefault(server, []).append(figures)
    return {
        load: {
            server: Figures(
                texts_per_s=statistics.median(row.texts_per_s for row in rows),
                p50_ms=statistics.median(row.p50_ms for row in rows),
                p95_ms=statistics.median(row.p95_ms for row in rows),
                cpu_ms_per_text=statistics.median(row.cpu_ms_per_text for row in rows),
            )
            for server, rows in by_server.items()
        }
        for load, by_server in seen.items()
    }


def _cpu_s(process: psutil.Process) -> float:
    spent = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            spent += times.user + times.system
    return spent


async def _drive(
    port: int, process: psutil.Process, load: Load, seconds: float, words: list[str]
) -> Figures:
    latencies: list[float] = []
    cpu_before_s = _cpu_s(process)
    began = time.perf_counter()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        draw = random.Random(number)
        while time.perf_counter() - began < seconds:
            texts = [
                " ".join(draw.choices(words, k=draw.randint(*load.words)))
                for _ in range(load.texts_per_request)
            ]
            asked = time.perf_counter()
            body = {"model": NAME, "input": texts}
            async with session.post(f"http://127.0.0.1:{port}/v1/embeddings", json=body) as answer:
                await answer.read()
                if answer.status != 200:
                    raise SystemExit(f"port {port} answered {answer.status}")
            latencies.append(time.perf_counter() - asked)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session, number) for number in range(load.num_clients)))
    took = time.perf_counter() - began
    cuts = statistics.quantiles(latencies, n=20) if len(latencies) > 1 else latencies * 19
    num_texts = len(latencies) * load.texts_per_request
    return Figures(
        texts_per_s=num_texts / took,
        p50_ms=1000 * cuts[9],
        p95_ms=1000 * cuts[18],
        cpu_ms_per_text=1000 * (_cpu_s(process) - cpu_before_s) / num_texts,
    )


if __name__ == "__main__":
    main()
