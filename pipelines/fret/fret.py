"""The step `fret`: scored candidates become training examples, and queries unfit for it are marked.

Every query keeps its row, with the rule that dropped it if one did: an LLM was paid for it, and
another threshold may want it.
"""

from __future__ import annotations

import sys
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from cluster.artifacts import Artifact, Json, unfinished_artifact
from cluster.config import Config
from cluster.exchange import Exchange, Shared, run_exchange, run_tasks
from cluster.file_list import shard_path
from cluster.key_filter import KeyFilter
from cluster.shard_groups import shard_groups
from cluster.steps import Progress, Step, StepContext
from cluster.storage import join, open_storage, write_table
from pipelines.datasets.decontamination import REASONS, Decontamination
from pipelines.fingerprints import fingerprinted
from pipelines.fret.figures import ShardFigures, figures_of
from pipelines.fret.fusion import JUDGES, LLM_JUDGES, asks_cross_encoder, asks_llm
from pipelines.fret.judging import Judging, judging_of
from pipelines.fret.labelling import (
    CANDIDATES_SOURCE,
    DROPPED_SOURCE,
    LABELS_SOURCE,
    PASSAGES_SOURCE,
    QUERIES_PER_SHARD,
    SCORES_SOURCE,
    TEXTS_PER_SHARD,
    TEXTS_SOURCE,
    FindTexts,
    JoinTexts,
    LabelQueries,
    Source,
    num_partitions,
    sources_of,
    wanted_codes,
)
from pipelines.fret.repeated_queries import FindRepeated, drop_repeated
from pipelines.records import FRET

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "choose positives and hard negatives"
AUTO = "auto"
_SCORING = ("probe", "scores", "cross_scores")  # the steps that may have scored pairs


class FretConfig(Config):
    """How labels are chosen from the scored candidates. The defaults are Gecko's."""

    fusion: str = Field(
        default="ql+rc",
        description="judges, joined by +: ql, rc, and sim, the retriever's similarity; with"
        " cross_encoder also ce; with candidates.lexical also lex, BM25, and hybrid, the sum that"
        " ordered the candidates; without ql and rc no pair is scored by the LLM, and without ce"
        " too all candidates are judged; auto: what"
        " the step `probe` finds best, its scale too, and if that is the retriever alone, the seed"
        " is the positive and the retriever judges the others",
    )
    scale: Literal["ranks", "z-scores"] = Field(
        default="ranks",
        description="what of each judge is added up: 1 / rank, or its scores, standardised over a"
        " query's scored candidates (hybrid's are standardised over the corpus already)",
    )
    positive: Literal["fused", "seed"] = Field(
        default="fused", description="the candidate that ranks highest, or the seed passage"
    )
    negative: Literal["lowest", "random", "none", "all"] = Field(
        default="lowest",
        description="which of the other candidates; all: every one that was scored, whatever the"
        " two rules below say, as a list for training.loss.distillation_weight",
    )
    num_negatives: int = Field(
        default=1, ge=1, description="hard negatives an example, as many as are fit; Gecko has one"
    )
    max_negative_similarity: float | None = Field(
        default=None,
        gt=0,
        description="negatives must be less similar to the query than this share of the"
        " positive's similarity (NV-Retriever's 0.95); Gecko has no such rule",
    )
    max_query_similarity: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="drop queries whose word trigrams repeat an earlier query's to this share"
        " (Jaccard)",
    )
    seed: int = 0

    @field_validator("fusion")
    @classmethod
    def _of_judges(cls, fusion: str) -> str:
        names = fusion.split("+")
        if fusion != AUTO and (len(set(names)) < len(names) or not JUDGES.keys() >= set(names)):
            raise ValueError(
                f"accepted are {AUTO}, or {', '.join(JUDGES)}, each once, joined by + (ql+sim)"
            )
        return fusion

    @property
    def asks_llm(self) -> bool:
        """Whether a judge is the LLM, for which pairs are scored."""
        return asks_llm(self.fusion)

    @property
    def llm_judges(self) -> tuple[str, ...]:
        """The judges that are the LLM; with `auto` all that there are."""
        named = LLM_JUDGES if self.fusion == AUTO else self.fusion.split("+")
        return tuple(judge for judge in LLM_JUDGES if judge in named)

    @property
    def asks_cross_encoder(self) -> bool:
        """Whether a judge is the cross-encoder, for which pairs are scored too."""
        return asks_cross_encoder(self.fusion)

    @property
    def scores_pairs(self) -> bool:
        """Whether some candidates are scored for a judge, and those alone are labelled."""
        return self.asks_llm or self.asks_cross_encoder


