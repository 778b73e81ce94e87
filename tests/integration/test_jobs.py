"""The job client against a real Ray head with its real job server, on this machine."""

import functools
import http.server
import itertools
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from cluster import jobs
from cluster.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def address(job_server: str) -> str:
    return job_server


def submit(address: str, *, storage: str, flags: Sequence[str] = ()) -> str:
    return jobs.submit(
        "no_such_key: 1\n", name="small.yaml", address=address, storage=storage, flags=flags
    )


def wait(address: str, job_id: str, *, seconds: float = 60) -> jobs.JobState:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        (state,) = jobs.status(address, job_id)
        if state.finished:
            return state
        time.sleep(0.2)
    raise AssertionError(state)


def test_job_runs_in_a_folder_with_its_files_and_is_followed_to_the_end(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray itself would let these override the address that was given.
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", NOWHERE)
    code = "import sys; print(open('recipe.yaml').read(), sys.argv[1:])"
    job_id = jobs.submit_command(
        ["python", "-c", code, "a b", "c;'d"],
        address=address,
        files={"recipe.yaml": "name: größer"},
        labels={"recipe": "mine.yaml", "storage": "s3://bucket/run"},
        submission_id="first-1",
    )
    assert job_id == "first-1"
    followed = "".join(jobs.logs(address, job_id, follow=True))
    assert "name: größer ['a b', \"c;'d\"]" in followed
    state = wait(address, job_id)
    assert (state.status, state.exit_code) == ("SUCCEEDED", 0)
    assert (state.recipe, state.storage) == ("mine.yaml", "s3://bucket/run")
    assert state.started is not None
    assert state.ended is not None
    assert state.started <= state.ended
    assert "name: größer" in "".join(jobs.logs(address, job_id))
    assert os.environ["RAY_ADDRESS"] == NOWHERE

    with pytest.raises(UserError, match=r"first-1.*taken") as error:
        jobs.submit_command(["true"], address=address, files={}, submission_id="first-1")
    assert "\n" not in str(error.value)


def test_failing_job_is_reported_as_failed_and_both_are_listed(address: str) -> None:
    job_id = jobs.submit_command(
        ["python", "-c", "raise SystemExit('no such corpus')"], address=address, files={}
    )
    state = wait(address, job_id)
    assert (state.status, state.exit_code) == ("FAILED", 1)
    assert "no such corpus" in "".join(jobs.logs(address, job_id))
    listed = jobs.status(address)
    assert listed[0] == state
    assert all(
        a.started >= b.started
        for a, b in itertools.pairwise(listed)
        if a.started is not None and b.started is not None
    )


def test_running_job_is_stopped(address: str) -> None:
    job_id = jobs.submit_command(
        ["python", "-u", "-c", "import time; print('up'); time.sleep(600)"],
        address=address,
        files={},
    )
    pieces = jobs.logs(address, job_id, follow=True)
    assert any("up" in piece for piece in pieces)  # And leaves the rest unread.
    assert jobs.stop(address, job_id) is True
    assert wait(address, job_id).status == "STOPPED"
    assert jobs.stop(address, job_id) is False


def test_shipped_code_is_imported_from_the_job_not_from_the_node(address: str) -> None:
    job_id = jobs.submit_command(
        ["python", "-c", "import cluster, pipelines; print(cluster.__file__, pipelines.__file__)"],
        address=address,
        files={},
        ship_code=True,
    )
    assert wait(address, job_id).status == "SUCCEEDED"
    output = "".join(jobs.logs(address, job_id))
    assert output.count("py_modules_files") == 2
    assert str(ROOT) not in output


def test_recipe_becomes_the_command_line_with_its_settings_and_no_environment(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job_id = submit(address, storage="my runs", flags=["--set", "a.b=c d"])
    jobs.stop(address, job_id)
    state = wait(address, job_id)
    assert (state.recipe, state.storage) == ("small.yaml", str(tmp_path / "my runs"))
    (details,) = (
        job for job in httpx.get(f"{address}/api/jobs/").json() if job["submission_id"] == job_id
    )
    assert details["entrypoint"] == (
        f"python -m pipelines.cli run recipe.yaml --storage '{tmp_path}/my runs' --set 'a.b=c d'"
    )
    assert "env_vars" not in details["runtime_env"]


def test_unknown_job_is_one_line_for_the_user(address: str) -> None:
    for ask in (jobs.status, jobs.logs, jobs.stop):
        with pytest.raises(UserError, match="no job 'nothing'") as error:
            ask(address, "nothing")
        assert "\n" not in str(error.value)


def test_cluster_elsewhere_refuses_a_folder_but_takes_s3(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As through an SSH tunnel: the address is loopback, and the nodes have another name than we.
    monkeypatch.setattr(socket, "gethostname", lambda: "laptop")
    for storage in ("runs", "/data/runs", "file:///data/runs"):
        with pytest.raises(UserError, match=r"runs elsewhere.*s3://"):
            submit(address, storage=storage)
    job_id = submit(address, storage="s3://bucket/run/")
    jobs.stop(address, job_id)
    assert wait(address, job_id).storage == "s3://bucket/run"


@pytest.mark.parametrize("given", ["127.0.0.1:8265", "auto", "ray://head:10001", "http://", ""])
def test_address_that_is_no_dashboard_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="http://HEAD:8265"):
        jobs.status(given)


def test_unreachable_address_is_one_line_for_the_user() -> None:
    with pytest.raises(UserError, match=f"no cluster answers at {NOWHERE}") as error:
        jobs.status(NOWHERE)
    assert "\n" not in str(error.value)


def test_server_that_is_not_ray_is_named(tmp_path: Path) -> None:
    serve_folder = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve_folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="not a Ray dashboard"):
            jobs.status(f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()


@pytest.mark.parametrize("given", ["", "a b", "../x", "a/b", "-x", "x" * 129, "a\n"])
def test_malformed_submission_id_is_refused_before_anything_is_sent(given: str) -> None:
    with pytest.raises(UserError, match="submission id"):
        jobs.submit_command(["true"], address=NOWHERE, files={}, submission_id=given)


def test_credentials_in_a_storage_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="credentials") as error:
        submit(NOWHERE, storage="s3://KEY:SECRET@bucket/run")
    assert "SECRET" not in str(error.value)
