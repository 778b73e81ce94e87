"""Which language model a recipe means, and how its engine is started."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from actors.engine import EngineOptions


class LlmConfig(BaseModel):
    """The teacher. All of this changes what it writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="folder, hub id or embedded:NAME")
    dtype: Literal["auto", "float32", "float", "bfloat16", "float16", "half"] = "auto"
    max_model_tokens: int = Field(default=2048, ge=256)
    seed: int = 0
    trust_remote_code: bool = Field(
        default=False,
        description="run code that comes with it; --trust-remote-code must say it too",
    )


class EngineConfig(BaseModel):
    """vLLM's own settings; None is left to vLLM. See `actors.engine.EngineOptions`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enforce_eager: bool = False
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    kv_cache_gib: float | None = Field(default=None, gt=0)
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    block_size: int | None = Field(default=None, ge=1)


def engine_options(llm: LlmConfig, engine: EngineConfig) -> EngineOptions:
    """Returns both parts as the actor takes them."""
    return EngineOptions(**llm.model_dump(), **engine.model_dump())
