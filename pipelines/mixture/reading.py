"""The sets of a mixture, read and formatted by tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact, Json, write_rejects
from cluster.errors import Reject, TooManyRejects
from cluster.exchange import Shared
from cluster.file_list import FileList, shard_path
from cluster.files import FileEntry
from cluster.shard_groups import ShardGroup, shard_groups
from cluster.steps import StepContext
from cluster.storage import Storage, write_table
from pipelines.corpus.held_out import TrainingPassages, held_out_documents
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.labelled_examples import MAX_LISTED, Example, Reading, Target, read_examples
from pipelines.datasets.labelled_sets import RUN_PASSAGES, LabelledSet
from pipelines.mixture.config import MixtureConfig, SetsConfig
from pipelines.mixture.formats import Format
from pipelines.mixture.stored_rows import SHARDS_A_SET, copy_files, part, with_keys, write_rows

FRET_SET = "fret"


@dataclass(kw_only=True)
class LabelledCounts:
    """What became of the rows of labelled sets.

    Attributes:
        sets: Of each set, counts.
        contaminated: The first examples that repeat what the run is judged by.
    """

    sets: dict[str, Json] = field(default_factory=dict)
    contaminated: list[dict[str, str]] = field(default_factory=list)


def fret_of(config: SetsConfig) -> MixtureConfig | None:
    """Returns a configuration that mixes the step `fret`, None if it does not."""
    return config if isinstance(config, MixtureConfig) and config.fret_weight != 0 else None


def read_sets(
    config: SetsConfig, format_: Format, decontamination: Decontamination, context: StepContext
) -> tuple[Artifact, LabelledCounts]:
    """Writes the formatted texts of all sets, FRet first, and copies rejects to the step's.

    Raises:
        UserError: A labelled set does not exist.
        TooManyRejects: Too many rows of a labelled set cannot be read.
    """
    known, tasks = Shared.of(decontamination), list[_ReadFret | _ReadLabelled]()
    if fret := fret_of(config):
        tasks += [
            _ReadFret(format_=format_, only_tasks=fret.fret_only_tasks, group=group)
            for group in shard_groups(context.input(FRET_SET))
        ]
    for number, labelled in enumerate(config.labelled, start=1 if fret else 0):
        first = number * SHARDS_A_SET
        read = _ReadLabelled(format_=format_, labelled=labelled, known=known, first=first)
        if labelled.path == RUN_PASSAGES:
            tasks += [
                replace(read, passages=some, first=first + some.group.number)
                for some in _passages(context)
            ]
        else:
            tasks.append(read)
    own = part(context, "texts")
    texts, told = write_rows(_run, [(task, own.storage) for task in tasks], own)
    context.log.append(copy_files(own, context, "rejects", "rejects"))
    counts = LabelledCounts()
    for labelled in config.labelled:
        _add(
            counts,
            labelled,
            [
                tells
                for task, tells in zip(tasks, told, strict=True)
                if isinstance(task, _ReadLabelled) and task.labelled.name == labelled.name
            ],
            config.max_reject_share,
            context,
        )
    return texts, counts


def _add(
    counts: LabelledCounts,
    labelled: LabelledSet,
    told: list[dict[str, Any]],
    max_reject_share: float,
    context: StepContext,
) -> None:
    """Adds what the tasks of a set tell; raises TooManyRejects."""

    def total(name: str) -> Counter[str]:
        return sum((Counter(tells[name]) for tells in told), Counter[str]())

    num_rows, rejected = sum(tells["num_rows"] for tells in told), total("rejected")
    if rejected.total() > max_reject_share * num_rows:
        raise TooManyRejects.of(
            context.storage.uri.rpartition("/")[2],
            rejected,
            [cast(Reject, tuple(row)) for tells in told for row in tells["rejects"]],
            f"of set {labelled.name!r} accepted is a share of {max_reject_share} of {num_rows}:"
            " correct the set, name its fields, or raise max_reject_share",
        )
    counts.sets[labelled.name] = {
        "num_rows": num_rows,
        "num_examples": sum(tells["num_examples"] for tells in told),
        "rejected": dict(rejected),
        "left_out": dict(total("left_out")),
        "decontaminated": dict(total("decontaminated")),
    }
    texts = [
        {"set": labelled.name, "text": text, "evaluation_query": query}
        for tells in told
        for text, query in tells["contaminated"]
    ]
    counts.contaminated = [*counts.contaminated, *texts][:MAX_LISTED]


def _run(
    task: _ReadFret | _ReadLabelled, storage: Storage
) -> tuple[list[FileEntry], dict[str, Any]]:
    return task.write(storage)


@dataclass(frozen=True, kw_only=True)
class _ReadFret:
    """Formats some shards of the step `fret`, each to one of texts."""

    format_: Format
    only_tasks: tuple[str, ...]
    group: ShardGroup

    def write(self, storage: Storage) -> tuple[list[FileEntry], dict[str, Any]]:
        written = []
        for number, table in enumerate(self.group.tables(), self.group.number):
            examples = (
                each
                for each in _fret_examples(table)
                if not self.only_tasks or each.task in self.only_tasks
            )
            tables = _texts(self.format_, examples, FRET_SET, symmetric=False)
            written.append(write_table(storage, shard_path(number), pa.concat_tables(tables)))
        return written, {}


@dataclass(frozen=True, kw_only=True)
class _ReadLabelled:
    """Reads a labelled set, or that part of it which some of the run's passages give.

    Attributes:
        format_: Of the texts.
        labelled: The set.
        known: A `Decontamination`.
        first: The number of the first shard to write.
        passages: Of the run, for a set that is made of them.
    """

    format_: Format
    labelled: LabelledSet
    known: Shared
    first: int
    passages: _SomePassages | None = None

    def write(self, storage: Storage) -> tuple[list[FileEntry], dict[str, Any]]:
        labelled, reading = self.labelled, Reading(decontamination=self.known.get())
        passages = self.passages.artifact() if self.passages else None
        examples = read_examples(labelled, reading, passages)
        written = [
            write_table(storage, shard_path(number), table)
            for number, table in enumerate(
                _texts(self.format_, examples, labelled.name, symmetric=labelled.is_symmetric),
                self.first,
            )
        ]
        rejects = [(f"{labelled.name}: {id_}", why, text) for id_, why, text in reading.rejects]
        told = {
            "num_rows": reading.num_rows,
            "num_examples": sum(file.num_rows or 0 for file in written),
            "rejected": Counter(why for _, why, _ in rejects),
            "rejects": reading.rejects[:3],
            "left_out": reading.left_out,
            "decontaminated": reading.decontaminated,
            "contaminated": reading.contaminated,
        }
        return [*written, *write_rejects(storage, rejects, self.first)], told


@dataclass(frozen=True, kw_only=True)
class _SomePassages:
    """Some shards of the run's passages, and the documents whose passages are left out of them."""

    group: ShardGroup
    held_out: Shared

    def artifact(self) -> Artifact:
        whole = self.group.artifact
        return _Shards(whole.storage, whole.manifest, self.held_out.get(), self.group.shards)


