"""The step `passages`: the corpus cleaned, cut and deduplicated; what there is to search.

Ray tasks read its units (`units`) and write parts (`parts`), look for rows that repeat earlier ones
(`repeats`), and write each part's shards without those. Each task is resumed; the driver holds a
few numbers of each.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.artifacts import Json, write_rejects
from cluster.errors import DUPLICATE, NEAR_DUPLICATE, Reject, UserError
from cluster.exchange import run_described
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.parquet import open_parquet
from cluster.shard_log import ShardLog
from cluster.steps import Progress, Step, StepContext
from cluster.storage import Storage, join, open_storage, write_table
from pipelines.corpus.cutting import SHOWN, Passage
from pipelines.corpus.near_duplicates import NUM_PERM, SCHEME, near_duplicates, num_bands
from pipelines.corpus.parts import (
    Part,
    cut_documents,
    part_path,
    passages_per_shard,
    read_files,
)
from pipelines.corpus.repeats import find_repeats, read_repeats
from pipelines.corpus.units import Unit, divide
from pipelines.datasets.corpus import Corpus
from pipelines.fingerprints import fingerprinted
from pipelines.records import PASSAGE

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

log = logging.getLogger(__name__)

TITLE = "clean, cut and deduplicate the corpus"


def step(recipe: Recipe) -> Step:
    """Returns the step; raises UserError for a corpus that does not exist."""
    corpus, sample = Corpus(recipe.corpus), recipe.probe.sample
    config = {
        "corpus": fingerprinted(recipe.corpus),
        "version": corpus.version(),
        "near_duplicates": {"scheme": SCHEME, "num_perm": NUM_PERM, "rule": "first of each band"},
    }
    return Step(
        name="passages",
        config={**config, "sample": sample} if sample else config,
        inputs=(),
        work=lambda context: make_passages(corpus, context, sample),
        max_reject_share=recipe.corpus.max_reject_share,
    )


def make_passages(
    corpus: Corpus, context: StepContext, sample: int | None = None
) -> dict[str, Json]:
    """Cleans, cuts and deduplicates the corpus; duplicates are rejects that are no bad rows.

    With `sample` the passages are at most so many, of documents that are drawn by a hash.

    Raises:
        UserError: No passage is left, or no row has a field that the recipe names.
    """
    import icu4py

    if corpus.passed_over and corpus.format == "auto":
        left = ", ".join(f"{count} {suffix}" for suffix, count in corpus.passed_over.most_common(5))
        log.warning("of corpus %s these files are not read: %s", corpus.config.path, left)
    threshold = corpus.config.near_duplicate_threshold
    target = open_storage(join(context.storage.uri, "work/parts"))
    read = _read(corpus, _units(corpus, context, sample), target, context.progress, sample)
    corpus.check_fields(read.field_names)
    num_passages = read.counts["num_passages"]
    if not num_passages:
        raise _no_passage(corpus, read.counts["num_rejects"], read.first_reason)
    behind = _Behind(progress=context.progress, num_units=read.num_units, note="")
    note = f"{num_passages:,} passages"
    progress = replace(behind, note=f"{note}, looking for duplicates")
    repeats = find_repeats(
        read.parts, num_passages, target, threshold, replace(context, progress=progress)
    )
    progress = replace(behind, note=f"{note}, writing")
    arguments = [
        (part, target, (repeats.storage, path) if path else None, context.storage)
        for part, path in zip(read.parts, repeats.paths, strict=True)
        if part.num_groups
    ]
    written = Counter[str]()
    for number, (_, counts) in enumerate(run_described(_write, arguments, context.log), start=1):
        written.update(counts)
        progress.update(number, len(arguments))
    metrics: dict[str, Json] = {
        "num_documents": read.counts["num_documents"],
        "num_passages": written["num_passages"],
        "num_duplicates": repeats.num_duplicates + repeats.num_near_duplicates,
        "files_passed_over": dict(corpus.passed_over),
        "records_passed_over": dict(read.records_passed_over),
        "icu_version": icu4py.icu_version,  # its dictionaries decide where words end
    }
    if threshold is not None:
        metrics["minhash"] = {
            "scheme": SCHEME,
            "num_perm": NUM_PERM,
            **dict(zip(("num_bands", "values_per_band"), num_bands(threshold), strict=True)),
        }
    return metrics


def cut_corpus(
    corpus: Corpus,
    progress: Callable[[float, float | None, str], None] = lambda *_: None,
    sample: int | None = None,
) -> tuple[list[Passage], list[Reject], int]:
    """Does what the step does in this process, for a corpus that its memory holds.

    Returns a corpus's passages in their order, what was refused, and how many documents it has.
    With `sample` there are at most so many passages, of whole documents but for the last one.

    Raises:
        UserError: No passage is left.
    """
    passages: list[Passage] = []
    rejects: list[Reject] = []
    ids: set[str] = set()
    num_documents = 0
    for cut in cut_documents(corpus.documents(), corpus, sample):
        num_documents += 1
        for each in cut:
            if not isinstance(each, Passage):
                rejects.append(each)
            elif each.id in ids:
                rejects.append((each.source, DUPLICATE, each.text[:SHOWN]))
            else:
                ids.add(each.id)
                passages.append(each)
        if num_documents % 100 == 0:
            progress(num_documents, None, f"{len(passages)} passages")
    threshold = corpus.config.near_duplicate_threshold
    if threshold is not None:
        progress(num_documents, None, "near-duplicates")
        drop = near_duplicates([passage.text for passage in passages], threshold)
        rejects += [
            (passages[row].source, NEAR_DUPLICATE, passages[row].text[:SHOWN])
            for row in sorted(drop)
        ]
        passages = [passage for row, passage in enumerate(passages) if row not in drop]
    if not passages:
        raise _no_passage(corpus, len(rejects), rejects[0][1] if rejects else None)
    return passages, rejects, num_documents


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What tasks tell that have read a corpus.

    Attributes:
        num_units: That they have read.
        parts: In the order of the corpus.
        counts: Of documents, passages and rejects.
        first_reason: Of the first reject, if there is one.
        field_names: Some of those that rows have.
        records_passed_over: Of archives, by kind.
    """

    num_units: int
    parts: list[Part]
    counts: Counter[str]
    first_reason: str | None
    field_names: dict[str, None]
    records_passed_over: Counter[str]


