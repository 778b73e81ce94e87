import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, write_rejects, write_shards
from cluster.errors import DUPLICATES, ArtifactError, StorageError, TooManyRejects, UserError
from cluster.steps import Run, Step, StepContext
from cluster.storage import open_storage


class Listener:
    def __init__(self) -> None:
        self.events: list[str] = []

    def step_found(self, step: Step, artifact: Artifact) -> None:
        self.events.append(f"found {step.name}")

    def step_begins(self, step: Step, resumed: bool) -> "Listener":
        self.events.append(f"{'resumed' if resumed else 'begins'} {step.name}")
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None:
        self.events.append(f"done {step.name}")

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        pass


def write(context: StepContext) -> dict[str, object]:
    write_shards(context.storage, pa.table({"id": ["a", "b", "c"]}), 2)
    return {"num": 3}


def double(context: StepContext) -> dict[str, object]:
    ids = context.input("one").read()["id"].to_pylist()
    write_shards(context.storage, pa.table({"id": ids + ids}), 4)
    return {}


def steps(one: dict[str, object] | None = None) -> list[Step]:
    return [
        Step(name="one", config=one or {"k": 1}, inputs=(), work=write),
        Step(name="two", config={}, inputs=("one",), work=double),
    ]


def events_of(run: Run, **options: object) -> list[str]:
    listener = Listener()
    run.execute(listener, **options)  # type: ignore[arg-type]
    return listener.events


def test_finished_steps_are_not_run_again(tmp_path: Path) -> None:
    assert events_of(Run(str(tmp_path), steps())) == [
        "begins one",
        "done one",
        "begins two",
        "done two",
    ]
    assert events_of(Run(str(tmp_path), steps())) == ["found one", "found two"]


def test_manifest_names_every_shard_with_rows_and_checksum(tmp_path: Path) -> None:
    artifact = Run(str(tmp_path), steps()).execute(Listener())["one"]
    assert [(s.path, s.num_rows) for s in artifact.shards] == [
        ("shards/00000.parquet", 2),
        ("shards/00001.parquet", 1),
    ]
    artifact.verify()
    shard = tmp_path / "one" / "shards" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"00001\.parquet does not match its checksum"):
        artifact.verify()


