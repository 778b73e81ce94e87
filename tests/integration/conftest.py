"""A Ray cluster of one node, started as a user's would be."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

StartHead = Callable[
    [dict[str, str]], contextlib.AbstractContextManager[tuple[str, Path]]
]  # its dashboard, and the folder of its logs


def free_ports(count: int) -> list[int]:
    """Returns ports outside the range that the system and Ray hand out by themselves."""
    free = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def job_server() -> Iterator[str]:
    """The dashboard of a Ray head on this machine, with its job server."""
    # Else the token that an earlier Ray left in the home folder is asked for.
    with ray_head({"RAY_AUTH_MODE": "disabled"}) as (url, _):
        yield url


@pytest.fixture(scope="module")
def start_ray_head() -> StartHead:
    """Starts a Ray head with the given variables."""
    return ray_head


@contextlib.contextmanager
def ray_head(variables: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """A Ray head with these variables: its dashboard, and the folder of its logs."""
    gcs, dashboard, agent, client = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Short: socket paths end at 107 bytes.
    # No ray stop at the end: it would stop every Ray on this machine.
    command = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--num-cpus=2", "--object-store-memory=80000000", f"--temp-dir={folder}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with Path(folder, "start.log").open("wb") as log:
        head = subprocess.Popen(
            [sys.executable, *command],
            env={**environment, "PATH": path, **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        token = variables.get("RAY_AUTH_TOKEN_PATH")
        headers = {"Authorization": f"Bearer {Path(token).read_text()}"} if token else {}
        wait_for_agent(url, headers, head, Path(folder, "start.log"))
        yield url, Path(folder)
    finally:
        # Killed, for its graceful end takes 10 seconds; workers end, and stop writing, soon after.
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        for _ in range(40):
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.25)
            if not Path(folder).exists():
                break


def wait_for_agent(
    url: str, headers: dict[str, str], head: "subprocess.Popen[bytes]", log: Path
) -> None:
    """The dashboard answers some seconds before it can take a job."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            nodes = httpx.get(f"{url}/nodes?view=hostNameList", headers=headers, timeout=2).json()
            if nodes["data"]["hostNameList"]:
                return
        except (httpx.HTTPError, ValueError, KeyError):
            pass
        assert head.poll() is None, log.read_text()
        time.sleep(0.3)
    raise AssertionError(log.read_text())
