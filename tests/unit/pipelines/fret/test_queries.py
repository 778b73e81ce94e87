"""What becomes of what the LLM writes, with an LLM whose answers are known."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from actors.engine import EngineConfig, LlmConfig
from actors.language_model import Generation, LanguageModel
from cluster.stages import StageOutput, StageResources
from pipelines.fret.prompts import load_prompts
from pipelines.fret.queries import QueriesConfig, WriteQueries, query_prompts
from pipelines.records import SEED

ANSWERS = {"one": "how do bees dance", "two": "bees", "three": "where do bees live", "four": ""}


class Knows:
    """Writes the answer for the last word of a prompt's passage."""

    def control_tokens(self, text: str) -> list[str]:
        return []

    def truncate(self, text: str, max_tokens: int) -> str:
        return text

    async def generate(self, prompts: Sequence[str], **_: Any) -> list[Generation]:
        words = [prompt.rpartition("\n")[0].split()[-1] for prompt in prompts]
        return [Generation(text=ANSWERS[word]) for word in words]


def write(held_out: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> StageOutput:
    monkeypatch.setattr(LanguageModel, "load", lambda *_: Knows())
    config = QueriesConfig()
    stage = WriteQueries(
        config=config,
        prompts=query_prompts(config, load_prompts()),
        llm=LlmConfig(model="any"),
        engine=EngineConfig(),
        resources=StageResources(),
    )
    rows = [
        {"id": name, "title": "", "text": name, "source": "d#1", "held_out": name in held_out}
        for name in ANSWERS
    ]
    assert stage.columns == tuple(SEED.names)
    output = asyncio.run(stage.load()(pa.Table.from_pylist(rows, SEED)))
    assert isinstance(output, StageOutput)
    return output


def test_held_out_queries_are_kept_from_training_and_are_not_unusable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = write(["three", "four"], monkeypatch)
    dropped = {row["seed_id"]: row["dropped_by"] for row in output.rows.to_pylist()}
    assert dropped == {
        "one": None,
        "two": "query too short",
        "three": "held out for the gate",
        "four": "the LLM wrote nothing",  # of no use to the gate either
    }
    assert [reason for _, reason, _ in output.unusable] == [dropped["two"], dropped["four"]]
    assert (output.metrics["num_unusable"], output.metrics["num_held_out"]) == (2, 1)


def test_without_a_gate_no_query_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    output = write([], monkeypatch)
    assert output.rows["dropped_by"].to_pylist()[2] is None
    assert output.metrics["num_held_out"] == 0