def step(recipe: Recipe, decontamination: Decontamination) -> Step:
    """Returns the step; `decontamination` knows the texts of the run's own test sets."""
    fixed = recipe.mixture.fixed_passages is not None
    return Step(
        name="fret",
        config={
            **fingerprinted(recipe.fret),
            **({"fixed_passages": True} if fixed else {}),
            "decontamination": decontamination.fingerprint(),
        },
        inputs=(
            "candidates",
            *(["probe"] if recipe.has_probe else []),
            *(["scores"] if recipe.fret.asks_llm else []),
            *(["cross_scores"] if recipe.fret.asks_cross_encoder else []),
            "passages",
        ),
        work=lambda context: make_fret(
            recipe.fret,
            decontamination,
            context,
            fixed=fixed,
            ordered_by=recipe.candidates.ordered_by,
        ),
    )


def make_fret(
    config: FretConfig,
    decontamination: Decontamination,
    context: StepContext,
    *,
    fixed: bool = False,
    ordered_by: str = "sim",
) -> dict[str, Json]:
    """Chooses each query's positive and hard negatives, and applies the filters.

    Where passages are `fixed`, all candidates are labelled, also those that were not scored, and
    the negatives' texts, which nobody reads, are left out. Where a probe found the teacher to be no
    better than the order of the candidates, nothing but its own queries was scored: then the first
    are labelled, as many as would have been scored. That order is by the judge `ordered_by`.

    All of it is done by exchanges and tasks; see `labelling` and `repeated_queries`.
    """
    candidates, probe = context.input("candidates"), context.inputs.get("probe")
    judged = config.scores_pairs and not probe
    judging = judging_of(config.fusion, config.scale, ordered_by) if judged else None
    known = Shared.of(decontamination)
    num_unscored = 0 if config.scores_pairs else sys.maxsize
    label_all = fixed or not config.scores_pairs
    if probe:
        config = as_chosen(config, probe)
        if probe.manifest.metrics["fusion"] is None:
            num_unscored = probe.manifest.metrics["num_scored"]
    parts = num_partitions(candidates.num_rows, QUERIES_PER_SHARD)
    label = LabelQueries(
        num_partitions=parts,
        config=config,
        decontamination=known,
        label_all=label_all,
        num_unscored=num_unscored,
        only_positives=fixed,
    )
    scores = [context.inputs[name] for name in _SCORING if name in context.inputs]
    sources = list(sources_of(CANDIDATES_SOURCE, candidates))
    sources += [source for each in scores for source in sources_of(SCORES_SOURCE, each)]
    labels, counts = _exchange(label, sources, "labels", context)
    repeated = FindRepeated(num_partitions=parts, threshold=config.max_query_similarity)
    alike, _ = _exchange(repeated, list(sources_of(LABELS_SOURCE, labels)), "repeated", context)
    texts = _texts(labels, counts["num_texts"], fixed, context)
    sources = [*sources_of(LABELS_SOURCE, labels), *sources_of(TEXTS_SOURCE, texts)]
    sources += sources_of(DROPPED_SOURCE, _dropped(alike, context))
    run_exchange(JoinTexts(num_partitions=parts, rows_each=QUERIES_PER_SHARD), sources, context)
    if not candidates.num_rows:  # a shard without rows keeps the columns
        context.log.append([write_table(context.storage, shard_path(0), FRET.empty_table())])
    return _metrics(decontamination, known, judging, context)


