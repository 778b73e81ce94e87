"""vLLM's own `LLM` with Tokay's engine options: the rival of several benchmarks."""

import os
from typing import TYPE_CHECKING, Any

from actors.embedded import resolve_model
from actors.engine import EngineOptions

if TYPE_CHECKING:
    from vllm import LLM


def set_environment() -> None:
    """Gives vLLM both cores, and no compiler, as Tokay does."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0-1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def engine_arguments(options: EngineOptions) -> dict[str, Any]:
    """Returns the keyword arguments of `LLM` besides the model."""
    return {
        "dtype": options.dtype,
        "max_model_len": options.max_model_tokens,
        "enforce_eager": options.enforce_eager,
        "kv_cache_memory_bytes": int((options.kv_cache_gib or 0) * 2**30),
        "max_num_seqs": options.max_num_seqs or 96,
        "block_size": options.block_size,
    }


def bare_llm(options: EngineOptions, **more: Any) -> "LLM":
    """Starts an engine in this process."""
    set_environment()
    from vllm import LLM

    return LLM(model=resolve_model(options.model), **engine_arguments(options), **more)
