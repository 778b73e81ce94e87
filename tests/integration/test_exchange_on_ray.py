"""The exchange by real Ray tasks: whatever the workers, the same rows; a killed one goes on."""

import os
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import TokayError
from cluster.exchange import PARTITION, Exchange, run_exchange
from cluster.steps import StepContext
from cluster.storage import Storage, open_storage, read_table
from pipelines.run.console import JsonLines

pytestmark = pytest.mark.slow
NUM_SOURCES, NUM_ROWS = 7, 300


@dataclass(frozen=True, kw_only=True)
class Sums(Exchange):
    """Numbers by key; notes each task in a folder, and dies once at the source `dies_at`."""

    notes: str
    dies_at: int | None = None
    raises_at: int | None = None

    def split(self, source: int) -> pa.Table:
        self.note(f"split-{source}")
        if source == self.dies_at and not Path(self.notes, "died").exists():
            Path(self.notes, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if source == self.raises_at:
            raise ValueError(f"source {source} is broken")
        draw = np.random.default_rng(source)
        keys = draw.integers(0, 50, NUM_ROWS)
        columns = {"key": keys, "source": np.full(NUM_ROWS, source), "n": range(NUM_ROWS)}
        places = keys * self.num_partitions // 50
        return pa.table({**columns, PARTITION: places})

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        self.note(f"merge-{rows['key'][0].as_py() * self.num_partitions // 50}")
        return rows, {"num_rows": rows.num_rows}

    def note(self, what: str) -> None:
        with Path(self.notes, what).open("a") as file:
            file.write("x")

    def noted(self) -> Counter[str]:
        sizes = {file.name: file.stat().st_size for file in Path(self.notes).iterdir()}
        return Counter({name: size for name, size in sizes.items() if size})


def context(storage: Storage) -> StepContext:
    return StepContext(storage=storage, inputs={}, progress=JsonLines())


def exchange(folder: Path, num_partitions: int = 5, num_cpus: float = 1.0, **more: int) -> Sums:
    folder.mkdir(parents=True)
    return Sums(
        num_partitions=num_partitions,
        order=("key",),
        num_cpus=num_cpus,
        notes=str(folder),
        **more,  # type: ignore[arg-type]
    )


def rows_of(storage: Storage) -> pa.Table:
    return pa.concat_tables([read_table(storage, path) for path in storage.list("shards")])


@pytest.mark.parametrize("num_partitions", [1, 2, 5])
def test_rows_are_the_same_whatever_the_partitions_and_workers(
    num_partitions: int, ray_session: None, tmp_path: Path
) -> None:
    tables, checksums = [], []
    for number, num_cpus in enumerate((0.5, 2.0)):  # four at a time, and one
        sums = exchange(tmp_path / f"{number}", num_partitions, num_cpus)
        made = context(open_storage(tmp_path / f"run-{number}"))
        counts = run_exchange(sums, range(NUM_SOURCES), made)
        assert counts == {"num_rows": NUM_SOURCES * NUM_ROWS}
        tables.append(rows_of(made.storage))
        checksums.append([file.sha256 for file in made.log.files()])
        assert len(checksums[-1]) == num_partitions
    assert tables[0].equals(tables[1]) and checksums[0] == checksums[1]
    rows = tables[0].to_pylist()
    # By key, then in the order of the sources and of their rows.
    assert rows == sorted(rows, key=lambda row: (row["key"], row["source"], row["n"]))
    assert len(rows) == NUM_SOURCES * NUM_ROWS


def test_task_that_is_killed_runs_again_and_loses_nothing(
    ray_session: None, tmp_path: Path
) -> None:
    storage = open_storage(tmp_path / "run")
    sums = exchange(tmp_path / "notes", dies_at=3)
    assert run_exchange(sums, range(NUM_SOURCES), context(storage))["num_rows"] == 2100
    whole = open_storage(tmp_path / "whole")
    run_exchange(exchange(tmp_path / "more"), range(NUM_SOURCES), context(whole))
    assert rows_of(storage).equals(rows_of(whole))
    assert sums.noted()["split-3"] == 2


def test_exchange_goes_on_where_it_stopped(ray_session: None, tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "run")
    broken = exchange(tmp_path / "notes", num_cpus=2.0, raises_at=4)
    with pytest.raises(TokayError, match="source 4 is broken"):
        run_exchange(broken, range(NUM_SOURCES), context(storage))
    mended = Sums(num_partitions=5, order=("key",), num_cpus=2.0, notes=broken.notes)
    first = context(storage)
    counts = run_exchange(mended, range(NUM_SOURCES), first)
    first.log.flush()
    assert counts == {"num_rows": 2100}
    noted = mended.noted()
    assert [noted[f"split-{n}"] for n in range(4)] == [1] * 4  # not again
    assert noted["split-4"] >= 2
    storage.delete("shards/000000002.parquet")
    again = context(storage)
    assert run_exchange(mended, range(NUM_SOURCES), again) == counts
    assert mended.noted() - noted == {"merge-2": 1}
    assert sum(file.num_rows or 0 for file in again.log.files()) == 2100


def test_empty_partition_has_no_shard_and_an_odd_one_is_refused(
    ray_session: None, tmp_path: Path
) -> None:
    storage = open_storage(tmp_path / "run")
    sums = exchange(tmp_path / "notes", num_partitions=200)
    assert run_exchange(sums, [0], context(storage))["num_rows"] == NUM_ROWS
    assert 1 < len(storage.list("shards")) <= 50
    with pytest.raises(TokayError, match="partitions"):
        run_exchange(_Odd(num_partitions=2, order=()), [0], context(storage))


@dataclass(frozen=True, kw_only=True)
class _Odd(Exchange):
    def split(self, source: int) -> pa.Table:
        return pa.table({PARTITION: [0, 2]})

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        raise AssertionError("unreachable")
