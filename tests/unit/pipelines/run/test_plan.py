"""What a plan reckons, counted anew with the LLM's own tokenizer; and what it cannot know."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from actors.embedded import embedded_model
from pipelines.corpus.cutting import Passage
from pipelines.fret.prompts import PairPrompts, QueryPrompts, load_prompts
from pipelines.recipe.read import load_recipe, recipe_names
from pipelines.run import plan as planning
from pipelines.run.plan import make_plan, print_plan

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


@pytest.mark.slow  # it may have to unpack the model
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

    gated = plan(
        corpus, tmp_path, "seeds.num_seeds=1000", "estimate.query_tokens=10", "gate.num_seeds=50"
    )
    expected = 1050 * (count(prompt) - head) + head
    assert gated["llm_tokens"]["queries"] == {"prefill": expected, "decode": 10_500}
    assert gated["llm_tokens"]["scores"] == made["llm_tokens"]["scores"]  # they are not scored

    (pair,) = PairPrompts(prompts=prompts, relevance="yes-no").render("", "", f"{TEXT} 007.", QA)
    context, question = count(pair.context), count(pair.question)
    head = count(pair.context[: pair.context.rindex(" Bees")]) // BLOCK * BLOCK
    # 1000 queries, half of them scored over 5 candidates, which are all of the 100 passages.
    expected = 100 * (context - head) + 2500 * (context % BLOCK + 10 + question) + head
    assert made["llm_tokens"]["scores"]["prefill"] == expected


@pytest.mark.slow
def test_plan_counts_a_passage_in_each_prompt_that_holds_it(corpus: Path, tmp_path: Path) -> None:
    def prefill(*settings: str) -> int:
        made = plan(corpus, tmp_path, "seeds.num_seeds=1000", *settings)
        return made["llm_tokens"]["scores"]["prefill"]

    positive = "scores.ql_examples=positive"
    fusions = ("ql+rc", "ql+sim", "rc+sim")
    both, ql, rc = (prefill(positive, f"fret.fusion={fusion}") for fusion in fusions)
    actors = prefill(positive, "fret.fusion=ql+sim", "resources.llm.num_actors=2") - ql
    assert both == pytest.approx(ql + rc, abs=2)
    assert prefill() == prefill("fret.fusion=ql+sim") == rc  # one prompt, with the question
    assert max(ql, rc) < both
    assert actors > 8 * BLOCK  # every actor reads the examples


def test_plan_counts_a_passage_once_for_each_wording() -> None:
    recipe = load_recipe("laptop", [])
    counts = {
        num: planning._num_pairs(recipe, {}, 1000, 100, num)["scores"][1] for num in (1, 2, 500)
    }
    num = round(1000 * recipe.estimate.scored_share) * recipe.scores.num_scored
    assert counts[1] == 100 and counts[2] == 200 and num * 0.95 < counts[500] < num
    done = {
        "pairs": SimpleNamespace(manifest=SimpleNamespace(metrics={"num_pairs": 90}), num_rows=60)
    }
    for wordings, expected in ((1, 60), (2, 63)):  # 120 (1 - e^(-90/120))
        found = planning._num_pairs(recipe, done, 1000, 100, wordings)["scores"]
        assert found == (90, expected)


@pytest.mark.slow
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


def test_pairs_are_parted_between_the_probe_and_the_scores() -> None:
    auto = ["fret.fusion=auto", "probe.num_queries=100", "estimate.scored_share=0.5"]

    def parted(done: dict[str, Any], *settings: str) -> dict[str, tuple[int, int]]:
        return planning._num_pairs(load_recipe("laptop", list(settings)), done, 1000, 100, 1)

    # 500 queries of five candidates each, of 100 passages.
    assert parted({}, "estimate.scored_share=0.5") == {"probe": (0, 0), "scores": (2500, 100)}
    assert parted({}, *auto) == {"probe": (500, 99), "scores": (2000, 100)}
    skip = SimpleNamespace(manifest=SimpleNamespace(metrics={"fusion": None}))
    assert parted({"probe": skip}, *auto)["scores"] == (0, 0)


def test_queries_of_the_corpus_cost_the_llm_nothing_until_it_judges_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passages = [Passage(id=str(n), title="", text=f"{TEXT} {n}", source=f"{n}#1") for n in range(9)]

    def counted(*settings: str, **done: Any) -> int:
        return planning._num_own(load_recipe("laptop", list(settings)), done, passages)

    assert counted() == 0
    assert counted("corpus_queries={}") == 18  # two sentences of each; the number is none
    assert counted("corpus_queries={max_sentences: 7}") == 7
    assert counted("corpus_queries={}", corpus_queries=SimpleNamespace(num_rows=5)) == 5
    monkeypatch.setattr(planning, "NUM_READ", 9)  # of a larger corpus
    assert counted("corpus_queries={max_titles: 30, max_sentences: 7}") == 37
    auto = load_recipe("laptop", ["fret.fusion=auto", "probe.num_queries=100"])
    parted = planning._num_pairs(auto, {}, 1000, 100, 1, 40)
    assert {step: pairs for step, (pairs, _) in parted.items()} == {
        "probe": 500,
        "scores": (370 - 100 + 40) * 5,
    }


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without corpus, hub, credentials or data."""
    for name in ("TOKAY_DATA", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")  # so that this machine's GPUs do not count
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    planning._ask.cache_clear()
    return tmp_path


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"laptop"}))
def test_recipe_that_comes_with_tokay_is_planned_anywhere_and_fits(
    name: str, nowhere: Path
) -> None:
    recipe = load_recipe(name, keep_unset=True)
    made = make_plan(recipe, str(nowhere / "run"))
    assert {row["state"] for row in made["steps"]} == {"unknown"}
    whys = {"cluster": "credentials", "gecko-mini": "reads ${TOKAY_DATA}, which is not set"}
    why = whys.get(name, "corpus corpus does not exist")
    if recipe.estimate.passage_tokens:
        assert why in made["guessed"]
        assert made["llm_tokens"]["scores"]["prefill"] > made["llm_tokens"]["queries"]["prefill"]
        assert made["llm_cost_usd"] == pytest.approx(3 * made["llm_gpu_hours"], abs=0.01) != 0
    else:
        asked = ("queries", "scores") if recipe.fret.asks_llm else ("queries",)
        assert made["llm_tokens"] == dict.fromkeys(asked)
        assert made["llm_cost_usd"] is None
        assert why in made["unknown"]["LLM tokens and cost are"]
    for need in made["gpu_memory"]:
        counted = need["steps"] != ["candidates"]
        assert need["fits"] == ("yes" if counted else "unknown") or not need["gpu"]
        assert (need["gib"] is not None) == counted


