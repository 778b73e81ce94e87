"""distilabel's text generation over given prompts: the rival process of `generate_peer.py`.

Runs in a virtual environment of its own, with the vLLM that Tokay uses.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from bare_vllm import engine_arguments, set_environment
from distilabel.models import vLLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration

from actors.embedded import resolve_model
from actors.engine import EngineConfig, LlmConfig
from cluster.plain_json import dump_json


class StampedVLLM(vLLM):  # type: ignore[misc]
    """Notes when the engine is up. Adapts two calls that vLLM 0.32 no longer accepts."""

    stamp: str

    def load(self) -> None:
        set_environment()
        super().load()
        import vllm

        params = vllm.SamplingParams

        def without_processors(*, logits_processors: list[Any], **arguments: Any) -> Any:
            assert not logits_processors  # distilabel 1.5.3 gives an empty list
            return params(**arguments)

        vllm.SamplingParams = without_processors
        Path(self.stamp).write_text(str(time.time()), encoding="utf-8")

    def prepare_input(self, input: Any) -> str:
        """Gives the prompt as it is: a document to be continued, not a chat."""
        return str(input[-1]["content"])

    def unload(self) -> None:
        """Ends the engine; distilabel's own way uses what no longer exists."""
        self._model.llm_engine.engine_core.shutdown()


def main() -> None:
    """Reads the job from stdin; the answers are in the pipeline's Parquet files."""
    job = json.load(sys.stdin)
    folder = Path(job["folder"])
    extra = engine_arguments(LlmConfig(**job["llm"]), EngineConfig(**job["engine"]))
    dtype = extra.pop("dtype")
    with Pipeline(name="generate", cache_dir=folder) as pipeline:
        prompts = LoadDataFromDicts(
            data=[{"instruction": prompt} for prompt in job["prompts"]],
            batch_size=job["batch_size"],
        )
        write = TextGeneration(
            llm=StampedVLLM(
                model=resolve_model(job["llm"]["model"]),
                dtype=dtype,
                extra_kwargs=extra,
                disable_cuda_device_placement=True,  # there is none
                generation_kwargs=job["generation"],
                stamp=str(folder / "engine-is-up"),
            ),
            input_batch_size=job["batch_size"],
        )
        prompts >> write
    rows = pipeline.run(use_cache=False)["default"]["train"]
    statistics = (row["distilabel_metadata"]["statistics_text_generation_0"] for row in rows)
    tokens = sum(row["output_tokens"] for row in statistics)
    written = folder.rglob("text_generation_0/*.parquet")
    result = {
        "seconds": max(file.stat().st_mtime for file in written)
        - float((folder / "engine-is-up").read_text(encoding="utf-8")),
        "tokens": tokens,
        "rows": len(rows),
    }
    (folder / "result.json").write_text(dump_json(result), encoding="utf-8")
