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
from actors.language_model import EngineOptions


class StampedVLLM(vLLM):  # type: ignore[misc]
    """Notes when the engine is up. Mends one call that vLLM 0.32 refuses."""

    stamp: str

    def load(self) -> None:
        set_environment()
        import vllm

        params = vllm.SamplingParams

        def without_processors(*, logits_processors: list[Any], **arguments: Any) -> Any:
            assert not logits_processors  # distilabel 1.5.3 gives an empty list
            return params(**arguments)

        vllm.SamplingParams = without_processors
        super().load()
        Path(self.stamp).write_text(str(time.time()))


def main() -> None:
    """Reads the job from stdin; the answers lie in the pipeline's Parquet files."""
    job = json.load(sys.stdin)
    folder = Path(job["folder"])
    with Pipeline(name="generate", cache_dir=folder) as pipeline:
        prompts = LoadDataFromDicts(
            data=[{"instruction": prompt} for prompt in job["prompts"]],
            batch_size=job["batch_size"],
        )
        write = TextGeneration(
            llm=StampedVLLM(
                model=resolve_model(job["engine"]["model"]),
                dtype="bfloat16",
                chat_template="{{ messages[-1]['content'] }}",  # the prompts as they are
                extra_kwargs=engine_arguments(EngineOptions(**job["engine"])) | {},
                generation_kwargs=job["generation"],
                stamp=str(folder / "engine-is-up"),
            ),
            input_batch_size=job["batch_size"],
        )
        prompts >> write
    rows = pipeline.run(use_cache=False)["default"]["train"]
    tokens = sum(
        sum(row["distilabel_metadata"]["statistics_text_generation_0"]["output_tokens"])
        for row in rows
    )
    written = folder.rglob("text_generation_0/*.parquet")
    result = {
        "seconds": max(file.stat().st_mtime for file in written)
        - float((folder / "engine-is-up").read_text()),
        "tokens": tokens,
        "rows": len(rows),
    }
    (folder / "result.json").write_text(json.dumps(result))