def test_plan_command_prints_what_is_unknown_and_why(nowhere: Path) -> None:
    def answer(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.cli", "plan", *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    told = answer("gpu")
    assert (told.returncode, told.stderr) == (0, "")
    lines = [line.strip() for line in told.stdout.splitlines()]
    assert any("LLM: weights" in line and line.endswith("yes") for line in lines)
    why = "corpus corpus does not exist or is empty: correct corpus.path, such as --set"
    why += " corpus.path=FOLDER"
    assert f"LLM tokens and cost are unknown: {why}" in lines
    assert json.loads(answer("cluster", "--json").stdout)["llm_actor_hours"] is None
    wrong = answer("gpu", "--set", "seds.num_seeds=1")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("name", ["gecko", "multilingual"])
def test_plan_says_what_it_cannot_look_at_without_a_hub(name: str, nowhere: Path) -> None:
    recipe = load_recipe(name)
    made = make_plan(recipe, str(nowhere / "run"))
    assert "corpus" in made["unknown"]["states of the steps are"]
    listed = made["unknown"]["rows and columns of the labelled sets from the hub are"]
    stages = recipe.stages.values()
    sets = [each for stage in stages for each in stage.mixture.labelled]
    assert all((each.name in listed) == each.path.startswith("hub:") for each in sets)
    out = io.StringIO()
    print_plan(made, Console(file=out, width=200))
    tokens = recipe.estimate.passage_tokens
    assert f"Tokens are guessed, with {tokens} for each passage" in out.getvalue()
    assert f"{made['llm_gpu_hours']} GPU hours, ${made['llm_cost_usd']:.2f}" in out.getvalue()
    assert f"{made['llm_tokens']['scores']['prefill']:,}" in out.getvalue()


def test_tokens_are_guessed_from_the_recipes_estimate(nowhere: Path) -> None:
    settings = ["seeds.num_seeds=1000", "estimate.passage_tokens=100", "estimate.query_tokens=10"]
    settings += ["estimate.scored_share=0.5", "scores.num_scored=4", f"queries.tasks=[{QA}]"]
    made = make_plan(load_recipe("gpu", settings), str(nowhere / "run"))
    cue = len("\nQuestion:")
    head = len(QueryPrompts(prompts=load_prompts(), tasks=(QA,)).render(QA, "", "")) - cue
    characters = head // (4 * 16) * (4 * 16), head + 4 * 100 + cue
    shared, whole = characters[0] // 4, -(-characters[1] // 4)
    assert made["llm_tokens"]["queries"] == {
        "prefill": 1000 * (whole - shared) + shared,
        "decode": 10_000,
    }
    # Each of 1000 * 0.5 * 4 pairs reads its passage, and its query of ten tokens.
    assert 2000 * 110 < made["llm_tokens"]["scores"]["prefill"] < 2000 * 170
    assert "corpus corpus does not exist" in made["guessed"]
    shorter = make_plan(load_recipe("gpu", [*settings, "queries.max_passage_tokens=50"]), "run")
    less = made["llm_tokens"]["queries"]["prefill"] - shorter["llm_tokens"]["queries"]["prefill"]
    assert less == 1000 * 50
    prefill = [
        make_plan(load_recipe("gpu", [*settings, f"queries.language={name}"]), "run")
        for name in ("German", "passage")
    ]
    one, each = (plan["llm_tokens"]["queries"]["prefill"] for plan in prefill)
    assert abs(one - each) < 1000 * BLOCK  # all of a language share the prompt's head too


def test_model_that_no_hub_gives_leaves_its_tokens_unknown(corpus: Path, nowhere: Path) -> None:
    made = make_plan(load_recipe("gpu", [f"corpus.path={corpus}"]), str(nowhere / "run"))
    assert {row["state"] for row in made["steps"]} == {"waiting"}
    (why,) = made["unknown"].values()
    assert why.startswith("model 'Qwen/Qwen3-4B-Instruct-2507': no such folder, and the model hub")


def test_bucket_that_never_answers_is_not_waited_for(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PATIENCE_S", 0.1)
    monkeypatch.setattr("cluster.storage.S3Storage.exists", lambda *_: time.sleep(60))
    made = make_plan(load_recipe("cluster"), "s3://b/run")
    assert made["unknown"]["states of the steps are"].startswith("s3://b/run did not answer within")


@pytest.mark.parametrize("name", ["gpu", "gpu-80gb", "gpu-8x80gb", "cluster"])
def test_documented_table_is_what_a_plan_prints(name: str, nowhere: Path) -> None:
    written = (Path(__file__).parents[4] / "docs/gpus.md").read_text()
    table = written.split(f"### {name}: ")[1].split("```\n")[1]
    out = io.StringIO()
    print_plan(make_plan(load_recipe(name), str(nowhere)), Console(file=out, width=110))
    assert table in "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
