"""The protocol of variants: recipes as they are merged, and figures worked out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import distil
from benchmarks.distil import (
    Section,
    bootstrap,
    compared,
    current,
    decisions,
    keys_of,
    lost,
    merge,
    over_seeds,
    recipe_of,
    run_cell,
    shares,
    stands,
    summary,
)
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.yaml_files import read_yaml, write_yaml

CONFIG = read_yaml(distil.VARIANTS.read_bytes(), "distil.yaml")
TINY: dict[str, Any] = {
    "common": {"base": "laptop", "seeds": {"num_seeds": 4}, "layers_6": {"student": {}}},
    "variants": {
        "plain": {"training": {"epochs": 1}},
        "six": {"seeds": {"seed": 3}, "layers_6": {"student": {"layers": None}}},
        "ended": {"seeds": None},
    },
}


def line(**given: Any) -> dict[str, Any]:
    """A measured cell of two queries; models without scores have the start's."""
    start = given.pop("start", [0.5, 0.5])
    scores = {
        model: given.pop(model, start)
        for model in ("retriever", "before", "start", "trained", "exported")
    }
    cell = {"variant": "v", "set": "a", "layers": 6, "seed": 0, "keys": {}, "exit_code": 0}
    rest = {"gate": None, "verdict": None, "queries": [str(n) for n in range(len(start))]}
    return cell | rest | {"ndcg_at_10": scores | {"start": start}} | given


def gate(weight: float, difference: float = 0.0) -> dict[str, Any]:
    candidates = [{"weight": 1.0, "difference": difference, "p": 0.5}]
    return {"weight": weight, "exported": f"weight {weight}", "candidates": candidates}


def column(section: Section, name: str) -> list[str]:
    return [row[section.head.index(name)] for row in section.rows]


def test_merge_lies_over_nested_keys_and_replaces_lists():
    below = {"queries": {"tasks": ["a", "b"], "seed": 1}, "name": "x"}
    assert merge(below, {"queries": {"tasks": ["c"]}}) == {
        "queries": {"tasks": ["c"], "seed": 1},
        "name": "x",
    }
    assert merge({"lexical": {"k1": 1}}, {"lexical": None}) == {"lexical": None}
    assert merge({"gate": None}, {"gate": {}}) == {"gate": {}}
    assert below["queries"]["tasks"] == ["a", "b"]


def test_keys_of_a_variant_lie_over_the_common_ones_and_its_layers_over_both():
    assert keys_of(TINY, "six", 6) == {
        "base": "laptop",
        "seeds": {"num_seeds": 4, "seed": 3},
        "student": {"layers": None},
    }
    assert keys_of(TINY, "ended", 6)["seeds"] is None
    with pytest.raises(SystemExit, match="plain, six, ended"):
        keys_of(TINY, "siv", 6)
    with pytest.raises(SystemExit, match="layers_3"):
        keys_of(TINY, "plain", 3)


def recipe(variant: str, layers: int, tmp_path: Path, seed: int = 7) -> Recipe:
    file = tmp_path / "recipe.yaml"
    tree = recipe_of(keys_of(CONFIG, variant, layers), tmp_path / "cranfield", seed)
    file.write_text(write_yaml(tree))
    return load_recipe(file)


@pytest.mark.parametrize("layers", [3, 6])
@pytest.mark.parametrize("variant", CONFIG["variants"])
def test_every_variant_is_a_recipe_whose_seed_reaches_batches_and_training(
    variant: str, layers: int, tmp_path: Path
):
    read = recipe(variant, layers, tmp_path)
    assert read.student.layers == ((0, 2, 5) if layers == 3 else None)
    assert read.evaluation[0].path == read.corpus.path == str(tmp_path / "cranfield")
    assert (read.mixture.seed, read.training.seed) == (7, 7)
    stage = read.embedding_distillation
    assert (stage is None) == (layers == 6)
    assert stage is None or (stage.mixture.seed, stage.training.seed) == (7, 7)


