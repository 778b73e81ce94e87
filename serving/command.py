"""`tokay serve`: from a model's name to an endpoint that answers, and back to a clean machine."""

import contextlib
import errno
import hashlib
import ipaddress
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from actors.embedded import PREFIX, resolve_model
from cluster.artifacts import Artifact
from cluster.errors import UserError, excerpt
from cluster.ray_errors import reported_error
from cluster.storage import join, open_storage
from serving.app import ServeOptions
from serving.protocol import RequestLimits

_READY = """\
{name} ({what}) answers at {url}   (Ctrl-C stops it)
  console  {url}/
  curl     curl {url}/v1/embeddings -H 'content-type: application/json'{header} \\
             -d '{{"model": "{name}", "input": "a text"}}'
  python   openai.OpenAI(base_url="{url}/v1", api_key={key}) \\
             .embeddings.create(model="{name}", input="a text")"""
_KEY = "TOKAY_API_KEY"
_KEY_CHARACTERS = 16
_LIMITS = RequestLimits()


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a MODEL argument names."""

    model: str
    name: str
    index: str | None = None


def serve(
    model: Annotated[
        str, typer.Argument(help="A run's folder, a model folder, a hub id, or embedded:NAME")
    ],
    corpus: Annotated[
        str | None,
        typer.Option(help="Search over this JSONL, Parquet or folder, not the run's index"),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to the network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    cpus: Annotated[
        int, typer.Option(min=0, help="Cores of each replica; 0: an equal share of them all")
    ] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each replica")] = 0,
    name: Annotated[str | None, typer.Option(help="What requests call the model")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which requests may address this server; may be repeated"),
    ] = None,
    allow_token_ids: Annotated[
        bool, typer.Option("--allow-token-ids", help="Take token ids of this model's own tokenizer")
    ] = False,
    max_request_bytes: Annotated[
        int, typer.Option(min=1024, help="Bytes of a request's body")
    ] = _LIMITS.max_bytes,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts in a request")] = _LIMITS.max_texts,
    max_characters: Annotated[
        int, typer.Option(min=1, help="Characters of a request's texts, in the model's template")
    ] = _LIMITS.max_characters,
) -> None:
    """Serves a model through OpenAI's embeddings API, with search over a corpus and a console.

    With TOKAY_API_KEY in the environment, requests must send that key.
    """
    key_sha256 = hash_key(os.environ.get(_KEY))
    hosts = find_hosts(host, allowed_host or [])
    served = find_model(model)
    corpus = corpus or served.index
    if corpus:
        from serving.corpus import check_corpus

        if warning := check_corpus(corpus):
            typer.echo(f"warning: {warning}", err=True)
    check_port(host, port)
    from cluster.session import connect

    # Ray lowers its workers' priority by 15, which suits jobs; a server answers people.
    os.environ.setdefault("RAY_worker_niceness", "0")
    resources = connect()
    options = ServeOptions(
        model=served.model,
        name=name or served.name,
        corpus=corpus,
        replicas=replicas,
        cpus_per_replica=cpus or max(1, resources.num_cpus // replicas),
        gpus_per_replica=gpus,
        trust_remote_code=trust_remote_code,
        max_request_bytes=max_request_bytes,
        max_texts=max_texts,
        max_characters=max_characters,
        allow_token_ids=allow_token_ids,
        allowed_hosts=hosts,
        api_key_sha256=key_sha256,
    )
    check_cluster(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        start(options, host=host, port=port)
        shown = f"[{host}]" if ":" in host else host
        typer.echo(
            _READY.format(
                name=options.name,
                what="embeddings and search" if corpus else "embeddings",
                url=f"http://{shown}:{port}",
                header=f' -H "authorization: Bearer ${_KEY}"' if key_sha256 else "",
                key=f'os.environ["{_KEY}"]' if key_sha256 else '"-"',
            )
        )
        if warning := network_warning(host, key_sha256):
            typer.echo(warning, err=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        typer.echo("stopping")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        stop()


def find_model(model: str) -> Served:
    """Finds the model folder, its name and a run's index.

    Raises:
        UserError: No such model, or a run that has not exported one yet.
    """
    remote = model.startswith("s3://")
    if Path(model, "export").is_dir() or (remote and _artifact(model, "export")):
        return _find_in_run(model)
    resolved = resolve_model(model)
    if remote:  # every node fetches its own
        return Served(model=model, name=model.rstrip("/").rpartition("/")[2])
    if model.startswith(PREFIX):
        return Served(model=resolved, name=model.removeprefix(PREFIX))
    folder = Path(resolved)
    if not folder.is_dir():
        return Served(model=resolved, name=resolved)
    folder = folder.resolve()
    # RUN/export/model is better known by the run's name.
    in_run = folder.parts[-2:] == ("export", "model")
    return Served(model=str(folder), name=folder.parts[-3] if in_run else folder.name)


def is_loopback(host: str) -> bool:
    """Says whether only this machine can reach a server that listens there."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