def _part(name: str, context: StepContext) -> StepContext:
    """Returns the context of a part of the work, which has a folder and a log of its own."""
    storage = open_storage(join(context.storage.uri, "work", name))
    return replace(context, storage=storage, progress=_Part(context.progress, name))


@dataclass(frozen=True)
class _Part:
    """Says which part of the step it is."""

    progress: Progress
    name: str

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        self.progress.update(done, total, f"{self.name}: {note}" if note else self.name)


def _exchange(
    exchange: Exchange, sources: list[Source], name: str, context: StepContext
) -> tuple[Artifact, Counter[str]]:
    """Returns what an exchange brings together on the way, and its counts."""
    part = _part(name, context)
    counts = run_exchange(exchange, sources, part)
    return unfinished_artifact(part.storage, part.log.files()), counts


def _texts(labels: Artifact, num_texts: int, fixed: bool, context: StepContext) -> Artifact:
    """Returns the texts that the labels ask for, each for each query that asks for it."""
    passages = context.input("passages")
    asking = ((group, fixed) for group in shard_groups(labels))
    wanted = KeyFilter.of(num_texts, run_tasks(wanted_codes, asking))
    num_rows = num_texts + round(wanted.share * passages.num_rows)
    find = FindTexts(
        num_partitions=num_partitions(num_rows, TEXTS_PER_SHARD),
        only_positives=fixed,
        wanted=Shared.of(wanted),
    )
    sources = [*sources_of(LABELS_SOURCE, labels), *sources_of(PASSAGES_SOURCE, passages)]
    return _exchange(find, sources, "texts", context)[0]


def _dropped(alike: Artifact, context: StepContext) -> Artifact:
    """Returns which queries are dropped because they repeat others."""
    part = _part("dropped", context)
    for written in run_tasks(drop_repeated, iter([(alike, part.storage)])):
        part.log.append(written)
    return unfinished_artifact(part.storage, part.log.files())


def _metrics(
    decontamination: Decontamination,
    known: Shared,
    judging: Judging | None,
    context: StepContext,
) -> dict[str, Json]:
    """Returns the figures of all shards, which tasks count."""
    files, new = context.log.files().below("shards/"), deepcopy(judging)
    shards = ((number, context.storage, file.path, known, new) for number, file in enumerate(files))
    total, waiting, number = ShardFigures(judging=judging), dict[int, ShardFigures](), 0
    for place, figures in run_tasks(figures_of, shards):
        waiting[place] = figures
        while number in waiting:  # in order, since sums of fractions depend on it
            total.add(waiting.pop(number))
            number += 1
            context.progress.update(number, len(files), "counting")
    return {
        **total.counts,
        "dropped_by": dict(total.dropped_by),
        "num_evaluation_queries": len(decontamination),
        "highest_overlap_kept": round(total.highest_overlap, 4),
        "num_contaminated": sum(total.dropped_by[reason] for reason in REASONS),
        "contaminated": total.contaminated,
        **(judging.metrics() if judging else {}),
    }


def as_chosen(config: FretConfig, probe: Artifact) -> FretConfig:
    """Returns the configuration with what a probe chose: with SKIP the seed, and the retriever.

    The retriever is the first of the probe's rankings: the judge that ordered the candidates.
    """
    chosen = probe.manifest.metrics
    if chosen["fusion"] is None:
        retriever = chosen["judges"][0]["fusion"]
        update = {"fusion": retriever, "scale": "z-scores", "positive": "seed"}
    else:
        update = {"fusion": chosen["fusion"], "scale": chosen["scale"]}
    return config.model_copy(update=update)