@dataclass(frozen=True, kw_only=True)
class _Behind:
    """Progress of what comes when all units are read."""

    progress: Progress
    num_units: int
    note: str

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Reports `done` of `total` in the note."""
        self.progress.update(self.num_units, self.num_units, f"{self.note} {done:.0f}/{total:.0f}")


def _units(corpus: Corpus, context: StepContext, sample: int | None) -> list[Unit]:
    if sample:  # of all documents, by one task
        return [Unit(files=corpus.files)]
    return divide(corpus, open_storage(join(context.storage.uri, "work/units")), context.progress)


def _read(
    corpus: Corpus, units: list[Unit], target: Storage, progress: Progress, sample: int | None
) -> _Read:
    num_cpus, per_shard = _cpus_per_task(len(units)), passages_per_shard(sum(corpus.sizes()))
    arguments = [
        (corpus.some(unit.files, unit.span), number, target, per_shard, num_cpus, sample)
        for number, unit in enumerate(units)
    ]
    told: dict[int, dict[str, Any]] = {}
    counts, passed_over = Counter[str](), Counter[str]()
    for number, tells in run_described(read_files, arguments, ShardLog(target), num_cpus):
        told[number] = tells
        counts.update({name: tells[name] for name in tells if name.startswith("num_")})
        passed_over.update(tells["records_passed_over"])
        progress.update(len(told), len(units), f"{counts['num_passages']:,} passages")
    in_order = [told[number] for number in range(len(units))]
    parts: list[Part] = []
    shard = 0
    for task, tells in enumerate(in_order):
        for number, num_groups in enumerate(tells["groups"]):
            path = part_path(task, number)
            parts.append(
                Part(number=len(parts), path=path, num_groups=num_groups, first_shard=shard)
            )
            shard += num_groups
    return _Read(
        num_units=len(units),
        parts=parts,
        counts=counts,
        first_reason=next((t["first_reason"] for t in in_order if "first_reason" in t), None),
        field_names=dict.fromkeys(name for tells in in_order for name in tells["field_names"]),
        records_passed_over=passed_over,
    )


def _cpus_per_task(num_tasks: int) -> int:
    """Returns how many cores each of some tasks can have, for pages, on a cluster with no other."""
    import ray

    if not ray.is_initialized():  # then the tasks run in this process, one by one
        return 1
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, int(min(max(nodes, default=1), sum(nodes) / num_tasks)))


def _write(
    part: Part, parts: Storage, repeated: tuple[Storage, str] | None, target: Storage
) -> tuple[list[FileEntry], Json]:
    """Writes the shards of a part, and its rejects; a Ray task."""
    reasons: dict[int, str] = {}
    if repeated:
        rows, is_id = read_repeats(*repeated, part.number)
        names = (DUPLICATE if each else NEAR_DUPLICATE for each in is_id)
        reasons = dict(zip(rows.tolist(), names, strict=True))
    files: list[FileEntry] = []
    rejects: list[Reject] = []
    start = num_passages = 0
    with parts.open(part.path) as content:
        file = open_parquet(content, join(parts.uri, part.path))
        for group in range(part.num_groups):
            table = file.read_row_group(group)
            why = [
                reasons.get(row, reason)
                for row, reason in enumerate(table["reason"].to_pylist(), start)
            ]
            refused = np.array([reason is not None for reason in why])
            start += table.num_rows
            kept = table.filter(~refused).select(PASSAGE.names).cast(PASSAGE)
            if kept.num_rows:
                files.append(write_table(target, shard_path(part.first_shard + group), kept))
                num_passages += kept.num_rows
            sources, texts = (
                table[name].filter(refused).to_pylist() for name in ("source", "text")
            )
            rejects += zip(
                sources, filter(None, why), (text[:SHOWN] for text in texts), strict=True
            )
    files += write_rejects(target, rejects, part.number)
    return files, {"num_passages": num_passages}


def _no_passage(corpus: Corpus, num_rejects: int, first_reason: str | None) -> UserError:
    return UserError(
        f"corpus {corpus.config.path} gave no passage: {num_rejects} rejects, the first because"
        f" {first_reason!r}"
        if num_rejects
        else f"corpus {corpus.config.path} holds no documents"
    )
