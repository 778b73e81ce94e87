"""What is asked of the LLM for each pair, and what comes of the answers."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from actors.language_model import LanguageModel
from actors.pair_scores import PairScore, ScoringPrompt
from cluster.stages import StageOutput
from pipelines.fret.fusion import LLM_JUDGES
from pipelines.fret.prompts import QueryPrompts, load_prompts
from pipelines.fret.queries import step as queries_step
from pipelines.fret.scores import ScorePairs, pair_prompts, scoring_config
from pipelines.fret.scores import step as scores_step
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.records import PAIRS

TASKS = ("question answering", "fact checking", "a task of the LLM's own")
PASSAGES = [
    {
        "passage_id": "p",
        "title": "Bees",
        "text": "They dance.",
        "query_ids": ["0", "1", "2"],
        "queries": ["how do they talk", "Bees talk.", "too long"],
        "tasks": list(TASKS),
    },
    {
        "passage_id": "q",
        "title": "",
        "text": "Moss has no roots.",
        "query_ids": ["1"],
        "queries": ["Bees talk."],
        "tasks": [TASKS[1]],
    },
]


class Llm:
    """Scores a prompt by its length, and keeps what it was asked."""

    score_tolerance = 0.1

    def __init__(self) -> None:
        self.asked: list[ScoringPrompt] = []

    def truncate(self, text: str, max_tokens: int) -> str:
        return text

    def control_tokens(self, text: str) -> list[str]:
        return []

    async def score(
        self, pairs: Sequence[ScoringPrompt], *, separate: bool = False
    ) -> list[PairScore]:
        self.asked = list(pairs)
        return [
            PairScore(error="it is", num_prompt_tokens=1)
            if pair.query == " too long" and pair.labels
            else PairScore(
                ql=-float(len(pair.context)) if pair.likelihood else None,
                rc=-float(len(pair.question)) if pair.labels else None,
                num_prompt_tokens=10,
            )
            for pair in pairs
        ]


def recipe(*settings: str) -> Recipe:
    return load_recipe("laptop", [*settings])


def scored(
    monkeypatch: pytest.MonkeyPatch, judges: tuple[str, ...], *settings: str
) -> tuple[Llm, StageOutput]:
    llm, read = Llm(), recipe(*settings)
    monkeypatch.setattr(LanguageModel, "load", lambda *_: llm)
    stage = ScorePairs(
        config=read.scores,
        prompts=pair_prompts(read, judges),
        llm=read.llm,
        engine=read.resources.engine,
        resources=read.resources.llm,
    )
    output: Any = stage.load()(pa.Table.from_pylist(PASSAGES, schema=PAIRS))
    return llm, asyncio.run(output)


def test_each_query_is_asked_about_in_the_words_of_its_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm, output = scored(monkeypatch, LLM_JUDGES)
    cues = [prompt.context.rpartition("\n")[2] for prompt in llm.asked]
    assert cues == ["Question:", "Claim:", "Query:", "Claim:"]
    rows = output.rows.to_pylist()
    assert [row["query_ids"] for row in rows] == [["0", "1", "2"], ["1"]]
    assert rows[0]["errors"] == [None, None, "it is"]
    assert [id_ for id_, *_ in output.unusable] == ["query 2 with passage p"]
    assert rows[1]["relevances"] == [-float(len(llm.asked[3].question))]
    assert output.metrics["num_pairs"] == 4 and output.metrics["num_prompt_tokens"] == 31


def test_ql_with_examples_of_its_own_is_asked_beside_rc(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, output = scored(monkeypatch, LLM_JUDGES, "scores.ql_examples=positive")
    assert [prompt.likelihood for prompt in llm.asked] == [True, False] * 4
    written = QueryPrompts(prompts=load_prompts(), tasks=TASKS)
    assert llm.asked[0].context == written.render(TASKS[0], "Bees", "They dance.")
    assert llm.asked[2].context == written.render(TASKS[1], "Bees", "They dance.")
    (row, _) = output.rows.to_pylist()
    assert row["query_likelihoods"] == [
        -len(llm.asked[0].context),
        -len(llm.asked[2].context),
        None,
    ]
    assert row["relevances"] == [-len(llm.asked[1].question), -len(llm.asked[3].question), None]
    assert output.metrics["num_pairs"] == 4 and output.metrics["num_prompt_tokens"] == 71


@pytest.mark.parametrize(("judge", "other"), [("ql", "relevances"), ("rc", "query_likelihoods")])
def test_only_the_judge_that_is_wanted_is_asked(
    judge: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, output = scored(monkeypatch, (judge,), "scores.ql_examples=positive")
    assert [prompt.likelihood for prompt in llm.asked] == [judge == "ql"] * 4
    assert output.rows[other].to_pylist() == [[None] * 3, [None]]


@pytest.mark.parametrize(
    ("fusion", "judges"),
    [("ql+rc", LLM_JUDGES), ("sim+ql", ("ql",)), ("rc", ("rc",)), ("auto", LLM_JUDGES)],
)
def test_fusion_says_who_is_asked(fusion: str, judges: tuple[str, ...]) -> None:
    set_ = f"fret.fusion={fusion}"
    assert recipe(set_).fret.llm_judges == judges
    apart = scores_step(recipe(set_, "scores.ql_examples=positive")).config
    assert apart["judges"] == list(judges)
    # Of one prompt both come out, so that another fusion does not have them scored again.
    assert scores_step(recipe(set_)).config == scores_step(recipe()).config


def test_what_pairs_are_shown_is_in_the_fingerprint_of_scores_alone(tmp_path: Path) -> None:
    def configs(change: dict[str, Any]) -> tuple[Any, Any]:
        tree = load_prompts().model_dump(mode="json")
        tree["tasks"][TASKS[0]] |= change
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
        load_prompts.cache_clear()
        read = recipe(f"prompts={tmp_path}/mine.yaml")
        return scoring_config(read), queries_step(read).config

    before = configs({})
    judged = load_prompts().model_dump(mode="json")["tasks"][TASKS[0]]["judged"]
    other = judged | {"questions": judged["questions"] | {"yes-no": "Is it so?"}}
    assert [a == b for a, b in zip(before, configs({"judged": other}), strict=True)] == [
        False,
        True,
    ]
    assert [a == b for a, b in zip(before, configs({"instruction": "Ask."}), strict=True)] == [
        True,
        False,
    ]
    assert [a == b for a, b in zip(before, configs({"cue": "Q:"}), strict=True)] == [False, False]


def test_prompts_apart_are_in_the_fingerprint() -> None:
    one, other = (
        pair_prompts(recipe(f"scores.ql_examples={name}")) for name in ("all", "positive")
    )
    assert (one.apart, other.apart) == (False, True)
    assert replace(other, apart=False) == one
    configs = [scoring_config(recipe(f"scores.ql_examples={name}")) for name in ("all", "positive")]
    assert configs[0] != configs[1]
