"""What is exported: the trained student, its start, or what lies between."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.encoder import Encoder
from cluster.artifacts import Artifact, Manifest
from cluster.steps import StepContext
from cluster.storage import open_storage, read_table
from pipelines.evaluation.paired_test import Gain
from pipelines.training.config import LoraConfig
from pipelines.training.gate import (
    Decision,
    GateConfig,
    Judge,
    decide,
    explain,
    run_gate,
)
from pipelines.training.layers import add_linear_adapter, add_projection
from pipelines.training.lora import add_adapters, merge_adapters
from pipelines.training.student import StudentConfig

TinyModel = Callable[..., Path]
MakeContext = Callable[..., StepContext]
ALONE = [str(number) for number in range(100)]


def scores(gained: float, lost: float = 0.0) -> np.ndarray:
    """Of 100 queries: 30 gain, 10 lose, and the others tie."""
    return 0.5 + np.array([gained] * 30 + [lost] * 10 + [0.0] * 60)


START = scores(0)


def test_student_that_is_better_is_chosen() -> None:
    decision = decide({0.0: START, 0.5: scores(0.1), 1.0: scores(0.2)}, ALONE, 0.05)
    assert decision.weight == 1.0
    assert decision.gains[1.0].mean == pytest.approx(0.06)
    assert decision.gains[1.0].p < 0.001
    assert 0.0 not in decision.gains


def test_mixture_that_is_better_is_chosen_where_the_student_is_not() -> None:
    decision = decide({0.0: START, 0.5: scores(0.1), 1.0: scores(0.1, -0.6)}, ALONE, 0.05)
    assert decision.weight == 0.5


def test_of_those_shown_to_be_better_the_highest_mean_wins_though_a_higher_one_is_not_shown() -> (
    None
):
    lucky = 0.5 + np.array([0.0] * 97 + [1.0] * 3)  # three queries alone
    given = {0.0: START, 0.25: scores(0.02), 0.5: scores(0.05), 1.0: lucky}
    decision = decide(given, ALONE, 0.05)
    assert decision.gains[1.0].mean > decision.gains[0.5].mean
    assert decision.gains[1.0].p > 0.05
    assert decision.weight == 0.5


@pytest.mark.parametrize("trained", [START, scores(-0.1), scores(0.1, -0.3), scores(0.1, -0.29)])
def test_tie_and_loss_choose_the_start(trained: np.ndarray) -> None:
    assert decide({0.0: START, 1.0: trained}, ALONE, 0.05).weight == 0.0


def test_no_query_chooses_the_start() -> None:
    none = np.zeros(0)
    assert decide({0.0: none, 1.0: none}, [], 0.05).weight == 0.0


def test_significance_is_the_recipes() -> None:
    given = {0.0: START, 1.0: 0.5 + np.array([0.1] * 3 + [0.0] * 97)}  # p is 1/8
    assert decide(given, ALONE, 0.05).weight == 0.0
    assert decide(given, ALONE, 0.2).weight == 1.0


TWICE = [*ALONE, *(f"own {name}" for name in ALONE)]  # those that decide, then the corpus' own
ASKED: dict[str, Any] = {"num_deciding": 100, "own": range(100, 200)}


def twice(deciding: np.ndarray, own: np.ndarray) -> np.ndarray:
    return np.concatenate([deciding, own])


def test_corpus_own_queries_forbid_a_student_that_the_others_find_better() -> None:
    start, better = twice(START, START), scores(0.2)
    given = {0.0: start, 1.0: twice(better, scores(-0.1))}
    decision = decide(given, TWICE, 0.05, **ASKED)
    assert (decision.weight, decision.forbidden) == (0.0, 1.0)
    assert decision.gains[1.0].mean == pytest.approx(0.06)
    assert decision.losses[1.0].mean == pytest.approx(0.03)
    assert explain(decision, "100 held-out queries", "100 titles") == (
        "The trained student was better than the start on 100 held-out queries (+0.060, p 0.0001),"
        " but worse on 100 titles (-0.030, p 0.0001): the start is exported."
    )
    given[0.5] = twice(scores(0.1), START)
    decision = decide(given, TWICE, 0.05, **ASKED)
    assert (decision.weight, decision.forbidden) == (0.5, 1.0)
    assert explain(decision, "100 held-out queries", "100 titles").endswith(
        "but worse on 100 titles (-0.030, p 0.0001): a mixture of the trained student's weights"
        " (0.5) and its start's (0.5) is exported (+0.030, p 0.0001)."
    )


@pytest.mark.parametrize("own", [START, scores(0.1), scores(0.1, -0.29)])
def test_corpus_own_queries_alone_export_nothing_and_forbid_no_tie(own: np.ndarray) -> None:
    start = twice(START, START)
    decision = decide({0.0: start, 1.0: twice(scores(0.2), own)}, TWICE, 0.05, **ASKED)
    assert (decision.weight, decision.forbidden) == (1.0, None)
    no_better = decide({0.0: start, 1.0: twice(START, scores(0.2))}, TWICE, 0.05, **ASKED)
    assert (no_better.weight, no_better.forbidden) == (0.0, None)


def test_decision_is_told_in_a_sentence() -> None:
    def told(weight: float, **found: Gain) -> str:
        gains = {float(name.replace("_", ".")[1:]): gain for name, gain in found.items()}
        return explain(Decision(weight=weight, gains=gains), "512 held-out queries")

    worse, better = Gain(-0.0031, -0.01, 0.004, 0.41), Gain(0.0212, 0.01, 0.03, 0.00012)
    assert told(0.0, w1=worse) == (
        "The trained student was not better than its start on 512 held-out queries (-0.003, p"
        " 0.41): the start is exported."
    )
    assert told(0.0, w0_5=Gain(0.001, -0.01, 0.01, 0.3), w1=worse) == (
        "The trained student was not better than its start on 512 held-out queries (-0.003, p"
        " 0.41), nor was any mixture of the two (at best +0.001, p 0.3): the start is exported."
    )
    assert told(1.0, w1=better) == (
        "The trained student was better than its start on 512 held-out queries (+0.021, p 0.00012):"
        " it is exported."
    )
    assert told(0.25, w0_25=better, w1=worse) == (
        "A mixture of the trained student's weights (0.25) and its start's (0.75) was better than"
        " the start on 512 held-out queries (+0.021, p 0.00012): it is exported."
    )


@pytest.mark.parametrize("weights", [(0.0,), (0.5, 1.0), (0.5, 0.5)])
def test_interpolations_lie_between_the_two(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="different weights between 0"):
        GateConfig(interpolations=weights)


def saved(encoder: Encoder, folder: Path) -> Artifact:
    encoder.save(folder / "encoder", model_card="")
    manifest = Manifest(step="s", fingerprint="f", config={}, inputs={})
    return Artifact(open_storage(folder), manifest)


@pytest.fixture
def models(tiny_model: TinyModel, tmp_path: Path) -> tuple[Encoder, Encoder]:
    """A start with a projection, and the same trained a little, projection and all, by LoRA."""
    folder = str(tiny_model("bert", tmp_path / "plain"))
    start, trained = (Encoder.load(folder, max_tokens=32, device="cpu") for _ in range(2))
    for encoder in (start, trained):
        add_projection(encoder, 16)
    add_adapters(trained.model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for weights in trained.model.parameters():
            if weights.requires_grad:
                weights.add_(torch.randn_like(weights) * 0.2)
    merge_adapters(trained.model)
    return start, trained


Gate = Callable[..., tuple[dict[str, Any], Encoder]]


@pytest.fixture
def gate(models: tuple[Encoder, Encoder], context: MakeContext, tmp_path: Path) -> Gate:
    """Runs the gate with a judge by weight."""

    def run(*judged: np.ndarray, **asked: Any) -> tuple[dict[str, Any], Encoder]:
        start, trained = (
            saved(each, tmp_path / name)
            for each, name in zip(models, ("student", "training"), strict=True)
        )
        seen: list[np.ndarray] = []

        def score(encoder: Encoder, progress: Callable[[int], None]) -> np.ndarray:
            seen.append(encoder.encode(["a text"]))
            progress(1)
            return judged[len(seen) - 1]

        names = TWICE[: len(judged[0])]
        rows = [{"kind": "k", "query": f"q{name}", "group": name} for name in names]
        judge = Judge(name="queries", rows=rows, num_texts=1, score=score, **asked)
        folders = {"student": "encoder", "training": "encoder"}
        config = StudentConfig(model="base", max_tokens=32, dtype="float32")
        step = context(tmp_path / "gate", student=start, training=trained)
        metrics = run_gate(GateConfig(interpolations=(0.5,)), judge, config, folders, step)
        ends = [each.encode(["a text"]) for each in models]
        assert np.allclose(seen[0], ends[0], atol=1e-6)  # the start is judged first
        assert np.allclose(seen[2], ends[1], atol=1e-6)
        assert not np.allclose(seen[1], ends[0], atol=1e-3)
        return metrics, Encoder.load(str(tmp_path / "gate/encoder"), device="cpu")

    return run


def test_gate_writes_the_start_where_the_student_is_no_better(
    gate: Gate, models: tuple[Encoder, Encoder], tmp_path: Path
) -> None:
    metrics, chosen = gate(START, START, scores(-0.1))
    assert (metrics["weight"], metrics["exported"]) == (0.0, "the start")
    assert metrics["decision"].startswith(
        "The trained student was not better than its start on 100"
    )
    for name, weights in models[0].model.state_dict().items():
        assert torch.equal(chosen.model.state_dict()[name], weights), name
    assert [row["weight"] for row in metrics["candidates"]] == [0.0, 0.5, 1.0]
    assert "p" not in metrics["candidates"][0]
    table = read_table(open_storage(tmp_path / "gate"), "shards/000000000.parquet")
    assert table.num_rows == 100
    assert table["ndcg_at_10"][0].as_py() == pytest.approx([0.5, 0.5, 0.4])


def test_gate_writes_the_mixture_that_is_better(
    gate: Gate, models: tuple[Encoder, Encoder]
) -> None:
    metrics, chosen = gate(START, scores(0.1), START)
    assert metrics["exported"] == "0.5 of the trained student"
    start, trained = (each.model.state_dict() for each in models)
    mixed = chosen.model.state_dict()
    assert mixed.keys() == start.keys() and any("projection" in name for name in mixed)
    for name in mixed:
        if "pooler" not in name:
            assert torch.allclose(mixed[name], (start[name] + trained[name]) / 2, atol=1e-6), name


def test_gate_writes_the_student_that_is_better(
    gate: Gate, models: tuple[Encoder, Encoder]
) -> None:
    metrics, chosen = gate(START, START, scores(0.1))
    assert metrics["exported"] == "the trained student"
    for name, weights in models[1].model.state_dict().items():
        assert torch.equal(chosen.model.state_dict()[name], weights), name


def test_gate_counts_the_corpus_own_queries_apart(gate: Gate, tmp_path: Path) -> None:
    start, worse = twice(START, START), scores(-0.1)
    judged = (start, twice(scores(0.1), worse), twice(scores(0.2), worse))
    metrics, _ = gate(*judged, **ASKED)
    assert (metrics["weight"], metrics["num_queries"], metrics["num_own_queries"]) == (0, 100, 100)
    assert "but worse on 100 titles and first sentences (-0.030" in metrics["decision"]
    row = metrics["candidates"][-1]
    assert row["difference"] == pytest.approx(0.06)
    assert row["ndcg_at_10"] == pytest.approx(0.56)
    assert row["own_queries"]["difference"] == pytest.approx(-0.03)
    assert row["own_queries"]["p_worse"] < 0.001
    assert "own_queries" not in metrics["candidates"][0]
    assert read_table(open_storage(tmp_path / "gate"), "shards/000000000.parquet").num_rows == 200


def test_student_that_diverged_leaves_the_start(
    models: tuple[Encoder, Encoder], context: MakeContext, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(models[1].model.parameters()).fill_(torch.nan)
    start, trained = (
        saved(each, tmp_path / name)
        for each, name in zip(models, ("student", "training"), strict=True)
    )

    def score(encoder: Encoder, progress: Callable[[int], None]) -> np.ndarray:
        encoder.encode(["a text"])
        return START

    rows = [{"kind": "k", "query": f"q{name}", "group": name} for name in ALONE]
    metrics = run_gate(
        GateConfig(interpolations=()),
        Judge(name="queries", rows=rows, num_texts=1, score=score),
        StudentConfig(model="base", max_tokens=32),
        {"student": "encoder", "training": "encoder"},
        context(tmp_path / "gate", student=start, training=trained),
    )
    assert metrics["weight"] == 0.0
    assert metrics["notes"][0].startswith("the trained student counts as finding nothing")
    Encoder.load(str(tmp_path / "gate/encoder"), device="cpu").encode(["a text"])


def test_start_without_the_linear_adapter_is_mixed_with_it_and_stays_what_it_was(
    gate: Gate, models: tuple[Encoder, Encoder]
) -> None:
    before = models[0].encode(["a text"])
    add_linear_adapter(models[1], torch.randn(16, 16))
    metrics, chosen = gate(START, START, START)
    assert metrics["exported"] == "the start"
    assert chosen.model.state_dict().keys() == models[0].model.state_dict().keys()
    assert np.allclose(chosen.encode(["a text"]), before, atol=1e-6)
