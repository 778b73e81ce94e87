"""What a plan reckons, counted anew by hand with the LLM's own tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.embedded import embedded_model
from pipelines.fret.prompts import PairPrompts, QueryPrompts, load_prompts
from pipelines.plan import make_plan
from pipelines.recipe import load_recipe

pytestmark = pytest.mark.slow  # it may have to unpack the model
TEXT = (
    "Bees tell each other where flowers are by dancing. The angle of the dance against the vertical"
    " is the angle of the flight against the sun, and its length is the distance."
)
QA, BLOCK = "question answering", 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "bees.jsonl"
    rows = [{"id": str(n), "title": "", "text": f"{TEXT} {n:03}."} for n in range(100)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def plan(corpus: Path, folder: Path, *settings: str) -> dict[str, Any]:
    fixed = [f"corpus.path={corpus}", f"queries.tasks=[{QA}]", "estimate.scored_share=0.5"]
    return make_plan(load_recipe("laptop", [*fixed, *settings]), str(folder / "run"))


def test_plan_counts_what_the_prefix_cache_will_not_hold(corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model("embedded:SmolLM2-135M-Instruct"))

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    made = plan(corpus, tmp_path, "seeds.num_seeds=1000", "estimate.query_tokens=10")
    prompts = load_prompts()
    prompt = QueryPrompts(prompts=prompts, tasks=(QA,)).render(QA, "", f"{TEXT} 007.")
    head = count(prompt[: prompt.rindex(" Bees")]) // BLOCK * BLOCK
    expected = 1000 * (count(prompt) - head) + head
    assert made["llm_tokens"]["queries"] == {"prefill": expected, "decode": 10_000}

    pair = PairPrompts(prompts=prompts, relevance="yes-no").render("", "", f"{TEXT} 007.")
    context, question = count(pair.context), count(pair.question)
    head = count(pair.context[: pair.context.rindex(" Bees")]) // BLOCK * BLOCK
    # 1000 queries, half of them scored over 5 candidates, which are all of the 100 passages.
    expected = 100 * (context - head) + 2500 * (context % BLOCK + 10 + question) + head
    assert made["llm_tokens"]["scores"]["prefill"] == expected


def test_plan_prices_the_actors_time_and_their_starts(corpus: Path, tmp_path: Path) -> None:
    settings = [
        "seeds.num_seeds=3600",
        "estimate.query_tokens=10",
        "estimate.decode_tokens_per_s=10",
        "estimate.prefill_tokens_per_s=1.0e+12",
        "estimate.engine_start_s=1800",
        "estimate.actor_hour_usd=2",
        "resources.llm.num_actors=4",
    ]
    made = plan(corpus, tmp_path, *settings)
    # An hour of writing, and four starts of half an hour for each of two steps.
    assert made["llm_actor_hours"] == 5
    assert made["llm_wall_hours"] == 1.25
    assert made["llm_cost_usd"] == 10
