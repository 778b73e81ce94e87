"""A corpus is divided into units: what one Ray task reads, small files or a span of a large one.

A span's rows are numbered as in the whole file. So what each one holds is counted first, which is
cheap beside reading it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from cluster.exchange import run_described
from cluster.files import FileEntry
from cluster.shard_log import ShardLog
from pipelines.datasets.sources.streams import Span

if TYPE_CHECKING:
    from cluster.artifacts import Json
    from cluster.steps import Progress
    from cluster.storage import Storage
    from pipelines.datasets.corpus import Corpus

_MAX_UNITS = 4096  # but for those of small files, and the last span of each large one
_FEWEST_BYTES = 8 << 20  # of a unit, if there are so many
_MAX_FILES = 1024  # of a unit
_SPANS_AT_ONCE = 16  # that a task counts


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Files that a task reads or, where there is a span, that of one file."""

    files: list[str]
    span: Span | None = None


def divide(corpus: Corpus, target: Storage, progress: Progress) -> list[Unit]:
    """Divides a corpus, in its order, into units that give what it gives as a whole.

    Args:
        corpus: All of it.
        target: Gets what Ray tasks have counted, so that a resume does not count it again.
        progress: Is told of them.
    """
    sizes = corpus.sizes()
    max_bytes = _max_bytes(sizes)
    spans = {
        file: _spans(size, max_bytes)
        for file, size in zip(corpus.files, sizes, strict=True)
        if size > max_bytes and corpus.has_spans(file)
    }
    counts = _counts(corpus, spans, target, progress)
    units: list[Unit] = []
    for files in file_groups(corpus.files, sizes):
        if nums := counts.get(files[0]):
            before = accumulate(nums, initial=0)
            # Where nothing is counted, nothing begins; but the first has the first line.
            units += [
                Unit(files=files, span=replace(span, num_before=num_before))
                for span, num, num_before in zip(spans[files[0]], nums, before, strict=False)
                if num or span.start == 0
            ]
        else:
            units.append(Unit(files=files))
    return units


def file_groups(files: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    """Groups files in their order: of small ones a task reads many, a large one stands alone.

    >>> file_groups(["a", "b", "c"], [1 << 20, 2 << 20, 9 << 20])
    [['a', 'b'], ['c']]
    """
    max_bytes = _max_bytes(sizes)
    groups: list[list[str]] = []
    num_bytes = 0
    for file, size in zip(files, sizes, strict=True):
        if not groups or num_bytes + size > max_bytes or len(groups[-1]) == _MAX_FILES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(file)
        num_bytes += size
    return groups


def _max_bytes(sizes: Sequence[int]) -> int:
    """Returns the most bytes of a unit, unless it is a file that must be read whole."""
    return max(_FEWEST_BYTES, sum(sizes) // _MAX_UNITS)


def _spans(num_bytes: int, max_bytes: int) -> list[Span]:
    """Divides a file into spans of about one size, and of at most `max_bytes`."""
    num = -(-num_bytes // max_bytes)
    borders = pairwise(num_bytes * number // num for number in range(num + 1))
    return [Span(start=start, stop=stop) for start, stop in borders]


def _counts(
    corpus: Corpus, spans: Mapping[str, list[Span]], target: Storage, progress: Progress
) -> dict[str, list[int]]:
    """Returns what is counted in each file's spans; files that must be read whole are left out."""
    asked = [
        (file, some[start : start + _SPANS_AT_ONCE])
        for file, some in spans.items()
        for start in range(0, len(some), _SPANS_AT_ONCE)
    ]
    if not asked:
        return {}
    arguments = [
        (corpus.some([file]), some, number, target) for number, (file, some) in enumerate(asked)
    ]
    told: dict[int, list[int] | None] = {}
    for number, tells in run_described(_count, arguments, ShardLog(target)):
        told[number] = tells
        progress.update(0, None, f"counting lines of large files {len(told)}/{len(asked)}")
    counts: dict[str, list[int]] = {file: [] for file in spans}
    for number, (file, _) in enumerate(asked):
        nums = told[number]
        if nums is None:
            counts.pop(file, None)
        elif file in counts:
            counts[file] += nums
    return counts


def _count(
    corpus: Corpus, spans: list[Span], number: int, target: Storage
) -> tuple[list[FileEntry], Json]:
    """Counts spans of a corpus of one file, which the log of `target` keeps; a Ray task."""
    nums = corpus.count(spans)
    with target.writing(f"shards/{number:09d}.json") as file:
        file.write(json.dumps(nums).encode())
    return [file.entry()], nums
