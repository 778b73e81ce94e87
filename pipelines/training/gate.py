"""The step `gate`: held-out queries decide whether the trained student is exported, or its start.

Training on a few hundred examples makes some models better and some worse, and which of the two is
not known beforehand. So the student is compared with the model that training started from, and
replaces it only where it is shown to be better. A student that has learnt to find the passages that
an LLM's queries were written for finds more of them whether or not it serves people: the corpus'
own titles and first sentences, which no LLM wrote, can forbid it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from cluster.artifacts import Json, write_shards
from cluster.config import Config
from cluster.step_task import run_in_task
from cluster.steps import Step, StepContext
from cluster.storage import join
from pipelines.corpus.held_out import MAX_HELD_OUT_SHARE
from pipelines.corpus.seeds import HoldOut
from pipelines.datasets.retrieval import RetrievalDataset
from pipelines.datasets.test_sets import TestSet, load_folder, test_set_fingerprint
from pipelines.encoders import MODEL, TRAINED, EncoderConfig, load_encoder, upload_folder
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.paired_test import Gain, gains
from pipelines.fingerprints import fingerprinted
from pipelines.records import GATE
from pipelines.training import training
from pipelines.training.gate_queries import WRITTEN, known_item_ndcg, read_known_items

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from pipelines.recipe.recipe import Recipe

TITLE = "decide what is exported"
START, STUDENT = 0.0, 1.0  # weights of the trained student
_ROWS_PER_SHARD = 4096


class GateConfig(Config):
    """What decides whether the trained student is exported, or the model that it started from."""

    num_queries: int = Field(
        default=500,
        ge=1,
        description="held-out queries that decide, at least: what the LLM's are too few for,"
        " titles and first sentences of held-out documents are; and how many of these, at most, can"
        " forbid a student",
    )
    num_seeds: int = Field(
        default=200, ge=0, description="held-out passages that the LLM writes queries for"
    )
    interpolations: tuple[float, ...] = Field(
        default=(0.25, 0.5, 0.75),
        description="weights of the trained student in candidates between it and its start"
        " (WiSE-FT, LM-Cocktail), beside the student itself",
    )
    significance: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="chance of exporting what is no better than the start; and of forbidding what"
        " is no worse by the corpus' own queries",
    )
    max_passages: int = Field(
        default=20_000, ge=100, description="that are searched, the held-out ones among them"
    )
    test_set: str | None = Field(
        default=None,
        description="name of a retrieval set of the recipe's evaluation, whose queries decide"
        " alone; not the first, which is the headline",
    )

    @field_validator("interpolations")
    @classmethod
    def _lie_between(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < weight < 1 for weight in weights) or len({*weights}) < len(weights):
            raise ValueError("give different weights between 0 (the start) and 1 (the student)")
        return tuple(sorted(weights))

    @property
    def hold_out(self) -> HoldOut | None:
        """What the step `seeds` holds out; nothing where a test set decides."""
        if self.test_set is not None:
            return None
        return HoldOut(num_queries=self.num_queries, num_seeds=self.num_seeds)


def step(recipe: Recipe) -> Step:
    """Returns the step of a recipe that has a gate."""
    config, student = recipe.gate, recipe.student
    assert config is not None
    test_set = next((each for each in recipe.evaluation if each.name == config.test_set), None)
    _, before = training.step(recipe).inputs  # what training starts from is said there
    folders = {before: MODEL if before == "student" else TRAINED, recipe.trained_by: TRAINED}
    run = partial(_run, config, test_set, student, folders)
    return Step(
        name="gate",
        config={
            **fingerprinted(config),
            "student": {"dtype": student.dtype, "max_tokens": student.max_tokens},
            "judged_on": None if test_set is None else test_set_fingerprint(test_set),
            "forbidden_by": "own queries" if test_set is None else None,
        },
        inputs=(*folders, *(("passages", "seeds", "queries") if test_set is None else ())),
        work=lambda context: run_in_task(run, context, recipe.resources.encoder),
    )


def _run(
    config: GateConfig,
    test_set: TestSet | None,
    student: EncoderConfig,
    folders: Mapping[str, str],
    context: StepContext,
) -> dict[str, Json]:
    judge = _held_out(config, context) if test_set is None else _test_set(test_set)
    return run_gate(config, judge, student, folders, context)


Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What a model is judged on.

    Attributes:
        name: Of its queries, in the plural, for sentences.
        rows: A row of `records.GATE` for each query, but for the scores.
        num_texts: Texts that a model has to encode.
        score: Returns a model's nDCG@10 for each query, ``[queries]``; told of the texts encoded.
        num_deciding: So many queries, the first, decide; None: all.
        own: Places of the corpus' own queries, which can forbid a model.
        metrics: For the step's manifest.
        notes: What whoever reads the decision has to know.
    """

    name: str
    rows: Sequence[dict[str, Json]]
    num_texts: int
    score: Callable[[Encoder, Progress], np.ndarray]
    num_deciding: int | None = None
    own: Sequence[int] = ()
    metrics: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is exported.

    Attributes:
        weight: Of the trained student: 1 is that student, 0 its start.
        gains: Over the start, by weight, of all others.
        losses: The start's gains over each of them, by the corpus' own queries.
        forbidden: The weight that would be exported, had the corpus' own queries no say; None
            where it is the same.
    """

    weight: float
    gains: Mapping[float, Gain]
    losses: Mapping[float, Gain] = field(default_factory=dict)
    forbidden: float | None = None


def decide(
    scores: Mapping[float, np.ndarray],
    groups: Sequence[str],
    significance: float,
    *,
    num_deciding: int | None = None,
    own: Sequence[int] = (),
) -> Decision:
    """Chooses the model with the highest mean score of those that are shown to be better.

    A model is shown to be better than the start where the test of `evaluation.paired_test.gains`
    gives a p of `significance` or less; that test knows that the best of several is looked at. It
    is forbidden where the same test, of the corpus' own queries, shows the start to be better than
    it. Where no model is left, after a tie for example, it is the start.

    Args:
        scores: Weight of the trained student -> score of each query, the start's (0) among them.
        groups: Of each query; queries of one group stand or fall together.
        significance: The chance of not choosing the start where no model is better; and of
            forbidding a model where none is worse by the corpus' own queries.
        num_deciding: So many queries, the first, decide; None: all.
        own: Places of the corpus' own queries, which can forbid a model.
    """
    weights = [weight for weight in scores if weight != START]
    differences = np.stack([scores[weight] - scores[START] for weight in weights])

    def test(differences: np.ndarray, places: Sequence[int]) -> dict[float, Gain]:
        found = gains(differences[:, places], [groups[place] for place in places])
        return dict(zip(weights, found, strict=True))

    found = test(differences, range(len(groups) if num_deciding is None else num_deciding))
    losses = test(-differences, list(own))

    def best(allowed: Sequence[float]) -> float:
        return max(allowed, key=lambda weight: (found[weight].mean, -weight), default=START)

    better = [weight for weight, gain in found.items() if gain.mean > 0 and gain.p <= significance]
    wanted = best(better)
    chosen = best([weight for weight in better if losses[weight].p > significance])
    forbidden = wanted if wanted != chosen else None
    return Decision(weight=chosen, gains=found, losses=losses, forbidden=forbidden)


def explain(decision: Decision, queries: str, own: str = "") -> str:
    """Returns the decision and its reason in a sentence or two.

    `queries` says how many of which decided, and `own` how many of the corpus' own could forbid.
    """
    if (weight := decision.forbidden) is not None:
        name = _subject(weight)
        lost = decision.losses[weight]
        told = (
            f"{name[0].upper()}{name[1:]} was better than the start on {queries}"
            f" ({_shown(decision.gains[weight])}), but worse on {own} ({-lost.mean:+.3f}, p"
            f" {lost.p:.2g})"
        )
        if decision.weight == START:
            return f"{told}: the start is exported."
        allowed = _shown(decision.gains[decision.weight])
        return f"{told}: {_subject(decision.weight)} is exported ({allowed})."
    gain, trained = decision.gains.get(decision.weight), decision.gains[STUDENT]
    if decision.weight == STUDENT:
        return (
            f"The trained student was better than its start on {queries} ({_shown(trained)}): it is"
            " exported."
        )
    if gain is not None:
        name = _subject(decision.weight)
        return (
            f"{name[0].upper()}{name[1:]} was better than the start on {queries} ({_shown(gain)}):"
            " it is exported."
        )
    mixtures = {w: each for w, each in decision.gains.items() if w != STUDENT}
    best = max(mixtures, key=lambda weight: mixtures[weight].mean, default=None)
    nor = ""
    if best is not None:
        nor = f", nor was any mixture of the two (at best {_shown(mixtures[best])})"
    return (
        f"The trained student was not better than its start on {queries} ({_shown(trained)}){nor}:"
        " the start is exported."
    )


def run_gate(
    config: GateConfig,
    judge: Judge,
    student: EncoderConfig,
    folders: Mapping[str, str],
    context: StepContext,
) -> dict[str, Json]:
    """Judges every candidate and writes the encoder that is exported.

    `folders` names the step that training started from, then the one that trained, each with the
    folder of its encoder. The step's folder gets `encoder/`, and a row for each query.

    Raises:
        UserError: A model does not load.
    """
    import torch

    from actors.encoder import Encoder
    from actors.vectors import BrokenVectors
    from pipelines.training.interpolation import interpolate
    from pipelines.training.layers import add_linear_adapter

    def load(name: str) -> Encoder:
        folder = join(context.input(name).uri, folders[name])
        trust = student.trust_remote_code
        return Encoder.load(folder, device="cpu", trust_remote_code=trust)

    start, trained = map(load, folders)
    after = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    if start.model.state_dict().keys() != after.keys():  # what the linear adapter is mixed with
        add_linear_adapter(start, torch.eye(start.dimensions))
    before = start.model.state_dict()
    weights = (START, *config.interpolations, STUDENT)
    scores, notes = {}, list(judge.notes)

    def write(weight: float, folder: str) -> None:
        trained.model.load_state_dict(interpolate(before, after, weight))
        # The start is written as it came, without a matrix that changes nothing.
        chosen = load(next(iter(folders))) if weight == START else trained
        chosen.save(folder, model_card="# What the gate chose, before its export\n")

    total, done = len(weights) * judge.num_texts, 0
    for weight in weights:

        def progress(num_texts: int, weight: float = weight) -> None:
            nonlocal done
            done += num_texts
            context.progress.update(min(done, total), total, f"weight {weight:g}")

        with tempfile.TemporaryDirectory() as temporary:
            write(weight, temporary)
            candidate = EncoderConfig(
                model=temporary,
                max_tokens=student.max_tokens,
                dtype=student.dtype,
                trust_remote_code=student.trust_remote_code,
            )
            try:
                scores[weight] = judge.score(load_encoder(candidate), progress)
            except BrokenVectors as error:
                scores[weight] = np.zeros(len(judge.rows))
                notes.append(f"{name_weight(weight)} counts as finding nothing: {error}")
    decision = decide(
        scores,
        [row["group"] for row in judge.rows],
        config.significance,
        num_deciding=judge.num_deciding,
        own=judge.own,
    )
    with tempfile.TemporaryDirectory() as temporary:
        write(decision.weight, temporary)
        upload_folder(Path(temporary), context.storage, TRAINED)
    found = np.stack(list(scores.values()), axis=1)
    rows = [row | {"ndcg_at_10": each} for row, each in zip(judge.rows, found, strict=True)]
    table = pa.Table.from_pylist(rows, schema=GATE)
    context.log.append(write_shards(context.storage, table, _ROWS_PER_SHARD))
    num_deciding = len(rows) if judge.num_deciding is None else judge.num_deciding
    return {
        "weight": decision.weight,
        "exported": name_weight(decision.weight),
        "decision": explain(
            decision,
            f"{num_deciding:,} {judge.name}",
            f"{len(judge.own):,} titles and first sentences",
        ),
        "candidates": [
            _row(weight, scores[weight][:num_deciding], decision, with_own=bool(judge.own))
            for weight in weights
        ],
        "num_queries": num_deciding,
        "num_own_queries": len(judge.own),
        "notes": notes,
        **judge.metrics,
    }


def name_weight(weight: float) -> str:
    """Returns what a weight of the trained student makes, in a word or two."""
    names = {START: "the start", STUDENT: "the trained student"}
    return names.get(weight, f"{weight:g} of the trained student")


def _subject(weight: float) -> str:
    if weight == STUDENT:
        return "the trained student"
    return (
        f"a mixture of the trained student's weights ({weight:g}) and its start's ({1 - weight:g})"
    )


def _row(
    weight: float, scores: np.ndarray, decision: Decision, *, with_own: bool
) -> dict[str, Json]:
    row: dict[str, Json] = {
        "weight": weight,
        "name": name_weight(weight),
        "ndcg_at_10": float(scores.mean()) if len(scores) else None,
    }
    if gain := decision.gains.get(weight):
        row |= {"difference": gain.mean, "interval": [gain.low, gain.high], "p": gain.p}
        if with_own:
            lost = decision.losses[weight]
            row["own_queries"] = {
                "difference": -lost.mean,
                "interval": [-lost.high, -lost.low],
                "p_worse": lost.p,
            }
    return row


def _shown(gain: Gain) -> str:
    return f"{gain.mean:+.3f}, p {gain.p:.2g}"


def _held_out(config: GateConfig, context: StepContext) -> Judge:
    """Returns the judge of a run's own held-out queries."""
    items = read_known_items(
        context.input("passages"),
        context.input("seeds"),
        context.input("queries"),
        num_queries=config.num_queries,
        max_passages=config.max_passages,
    )
    own = [place for place, each in enumerate(items.queries) if each.kind != WRITTEN]
    kinds = dict(Counter(each.kind for each in items.queries[: items.num_deciding]))
    notes = []
    if (given := items.num_deciding) < config.num_queries:
        notes.append(
            f"There are {given:,} held-out queries, and gate.num_queries asks for"
            f" {config.num_queries:,}: the corpus has too few documents, of which"
            f" {MAX_HELD_OUT_SHARE:.0%} may be held out, or too few titles and sentences that can"
            " stand as queries."
        )
    return Judge(
        name="held-out queries",
        rows=[
            {
                "kind": each.kind,
                "query": each.query,
                "group": each.document,
                "passage_id": each.passage.id,
            }
            for each in items.queries
        ],
        num_texts=items.num_texts,
        score=lambda encoder, progress: known_item_ndcg(encoder, items, progress),
        num_deciding=items.num_deciding,
        own=own,
        metrics={"queries": kinds, "num_passages": len(items.pool)},
        notes=tuple(notes),
    )


def _test_set(test_set: TestSet) -> Judge:
    """Returns the judge of a test set's queries."""
    # The recipe was checked: it is a retrieval set.
    data = cast(RetrievalDataset, load_folder(test_set))

    def score(encoder: Encoder, progress: Progress) -> np.ndarray:
        result = evaluate(encoder, data, task=test_set.task, on_progress=progress)
        by_query = result.per_query["ndcg_at_10"]
        return np.array([by_query[query] for query in data.qrels])

    return Judge(
        name=f"queries of the test set {test_set.name}",
        rows=[
            {"kind": test_set.name, "query": data.queries[query], "group": query}
            for query in data.qrels
        ],
        num_texts=data.num_texts,
        score=score,
        metrics={"queries": {test_set.name: len(data.qrels)}, "num_passages": len(data.passages)},
        notes=(
            f"The test set {test_set.name} chose the model, so that model's scores on it are no"
            " unbiased measure.",
        ),
    )
