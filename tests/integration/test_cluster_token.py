"""A Ray head that asks for a token, as `ray_cluster.yaml` has it, and the commands that show it."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

# What the one who submits has in the environment, and what must not travel.
SECRETS = {"AWS_SECRET_ACCESS_KEY": secrets.token_hex(20), "HF_TOKEN": secrets.token_hex(20)}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home") / "auth_token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


@pytest.fixture(scope="module")
def head(start_ray_head: Any, token: Path) -> Iterator[tuple[str, Path]]:
    with start_ray_head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}) as head:
        yield head


def tokay(*arguments: str, home: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs the command as somebody whose home folder holds no token."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        env={**environment, **SECRETS, "HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_cluster_with_a_token_takes_jobs_from_those_who_show_it_alone(
    head: tuple[str, Path], token: Path, tmp_path: Path
) -> None:
    url, logs = head
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: laptop\nname: mine\n")
    submit = ["submit", str(recipe), "--address", url, "--storage", str(tmp_path / "run"), "--json"]
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    for variables in (
        {},
        {"RAY_AUTH_MODE": "token"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(other)},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")},
    ):
        refused = tokay(*submit, home=tmp_path, **variables)
        said = refused.stderr.strip()
        assert (refused.returncode, said.count("\n")) == (2, 0), said
        assert "RAY_AUTH_TOKEN_PATH" in said
        assert other.read_text() not in said

    shown = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    taken = tokay(*submit, home=tmp_path, **shown)
    assert taken.returncode == 0, taken.stderr
    listed = tokay("status", "--address", url, "--json", home=tmp_path, **shown)
    assert '"mine' in listed.stdout
    headers = {"Authorization": f"Bearer {token.read_text()}"}
    told = [taken.stdout, taken.stderr, listed.stdout, listed.stderr]
    told.append(httpx.get(f"{url}/api/jobs/", headers=headers).text)
    files = [file for file in logs.rglob("*") if file.is_file()]
    told += [file.read_bytes().decode(errors="replace") for file in files]
    assert any("recipe.yaml" in text for text in told)
    for secret in (token.read_text(), *SECRETS.values()):
        assert not any(secret in text for text in told)


def test_no_server_of_a_node_with_a_token_answers_without_it(head: tuple[str, Path]) -> None:
    """Of the node's agent above all, which runs jobs and listens on the node's address."""
    url, logs = head
    assert httpx.get(f"{url}/api/jobs/").status_code == 401
    assert httpx.post(f"{url}/api/jobs/", json={"entrypoint": "true"}).status_code == 401
    answers = {}
    for process in psutil.process_iter():
        try:
            named = str(logs) in " ".join(process.cmdline())
            listening = [c.laddr for c in process.net_connections("tcp") if c.status == "LISTEN"]
        except psutil.Error:
            continue
        for address in listening if named else []:
            try:
                answer = httpx.post(
                    f"http://127.0.0.1:{address.port}/api/job_agent/jobs/",
                    json={"entrypoint": "true"},
                    timeout=2,
                )
                answers[address.port] = answer.status_code
            except httpx.HTTPError:
                pass  # speaks gRPC
    assert 401 in answers.values()
    assert all(status in (401, 404, 405) for status in answers.values()), answers