def network_warning(host: str, key_sha256: str | None) -> str | None:
    """Says what an operator who opens a server to the network should know."""
    if is_loopback(host):
        return None
    keyless = f", and anybody may use it: set {_KEY} to a key that requests must send"
    return (
        "warning: the network reaches this server, without encryption (no TLS)"
        f"{'' if key_sha256 else keyless}"
    )


def find_hosts(host: str, allowed: Sequence[str]) -> frozenset[str] | None:
    """Returns the names by which requests may address the server; None where any will do.

    A page that is opened on this machine may make its own name lead to a server on loopback, and
    would then read its answers; so only names of loopback pass there, and those that are allowed.

    Raises:
        UserError: A name is malformed.
    """
    for name in allowed:
        if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:]+", name):
            raise UserError(
                f"--allowed-host {excerpt(name, 80)!r}: give a name or an address alone, such as"
                " search.example.org, without scheme and port"
            )
    if not allowed and not is_loopback(host):
        return None
    return frozenset({host.lower(), *(name.lower() for name in allowed)})


def hash_key(key: str | None) -> str | None:
    """Returns the SHA-256 of an API key, in hex.

    Raises:
        UserError: It is too short, or cannot be sent in a header.
    """
    if key is None:
        return None
    if len(key) < _KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{_KEY} must be {_KEY_CHARACTERS} or more ASCII letters, digits and symbols: make one"
            " with `openssl rand -hex 32`, or unset it to serve without a key"
        )
    return hashlib.sha256(key.encode()).hexdigest()


def check_port(host: str, port: int) -> None:
    """Raises UserError if a server cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the server does: a port whose old connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"port {port} of {host} is in use: give another with --port"
            else:
                message = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise UserError(message) from error


def check_cluster(options: ServeOptions) -> None:
    """Raises UserError if the connected Ray serves something already, or is too small."""
    import ray
    from ray import serve as ray_serve

    if ray_serve.status().proxies:
        raise UserError(
            "this Ray cluster runs Ray Serve already: deploy there with `serve deploy` and"
            " serving/serve.yaml, or unset RAY_ADDRESS to serve from this machine"
        )
    total = ray.cluster_resources()
    for resource, each in (("CPU", options.cpus_per_replica), ("GPU", options.gpus_per_replica)):
        has = total.get(resource, 0)
        if each * options.replicas > has:
            raise UserError(
                f"{options.replicas} replicas of {each:g} {resource} need more than Ray's {has:g}:"
                f" lower --replicas or --{resource.lower()}s"
            )


def start(options: ServeOptions, *, host: str, port: int) -> None:
    """Runs the application on the connected Ray cluster; returns when it answers.

    Raises:
        TokayError: The replicas could not start; or the error of ours that one of them raised.
    """
    from ray import serve as ray_serve

    from cluster.session import silence
    from serving.app import build

    silence(None)  # importing Serve gave its logger a console handler again
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config={"enable_access_log": False},
    )
    try:
        ray_serve.run(build(options), name="tokay", route_prefix="/")
    except RuntimeError as error:
        application = ray_serve.status().applications["tokay"]
        report = [application.message, *(each.message for each in application.deployments.values())]
        raise reported_error("\n".join(report), "the server did not start") from error


def stop() -> None:
    """Lets running requests finish, then takes down what `start` and `connect` put up."""
    import ray
    from ray import serve as ray_serve
    from ray.serve.exceptions import RayServeException

    with contextlib.suppress(RayServeException):  # stopped before Serve was up
        ray_serve.delete("tokay")
    if os.environ.get("RAY_ADDRESS"):
        ray_serve.shutdown()
    ray.shutdown()


def _artifact(run: str, step: str) -> Artifact | None:
    return Artifact.open(open_storage(join(run, step)))


def _find_in_run(run: str) -> Served:
    if _artifact(run, "export") is None:
        raise UserError(
            f"run {run!r} has no finished export: let `tokay run` finish, or give a model folder"
        )
    return Served(
        model=join(run, "export", "model"),
        name=run.rstrip("/").rpartition("/")[2],
        index=join(run, "index") if _artifact(run, "index") else None,
    )
