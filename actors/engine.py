"""Starting vLLM's engine, and saying in one line why it did not start or why it died.

vLLM's own processes explain themselves on their standard error, and what their parent raises only
points there. So that output goes to a file of its own, and the sentence that matters is read there.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from actors.embedded import resolve_model
from cluster.config import Config
from cluster.errors import TokayError, UserError

_LOG_BYTES = 2**18  # of the log's end are read
_MESSAGE_LENGTH = 240
# What a process says when another one knows why.
_NO_REASON = re.compile(r"root cause|stack trace|EngineDeadError|Engine core proc")
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception): (.+)")
_MEMORY = re.compile(
    r"out of memory|memory on (?:device|node)|memory for the cache", flags=re.IGNORECASE
)
_LESS_MEMORY = (
    "; lower resources.engine.gpu_memory_utilization, max_num_seqs or max_num_batched_tokens,"
    " or take a smaller model"
)


class LlmConfig(Config):
    """The teacher. All of this changes what it writes."""

    model: str = Field(description="folder, hub id or embedded:NAME")
    dtype: Literal["auto", "float32", "float", "bfloat16", "float16", "half"] = Field(
        default="auto", description="of weights and activations"
    )
    max_model_tokens: int = Field(
        default=2048, ge=256, description="longest prompt and answer together"
    )
    seed: int = Field(default=0, description="of the engine, for requests that bring none")
    trust_remote_code: bool = Field(
        default=False,
        description="run code that comes with it; --trust-remote-code must say it too",
    )


class EngineConfig(Config):
    """vLLM's own settings; None is left to vLLM."""

    enforce_eager: bool = Field(
        default=False, description="do not compile: starts a minute sooner, runs slower"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="share of the GPU's memory that vLLM may take"
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="GPUs, or groups of CPU cores, that share one copy of the LLM"
    )
    kv_cache_gib: float | None = Field(
        default=None, gt=0, description="of the KV cache; on a CPU vLLM has no sensible default"
    )
    max_num_seqs: int | None = Field(
        default=None, ge=1, description="most requests in one engine step"
    )
    max_num_batched_tokens: int | None = Field(
        default=None, ge=1, description="most tokens in one engine step"
    )
    block_size: int | None = Field(
        default=None,
        ge=1,
        description="tokens in a block of the KV cache, a multiple of 32 on a CPU; prefixes are"
        " shared in whole blocks",
    )


class EngineLog:
    """What the engine's processes print.

    Attributes:
        path: The file, which only this user can read.
    """

    def __init__(self) -> None:
        handle, path = tempfile.mkstemp(prefix="tokay-vllm-", suffix=".log", dir=_log_folder())
        os.close(handle)
        self.path = Path(path)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Sends this process's output to the file; a process begun inside keeps writing there."""
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.dup2(file, 1)
            os.dup2(file, 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.close(file)

    def reason(self) -> str:
        """Returns the error that the engine's processes printed last, one about memory first."""
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - _LOG_BYTES))
            messages = _ERROR.findall(file.read().decode(errors="replace"))
        reasons = [line for line in messages if not _NO_REASON.search(line)]
        memory = [line for line in reasons if _MEMORY.search(line)]
        if memory:
            return f"{_first_sentences(memory[0])}{_LESS_MEMORY}"
        return _first_sentences(reasons[-1]) if reasons else "it gave no reason"

    def where(self) -> str:
        """Returns the file's machine and path."""
        return f"{socket.gethostname()}:{self.path}"

    def delete(self) -> None:
        """Deletes the file, which is no longer needed."""
        self.path.unlink(missing_ok=True)


def _log_folder() -> Path | None:
    """Returns where Ray keeps this worker's own output, if it is one: they belong together."""
    with suppress(OSError):
        own = Path("/proc/self/fd/2").readlink()
        if own.is_file() and own.parent.name == "logs" and os.access(own.parent, os.W_OK):
            return own.parent
    return None


def start_engine(llm: LlmConfig, config: EngineConfig) -> tuple[Any, EngineLog]:
    """Starts vLLM's asynchronous engine, in its own processes (half a minute to some minutes).

    Raises:
        UserError: The model does not exist, or vLLM refuses an option.
        TokayError: The engine does not start.
    """
    model = resolve_model(llm.model)
    _set_environment(config)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    options: dict[str, Any] = config.model_dump(exclude={"kv_cache_gib"}, exclude_none=True)
    if current_platform.is_cpu():
        # A seeded request whose prefill is cut in two kills the CPU engine
        # ("CPU Generator does not use offset"), so there every prefill runs whole.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(
            config.max_num_batched_tokens or 0, llm.max_model_tokens
        )
    if config.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    log = EngineLog()
    try:
        with log.capture():
            arguments = AsyncEngineArgs(
                model=model,
                max_model_len=llm.max_model_tokens,
                dtype=llm.dtype,
                seed=llm.seed,
                trust_remote_code=llm.trust_remote_code,
                enable_prefix_caching=True,
                disable_log_stats=True,
                **options,
            )
            # The defaults of an engine's steps are those of offline work: 16,384 tokens and 1,024
            # sequences on an H100, where AsyncLLM alone would take 2,048 and 128.
            engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
    except ValueError as error:  # vLLM's word for options that do not fit the model
        log.delete()
        raise UserError(f"vLLM refuses model {llm.model!r}: {_refusal(error)}") from error
    except Exception as error:
        raise TokayError(
            f"vLLM did not start with model {llm.model!r}: {log.reason()} (its log: {log.where()})"
        ) from error
    return engine, log


def _refusal(error: ValueError) -> str:
    """Returns the sentences that say what was wrong; pydantic's message ends with an address."""
    if isinstance(error, ValidationError):
        mistake = error.errors()[0]
        key = ".".join(str(part) for part in mistake["loc"])
        message = mistake["msg"].removeprefix("Value error, ")
        return _first_sentences(f"{key}: {message}" if key else message)
    return _first_sentences(str(error))


def _first_sentences(text: str) -> str:
    """Returns the first sentence, and as many more as a short line holds."""
    first, *more = " ".join(text.split()).rstrip(".").split(". ")
    for sentence in more:
        if len(first) + len(sentence) > _MESSAGE_LENGTH:
            break
        first = f"{first}. {sentence}"
    return first


def _set_environment(config: EngineConfig) -> None:
    """Sets what vLLM takes from the environment only; what the user has set stays."""
    from vllm.platforms import current_platform

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A fork of a process that has only asked whether there is a GPU cannot use it.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if not current_platform.is_cpu():
        return
    cores = sorted(os.sched_getaffinity(0))
    size = config.tensor_parallel_size
    groups = [",".join(map(str, cores[rank::size])) for rank in range(size)]
    # vLLM's own choice leaves one core of two idle.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(groups))
    # One order of summation, however many requests share a step: the same numbers every time.
    os.environ.setdefault("VLLM_CPU_ATTN_SPLIT_KV", "0")
    if config.enforce_eager:
        # Eager vLLM still compiles a helper of prompt log-probabilities: 20 s, and a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
