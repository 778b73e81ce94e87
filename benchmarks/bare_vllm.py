"""vLLM's own `LLM` with Tokay's engine settings: the rival of several benchmarks."""

import os
from typing import TYPE_CHECKING, Any

from actors.embedded import resolve_model
from actors.engine import EngineConfig, LlmConfig

if TYPE_CHECKING:
    from vllm import LLM


def set_environment() -> None:
    """Gives vLLM both cores, and no compiler, as Tokay does."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0-1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def engine_arguments(llm: LlmConfig, config: EngineConfig) -> dict[str, Any]:
    """Returns the keyword arguments of `LLM` besides the model."""
    return {
        "dtype": llm.dtype,
        "max_model_len": llm.max_model_tokens,
        "enforce_eager": config.enforce_eager,
        "kv_cache_memory_bytes": int((config.kv_cache_gib or 0) * 2**30),
        "max_num_seqs": config.max_num_seqs or 96,
        "block_size": config.block_size,
    }


def bare_llm(llm: LlmConfig, config: EngineConfig, **more: Any) -> "LLM":
    """Starts an engine in this process."""
    set_environment()
    from vllm import LLM

    return LLM(model=resolve_model(llm.model), **engine_arguments(llm, config), **more)
