"""The probe of a plan: its size, its own folder, and where its verdict is shown."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.artifacts import Json
from cluster.errors import UserError
from cluster.steps import Run, Step, StepContext
from pipelines.fret.judging import Judging
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.run import probe as probing
from pipelines.run.checks import check_recipe
from pipelines.run.console import JsonLines
from pipelines.run.probe import (
    finished_probe,
    print_judged,
    probe_folder,
    probe_recipe,
    run_probe,
)


def judged(num_right: int, num_wrong: int) -> dict[str, Json]:
    """Metrics of a probe in which QL was right so often, and the others never."""
    judging = Judging()
    for number in range(num_right + num_wrong):
        ql = [0.9, 0.1] if number < num_right else [0.1, 0.9]
        judging.add({"sim": [0.4, 0.6], "ql": ql, "rc": [0.4, 0.6]}, 0)
    return judging.metrics()


def recipe_of(folder: Path, *settings: str) -> Recipe:
    (folder / "corpus.jsonl").write_text(json.dumps({"text": "They dance."}))
    return load_recipe("laptop", [f"corpus.path={folder}/corpus.jsonl", *settings])


def finish(recipe: Recipe, uri: str, metrics: dict[str, Json]) -> None:
    """Makes a run's steps up to the probe, with these metrics and nothing else."""

    def work(context: StepContext) -> dict[str, Json]:
        return {"num_passages": 9, "num_seeds": 8, "num_queries": 7, **metrics}

    steps = [
        Step(name=step.name, config=step.config, inputs=step.inputs, work=work)
        for step in build_run(recipe, uri).steps
    ]
    Run(uri, steps).execute(JsonLines(), until="probe")


def shown(found: dict[str, Any]) -> str:
    out = io.StringIO()
    print_judged(found, Console(file=out, width=100))
    return out.getvalue()


@pytest.mark.parametrize(
    ("settings", "num_seeds"),
    [
        (["estimate.scored_share=0.5"], 400),
        (["estimate.scored_share=0.5", "queries.queries_per_seed=4"], 100),
        (["estimate.scored_share=0.5", "probe.num_queries=41"], 82),
        (["estimate.scored_share=0.1"], 700),  # no more than the recipe's own
    ],
)
def test_probe_takes_as_many_seeds_as_its_queries_need(
    settings: list[str], num_seeds: int, tmp_path: Path
) -> None:
    small = probe_recipe(recipe_of(tmp_path, *settings))
    assert small.seeds.num_seeds == num_seeds
    assert small.probe.sample == small.probe.max_passages == 20_000


def test_probe_runs_beside_the_run_and_returns_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, uri = recipe_of(tmp_path), str(tmp_path / "run")
    asked: list[tuple[Any, ...]] = []

    def execute(small: Recipe, folder: str, *_: Any, **options: Any) -> Any:
        asked.append((folder, options))
        finish(small, folder, judged(30, 10))
        run = build_run(small, folder)
        return {step.name: run.artifact(step) for step in run.steps}

    monkeypatch.setattr(probing, "execute", execute)
    assert finished_probe(recipe, uri) is None
    found = run_probe(recipe, f"{uri}/", Console(file=io.StringIO()))
    assert asked == [(f"{uri}-probe", {"until": "probe", "rebuild": False})]
    assert found["storage"].endswith("run-probe")
    assert [found[key] for key in ("num_passages", "num_seeds", "num_queries")] == [9, 8, 7]
    assert (found["verdict"], found["num_judged"]) == ("GO", 40)
    assert not (tmp_path / "run").exists()
    lines = shown(found).splitlines()
    ql = next(line.split() for line in lines if line.strip().startswith("QL "))
    assert ql == ["QL", "75.0", "%", "30", "0", "1.9e-09"]
    assert lines[-1].startswith("GO: z(QL) + z(sim) ranks the seed first for 38 % of 40")


def test_plan_shows_the_verdict_of_a_finished_probe_of_this_recipe(tmp_path: Path) -> None:
    recipe, uri = recipe_of(tmp_path), str(tmp_path / "run")
    finish(probe_recipe(recipe), probe_folder(uri), judged(0, 10))
    found = finished_probe(recipe, uri)
    assert found is not None and found["verdict"] == "SKIP"
    assert finished_probe(recipe_of(tmp_path, "llm.max_model_tokens=512"), uri) is None
    # With `auto` the run has a probe of its own, which goes first.
    auto = recipe_of(tmp_path, "fret.fusion=auto")
    finish(auto, uri, judged(30, 10))
    found = finished_probe(auto, uri)
    assert found is not None and found["verdict"] == "GO"


def test_round_trip_that_demands_the_first_rank_leaves_a_probe_nothing(tmp_path: Path) -> None:
    strict = recipe_of(tmp_path, "candidates.max_seed_rank=1")
    check_recipe(strict)
    for asked in (
        recipe_of(tmp_path, "candidates.max_seed_rank=1", "fret.fusion=auto"),
        probe_recipe(strict),
    ):
        with pytest.raises(UserError, match=r"candidates.max_seed_rank: 1 given"):
            check_recipe(asked)
