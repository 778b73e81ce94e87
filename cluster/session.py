"""The Ray session: where this process finds or starts a cluster, and where its chatter goes."""

import contextlib
import io
import logging
import os
import secrets
import socket
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError

MIN_OBJECT_STORE_BYTES = 256 * 1024**2


@dataclass(frozen=True, kw_only=True)
class ClusterResources:
    """What the cluster has in all."""

    num_nodes: int
    num_cpus: int
    num_gpus: int


def connect(log_folder: Path | None = None) -> ClusterResources:
    """Joins the cluster of RAY_ADDRESS, or starts Ray on this machine; a second call only reports.

    Workers' output goes to Ray's own log files, so that the console stays the user's.

    Args:
        log_folder: Where Ray's own warnings of this process go; discarded if None.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, or Ray's files on this machine
            cannot be kept from other users.
    """
    # Processes that asked for no GPU see none: each would keep half a gigabyte of the first.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2", "1")
    if not os.environ.get("RAY_ADDRESS"):
        # A Ray of our own then listens on loopback, as on macOS; elsewhere on every interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        silence(log_folder)
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                _keep_token_private()
                ray.init(
                    num_cpus=os.cpu_count(),
                    object_store_memory=MIN_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=_private_temporary_folder(),
                )
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={address!r}: correct it, or unset it to"
                " run on this machine; one that asks for a token wants RAY_AUTH_MODE=token and its"
                " ~/.ray/auth_token here"
            ) from error
        _configure_ray_data()
        silence(log_folder)
    resources = ray.cluster_resources()
    return ClusterResources(
        num_nodes=sum(node["Alive"] for node in ray.nodes()),
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
    )


def disconnect() -> None:
    """Leaves the cluster; Ray that `connect` started on this machine ends."""
    import ray

    ray.shutdown()


def silence(log_folder: Path | None) -> None:
    """Sends this process's library logging, warnings and native stderr to `log_folder`/driver.log.

    `sys.stderr` itself stays the user's console.
    """
    handler: logging.Handler = logging.NullHandler()
    if log_folder is not None:
        log_folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_folder / "driver.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        if not getattr(sys.stderr, "diverted", False):
            console = _Console(os.dup(2))
            os.dup2(os.open(log_folder / "native.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = console
    logging.captureWarnings(True)
    names = ("", "ray", "ray.data", "ray.train", "ray.serve", "vllm", "mteb", "py.warnings")
    for name in (*names, "transformers", "sentence_transformers", "datasets", "huggingface_hub"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False


class _Console(io.TextIOWrapper):
    """The user's stderr, after libraries that write to descriptor 2 were sent elsewhere."""

    diverted = True

    def __init__(self, descriptor: int) -> None:
        super().__init__(open(descriptor, "wb", buffering=0), write_through=True)  # noqa: SIM115


def _configure_ray_data() -> None:
    from ray.data import DataContext
    from ray.data.context import ShuffleStrategy

    context = DataContext.get_current()
    # Made of tasks, which run again after a lost node; the default's aggregator actors do not.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Else a step fails that waits half an hour for nodes, or for the first shard of a large model.
    context.execution_no_progress_timeout_s = -1


_MAX_SOCKET_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def _private_temporary_folder() -> str:
    """Returns a folder for Ray that only this user can reach, and short enough for its sockets.

    Ray opens its own folder to everybody at each start, so it is the folder around it that keeps
    others out.

    Raises:
        UserError: Something that is not this user's alone has that folder's place.
    """
    name = Path(f"tokay-{os.getuid()}", "ray")
    folder = Path(tempfile.gettempdir()) / name
    if len(str(folder)) > _MAX_SOCKET_FOLDER:
        folder = Path("/tmp") / name
    parent = folder.parent
    with contextlib.suppress(FileExistsError):
        parent.mkdir(mode=0o700)
    status = parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(
            f"{parent} is not a folder of yours alone (mode 700), as Ray's files need: move it"
            " away, or set TMPDIR to another folder"
        )
    return str(folder)


def _keep_token_private() -> None:
    """Makes the token of a Ray on this machine readable by its owner alone; Ray would not.

    Raises:
        UserError: The home folder cannot be written to.
    """
    elsewhere = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or elsewhere:
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"cannot write Ray's token to {path}: {error.strerror}; make it writable, or set"
            " RAY_AUTH_TOKEN_PATH to a file that holds one"
        ) from error


def free_port() -> int:
    """Returns a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