@dataclass(frozen=True)
class _Shards(TrainingPassages):
    some: tuple[FileEntry, ...] = ()

    @property
    def shards(self) -> FileList:
        return FileList.of(self.some)


def _passages(context: StepContext) -> Iterator[_SomePassages]:
    """Yields the run's passages in groups, to be read without documents that are held out."""
    seeds = context.inputs.get("seeds")
    held_out = Shared.of(held_out_documents(seeds) if seeds else frozenset[str]())
    for group in shard_groups(context.input("passages")):
        yield _SomePassages(group=group, held_out=held_out)


def _texts(
    format_: Format, examples: Iterable[Example], dataset: str, *, symmetric: bool
) -> Iterator[pa.Table]:
    """Yields formatted texts, with what they are drawn by; one table at least."""
    for table in format_.load().texts(examples, dataset=dataset, symmetric=symmetric):
        yield with_keys(
            table,
            tasks=table["task"].to_pylist(),
            queries=table["query_id"].to_pylist(),
            positives=table["positive_id"].to_pylist(),
            symmetric=symmetric,
        )


def _fret_examples(table: pa.Table) -> Iterator[Example]:
    for row in table.filter(pc.is_null(table["dropped_by"])).to_pylist():
        # The candidates that were scored come first.
        fused = dict(zip(row["candidate_ids"], row["fused"], strict=False))
        negatives = zip(row["negatives"], row["negative_titles"], strict=True)
        yield Example(
            task=row["task"],
            query=row["query"],
            positive=Target(row["positive"], row["positive_title"]),
            negatives=tuple(Target(*negative) for negative in negatives),
            query_id=row["id"],
            positive_id=row["positive_id"],
            teacher_scores=tuple(fused[id_] for id_ in (row["positive_id"], *row["negative_ids"])),
        )