def test_variants_share_what_the_llm_writes(tmp_path: Path):
    def written(read: Recipe) -> list[Any]:
        held_out = read.gate.hold_out if read.gate else None
        return [read.corpus, read.seeds, read.llm, read.prompts, read.queries, held_out]

    all_ = [recipe(v, n, tmp_path, n) for v in CONFIG["variants"] for n in (3, 6)]
    assert all(written(each) == written(all_[0]) for each in all_)


def test_a_cell_stands_by_its_keys_and_not_where_it_failed():
    cell = {"variant": "v", "set": "a", "layers": 6, "seed": 0, "keys": {"x": 1}}
    assert stands([line(keys={"x": 1})], cell)
    assert not stands([line(keys={"x": 2})], cell)
    assert not stands([line(keys={"x": 1}, seed=1)], cell)
    assert not stands([line(keys={"x": 1}, exit_code=1)], cell)


def test_a_cell_that_fails_is_a_line_with_its_error(tmp_path: Path):
    keys = keys_of(CONFIG, "adapt", 6)
    cell = {"variant": "adapt", "set": "absent", "layers": 6, "seed": 0, "keys": keys}
    failed = run_cell(cell, tmp_path / "data", tmp_path / "runs")
    assert failed["exit_code"] == 2
    assert "data/retrieval/absent" in failed["error"]
    assert json.loads(json.dumps(failed))["keys"] == keys


def test_a_set_counts_once_however_many_its_queries():
    overall, each = bootstrap({"large": np.full(400, 0.02), "small": np.full(2, -0.04)})
    assert overall.mean == pytest.approx(-0.01)
    assert each["large"][:3] == pytest.approx((0.02, 0.02, 0.02))
    assert each["small"].mean == pytest.approx(-0.04)


def test_p_is_two_sided_and_one_where_nothing_differs():
    (nothing, _), (gain, _) = bootstrap({"a": np.zeros(50)}), bootstrap({"a": np.full(50, 0.1)})
    assert nothing == (0, 0, 0, 1)
    assert gain.p == pytest.approx(2 / 10_001)
    assert bootstrap({"a": np.full(50, -0.1)})[0].p == gain.p


def test_interval_is_that_of_the_mean_over_queries_drawn_apart():
    values = np.random.default_rng(1).normal(0.02, 0.1, 400)
    one, _ = bootstrap({"a": values})
    error = values.std() / 20
    assert (one.low, one.high) == pytest.approx(
        (one.mean - 1.96 * error, one.mean + 1.96 * error), abs=0.1 * error
    )
    # The same queries in a second set are drawn apart, so that the mean of both is surer.
    two, _ = bootstrap({"a": values, "b": values})
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(2**-0.5, abs=0.03)
    normal = 2 * (1 - 0.5 * (1 + np.tanh(0.7978845608 * one.mean / error)))  # nearly
    assert one.p == pytest.approx(normal, rel=0.9)


def test_seeds_are_averaged_before_sets():
    lines = [
        line(seed=0, trained=[0.9, 0.5]),
        line(seed=1, trained=[0.5, 0.5]),
        line(set="b", trained=[0.3, 0.3]),
    ]
    gains = over_seeds(lines, "trained", "start")
    assert gains["a"] == pytest.approx([0.2, 0])
    assert bootstrap(gains)[0].mean == pytest.approx((0.1 - 0.2) / 2)


def test_lines_of_other_queries_are_not_averaged():
    with pytest.raises(SystemExit, match="different queries"):
        over_seeds([line(), line(seed=1, queries=["0", "2"])], "trained")


def test_what_perfect_queries_lose_and_the_share_of_the_retriever():
    lines = [
        line(start=[1.0, 0.999, 0.6, 0.2], trained=[0.9, 0.999, 1, 0.1], retriever=[1.0] * 4),
        line(set="b", trained=[0.4, 0.4]),
    ]
    assert lost(lines) == pytest.approx({"a": 0.05})
    share, each = shares(lines)
    assert each == pytest.approx({"a": 0.74975, "b": 0.8})
    assert share == pytest.approx((0.74975 + 0.4) / 1.5)