def test_missing_shard_is_never_read_as_empty(tmp_path: Path) -> None:
    artifact = Run(str(tmp_path), steps()).execute(Listener())["one"]
    (tmp_path / "one" / "shards" / "00000.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"00000\.parquet is missing"):
        artifact.read()


def test_step_that_dies_is_resumed_and_its_shards_are_no_result(tmp_path: Path) -> None:
    def die(context: StepContext) -> dict[str, object]:
        write(context)
        raise RuntimeError("power cut")

    dying = Step(name="one", config={"k": 1}, inputs=(), work=die)
    with pytest.raises(RuntimeError):
        Run(str(tmp_path), [dying]).execute(Listener())
    assert Run(str(tmp_path), steps()).artifact(steps()[0]) is None
    assert events_of(Run(str(tmp_path), steps()))[0] == "resumed one"


def test_other_configuration_is_refused_by_key_and_rebuilt_on_demand(tmp_path: Path) -> None:
    Run(str(tmp_path), steps()).execute(Listener())
    changed = Run(str(tmp_path), steps({"k": 2}))
    with pytest.raises(UserError, match=r"step 'one' of another configuration \(k: 1 -> 2\)"):
        changed.execute(Listener())
    assert events_of(changed, rebuild=True) == ["begins one", "done one", "begins two", "done two"]


def test_change_upstream_changes_everything_after_it(tmp_path: Path) -> None:
    before, after = Run(str(tmp_path), steps()), Run(str(tmp_path), steps({"k": 2}))
    assert before.fingerprint(before.steps[1]) != after.fingerprint(after.steps[1])


def test_rebuild_leaves_nothing_of_the_old_step(tmp_path: Path) -> None:
    Run(str(tmp_path), steps()).execute(Listener())
    (tmp_path / "one" / "shards" / "00007.parquet").write_bytes(b"old")
    Run(str(tmp_path), steps({"k": 2})).execute(Listener(), rebuild=True)
    assert not (tmp_path / "one" / "shards" / "00007.parquet").exists()


def test_until_stops_there_and_names_the_steps(tmp_path: Path) -> None:
    assert events_of(Run(str(tmp_path), steps()), until="one") == ["begins one", "done one"]
    with pytest.raises(UserError, match="choose one of one, two"):
        Run(str(tmp_path), steps()).execute(Listener(), until="three")


def test_second_process_is_kept_out(tmp_path: Path) -> None:
    def run_again(context: StepContext) -> dict[str, object]:
        with pytest.raises(UserError, match="another process is at work"):
            Run(str(tmp_path), steps()).execute(Listener(), rebuild=True)
        return write(context)

    Run(str(tmp_path), [Step(name="one", config={}, inputs=(), work=run_again)]).execute(
        Listener(), rebuild=True
    )


def test_too_many_rejects_fail_the_step_with_the_commonest_reason(tmp_path: Path) -> None:
    def refuse(context: StepContext) -> dict[str, object]:
        write(context)
        write_rejects(context.storage, [("x", "empty", ""), ("y", "empty", ""), ("z", "long", "")])
        return {}

    def step(share: float) -> Step:
        return Step(name="s", config={}, inputs=(), work=refuse, max_reject_share=share)

    with pytest.raises(
        TooManyRejects, match=r"refused 3 rows, mostly 'empty' \(2\), 'long' \(1\).*x: empty"
    ):
        Run(str(tmp_path), [step(0.4)]).execute(Listener())
    artifact = Run(str(tmp_path), [step(0.5)]).execute(Listener())["s"]
    assert artifact.rejects()["reason"].to_pylist() == ["empty", "empty", "long"]


def test_duplicates_are_rejects_that_stop_no_step(tmp_path: Path) -> None:
    def refuse(context: StepContext) -> dict[str, object]:
        write(context)
        repeats = [("x", reason, "") for reason in DUPLICATES] * 50
        write_rejects(context.storage, [*repeats, ("y", "empty", "")])
        return {"num_duplicates": len(repeats)}

    def step(share: float) -> Step:
        return Step(name="s", config={}, inputs=(), work=refuse, max_reject_share=share)

    with pytest.raises(TooManyRejects, match=r"refused 1 rows, mostly 'empty' \(1\), and"):
        Run(str(tmp_path), [step(0.1)]).execute(Listener())
    artifact = Run(str(tmp_path), [step(0.5)]).execute(Listener())["s"]
    assert (artifact.num_rejects, artifact.num_duplicates) == (1, 100)
    assert artifact.rejects().num_rows == 101


def test_run_works_on_s3(bucket: str) -> None:
    assert events_of(Run(f"{bucket}/r", steps()))[-1] == "done two"
    assert events_of(Run(f"{bucket}/r", steps())) == ["found one", "found two"]
    manifest = json.loads(open_storage(f"{bucket}/r").read_bytes("two/manifest.json"))
    assert manifest["inputs"].keys() == {"one"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_is_one_line_and_with_room_the_run_goes_on(small_disk: Path) -> None:
    table = pa.table({"bytes": [os.urandom(10_000) for _ in range(40)]})

    def work(context: StepContext) -> dict[str, object]:
        write_shards(context.storage, table, 4)
        return {}

    run = Run(str(small_disk / "run"), [Step(name="big", config={}, inputs=(), work=work)])
    with pytest.raises(StorageError, match=r"No space left.*the disk is full: make room") as error:
        run.execute(Listener())
    assert "\n" not in str(error.value)
    assert run.artifact(run.steps[0]) is None
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    artifact = run.execute(Listener())["big"]
    artifact.verify()
    assert artifact.read().equals(table)
