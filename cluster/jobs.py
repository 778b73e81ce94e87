"""Runs of a recipe on a distant cluster, through Ray's job server.

Submitting, watching and stopping need nothing of Ray's internals on this machine, only HTTP to the
dashboard. What travels is the recipe; the code is installed on the nodes, or shipped on demand.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from cluster.errors import TokayError, UserError, excerpt
from cluster.storage import open_storage

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

_CODE = ("actors", "cluster", "pipelines", "serving")
_CONNECT_TIMEOUT_S = 10.0
# Characters that are taken of what a cluster says; it may be anybody's.
MAX_LABEL = 300
MAX_MESSAGE = 1000
_FINISHED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job as the cluster reports it.

    `status` is one of PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED. `recipe` and `storage` are
    empty for a job that something else submitted; `exit_code` is None until the command has ended.
    """

    id: str
    status: str
    recipe: str
    storage: str
    message: str
    exit_code: int | None
    started: datetime | None
    ended: datetime | None

    @property
    def finished(self) -> bool:
        """Whether the job will never run again."""
        return self.status in _FINISHED


def submit(
    recipe: str,
    *,
    name: str,
    address: str,
    storage: str,
    flags: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    submission_id: str | None = None,
    ship_code: bool = False,
) -> str:
    """Runs a recipe on a cluster, as `tokay run` would there.

    Args:
        recipe: The recipe's YAML, whole: files that it is based on do not travel.
        name: What the recipe is called in the list of jobs.
        address: The dashboard, `http://HEAD:8265`.
        storage: Where the run goes: an S3 URI, or a folder if the whole cluster is this machine.
        flags: More of `tokay run`'s. They are shown in the dashboard: no secrets.
        files: What else stands in the folder where the recipe runs, name to content.
        submission_id: A name for the job; Ray makes one up otherwise.
        ship_code: Run this checkout's packages instead of those installed on the nodes.

    Returns:
        The job's id.

    Raises:
        UserError: A storage that the cluster cannot reach, no cluster at the address, an id that is
            malformed or taken.
    """
    storage = _reachable_storage(storage, address)
    command = ["python", "-m", "pipelines.cli", "run", "recipe.yaml", "--storage", storage]
    command += flags
    return submit_command(
        command,
        address=address,
        files={"recipe.yaml": recipe, **(files or {})},
        labels={"recipe": name, "storage": storage},
        submission_id=submission_id,
        ship_code=ship_code,
    )


def submit_command(
    command: Sequence[str],
    *,
    address: str,
    files: Mapping[str, str],
    labels: Mapping[str, str] | None = None,
    submission_id: str | None = None,
    ship_code: bool = False,
) -> str:
    """Runs a command on the head node, in a folder that holds `files` (name to content).

    Raises:
        UserError: No cluster at the address, an id that is malformed or taken.
    """
    if submission_id is not None and not re.fullmatch(
        r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", submission_id
    ):
        raise UserError(
            f"submission id {submission_id!r}: accepted are up to 128 letters, digits, '-', '_' "
            "and '.', the first a letter or digit"
        )
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="tokay-job-") as folder:
        for name, content in files.items():
            Path(folder, name).write_text(content, encoding="utf-8")
        runtime_env: dict[str, object] = {"working_dir": folder}
        if ship_code:
            root = Path(__file__).parents[1]
            runtime_env["py_modules"] = [str(root / package) for package in _CODE]
            runtime_env["excludes"] = ["**/__pycache__"]
        with _server_errors(address, submission_id or ""):
            job_id = client.submit_job(
                entrypoint=shlex.join(command),
                runtime_env=runtime_env,
                metadata=dict(labels or {}),
                submission_id=submission_id,
            )
    return excerpt(str(job_id), MAX_LABEL)


def status(address: str, job_id: str | None = None) -> list[JobState]:
    """Returns one job, or all submitted jobs that the cluster remembers, the newest first.

    Raises:
        UserError: No cluster at the address, or no such job.
    """
    client = _connect(address)
    if job_id is not None:
        return [_state(_details(client, address, job_id))]
    with _server_errors(address, ""):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    return [_state(job) for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)]


def logs(address: str, job_id: str, *, follow: bool = False) -> Iterator[str]:
    """Returns what the job has printed, in pieces of any length.

    With `follow`, waits for more until the job ends.

    Raises:
        UserError: No cluster at the address, or no such job (at once, not at the first piece).
        TokayError: The connection broke while following; the job itself goes on.
    """
    client = _connect(address)
    _details(client, address, job_id)
    if follow:
        return _follow(client, address, job_id)
    with _server_errors(address, job_id):
        return iter([client.get_job_logs(job_id)])