def test_an_exported_start_gains_nothing_and_a_mixture_what_it_is():
    lines = [
        line(trained=[0.1, 0.1], exported=[0.4, 0.4], gate=gate(0.0)),
        line(set="b", trained=[0.1, 0.1], exported=[0.6, 0.6], gate=gate(0.5)),
    ]
    exported = over_seeds(lines, "exported", "start")
    assert exported["a"].tolist() == [0, 0]
    assert exported["b"] == pytest.approx([0.1, 0.1])
    assert [len(each.rows) for each in summary(lines)] == [1, 1, 3]
    assert [len(each.rows) for each in summary([line(), lines[1]])] == [1, 0, 2]


def test_summary_counts_sets_that_fall_and_names_the_worst():
    lines = [
        line(trained=[0.51, 0.51], gate=gate(1.0), exported=[0.51, 0.51]),
        line(set="b", trained=[0.45, 0.45], gate=gate(0.0)),
        line(set="c", trained=[0.47, 0.47], gate=gate(0.0)),
    ]
    trained, exported, of_sets = summary(lines)
    assert column(trained, "over the start") == ["-2.33 [-2.33, -2.33]"]
    assert column(trained, "sets that fall") == ["2 of 3"]
    assert column(trained, "worst") == ["b -5.00"]
    assert column(exported, "over the start") == ["+0.33 [+0.33, +0.33]"]
    assert column(exported, "sets that fall") == ["0 of 3"]
    assert column(of_sets, "b")[:2] == ["-5.00 [-5.00, -5.00]", "+0.00 [+0.00, +0.00]"]


def test_the_gate_is_counted_by_what_people_s_queries_say():
    lines = [
        line(seed=0, trained=[0.4, 0.4], exported=[0.4, 0.4], gate=gate(1.0)),
        line(seed=1, trained=[0.1, 0.8], exported=[0.3, 0.6], gate=gate(0.5)),
        line(seed=2, trained=[0.6, 0.6], gate=gate(0.0)),
        line(seed=3, trained=[0.2, 0.9], gate=gate(0.0)),
        line(seed=4, trained=[0.2, 0.2], gate=gate(0.0)),
        line(seed=5, trained=[0.9, 0.9]),
    ]
    listed, errors, _ = decisions(lines)
    assert len(listed.rows) == 5
    total = dict(zip(errors.head[2:], errors.rows[0][2:], strict=True))
    assert errors.rows[0][0] == "all"
    assert total == {
        "decisions": "5",
        "student or mixture exported": "2",
        "loser shipped": "2",
        "significant loser shipped": "1",
        "start exported": "3",
        "winner rejected": "2",
        "significant winner rejected": "1",
    }


def test_verdicts_come_true_by_the_sign_of_the_gain():
    go, skip, maybe = ({"verdict": name} for name in ("GO", "SKIP", "MAYBE"))
    lines = [
        line(seed=0, trained=[0.6, 0.6], verdict=go),
        line(seed=1, trained=[0.4, 0.4], verdict=go),
        line(seed=2, trained=[0.4, 0.4], verdict=skip),
        line(seed=3, trained=[0.6, 0.6], verdict=maybe),
    ]
    *_, verdicts = decisions(lines)
    assert "2 of 3" in verdicts.title
    assert verdicts.rows == [
        ["GO", "2", "1", "1"],
        ["MAYBE", "1", "1", "0"],
        ["SKIP", "1", "0", "1"],
    ]


def test_variants_are_compared_on_the_cells_that_both_have():
    lines = [
        line(trained=[0.6, 0.6]),
        line(seed=1, trained=[0.9, 0.9]),
        line(set="b", trained=[0.9, 0.9]),
        line(variant="w", trained=[0.5, 0.5], exported=[0.4, 0.4]),
    ]
    section = compared(lines, "w")
    assert column(section, "variant") == ["v", "v"]
    assert column(section, "mean") == ["+10.00 [+10.00, +10.00]"] * 2
    assert column(section, "b") == ["", ""]


def test_lines_of_earlier_keys_and_failures_are_left_out():
    lines = [
        line(keys={"x": 1}),
        line(keys={"x": 1}, seed=1),
        line(keys={"x": 2}),
        line(keys={"x": 2}, seed=2, exit_code=1),
    ]
    assert current(lines) == [lines[2]]