def stop(address: str, job_id: str) -> bool:
    """Asks a job to end, and returns at once; False if it had already ended.

    Raises:
        UserError: No cluster at the address, or no such job.
    """
    client = _connect(address)
    with _server_errors(address, job_id):
        return bool(client.stop_job(job_id))


def _reachable_storage(storage: str, address: str) -> str:
    parts = urlsplit(storage)
    if parts.username or parts.password:
        raise UserError(
            "the storage URI holds credentials, which the dashboard would show: "
            "give the nodes an instance profile instead"
        )
    uri = open_storage(storage).uri
    if parts.scheme in ("", "file") and not _is_this_machine(_connect(address)):
        raise UserError(
            f"storage {storage!r} is a folder of this machine, and the cluster at {address} runs "
            "elsewhere: give an s3://BUCKET/PREFIX that its nodes can write"
        )
    return uri


def _is_this_machine(client: "JobSubmissionClient") -> bool:
    """Whether every node is this host. A loopback address proves nothing: it may be a tunnel."""
    # Ray's own request, for its token: a cluster may answer nothing without one.
    answer = client._do_request("GET", "/nodes?view=hostNameList")
    try:
        return set(answer.json()["data"]["hostNameList"]) == {socket.gethostname()}
    except (ValueError, KeyError, TypeError):
        return False


def _connect(address: str) -> "JobSubmissionClient":
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"address {address!r}: accepted is the cluster's dashboard, http://HEAD:8265"
        )
    try:
        # Ray's client has no timeout of its own: a wrong host would hang for minutes.
        httpx.get(f"{address.rstrip('/')}/api/version", timeout=_CONNECT_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise UserError(
            f"no cluster answers at {address} ({error}): is it up, and its dashboard forwarded?"
        ) from error

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for chatty in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{chatty}").setLevel(logging.WARNING)
    try:
        with _no_address_in_environment():
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"the cluster at {address} wants its token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to a file that holds it unless that is ~/.ray/auth_token"
        ) from error
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"what answers at {address} is not a Ray dashboard") from error


@contextlib.contextmanager
def _no_address_in_environment() -> Iterator[None]:
    """Hides the variables that Ray lets override an address that was given."""
    hidden = {
        name: os.environ.pop(name)
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        if name in os.environ
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _server_errors(address: str, job_id: str) -> Iterator[None]:
    """Turns the job server's answers, which Ray passes on as text alone, into one line."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "status code 404" in text:
            raise UserError(f"no job {job_id!r} on {address}: `tokay status` lists them") from error
        if "already exists" in text:
            raise UserError(
                f"submission id {job_id!r} is taken on {address}: choose another"
            ) from error
        last_line = (text.strip().rstrip(".") or "it did not say why").splitlines()[-1]
        raise TokayError(
            f"the job server at {address} refused: {excerpt(last_line, MAX_MESSAGE)}"
        ) from error
    except OSError as error:
        raise TokayError(f"the connection to {address} broke: {error}") from error


def _details(client: "JobSubmissionClient", address: str, job_id: str) -> "JobDetails":
    with _server_errors(address, job_id):
        return client.get_job_info(job_id)


def _state(job: "JobDetails") -> JobState:
    labels = job.metadata or {}
    return JobState(
        id=excerpt(job.submission_id or job.job_id or "", MAX_LABEL),
        status=job.status.value,
        recipe=excerpt(str(labels.get("recipe", "")), MAX_LABEL),
        storage=excerpt(str(labels.get("storage", "")), MAX_LABEL),
        message=excerpt(job.message or "", MAX_MESSAGE),
        exit_code=job.driver_exit_code,
        started=_time(job.start_time),
        ended=_time(job.end_time),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _follow(client: "JobSubmissionClient", address: str, job_id: str) -> Iterator[str]:
    import aiohttp

    pieces = client.tail_job_logs(job_id)

    async def next_piece() -> str | None:
        return await anext(pieces, None)

    with asyncio.Runner() as runner, _server_errors(address, job_id):
        try:
            while (piece := runner.run(next_piece())) is not None:
                yield piece
        except aiohttp.ClientError as error:
            raise TokayError(f"the connection to {address} broke: {error}") from error
