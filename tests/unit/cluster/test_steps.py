import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cluster import artifacts
from cluster.artifacts import Artifact, write_rejects, write_shards
from cluster.errors import DUPLICATES, ArtifactError, StorageError, TooManyRejects, UserError
from cluster.steps import MARKER, Run, Step, StepContext
from cluster.storage import LocalStorage, Storage, open_storage, read_table


class Listener:
    def __init__(self) -> None:
        self.events: list[str] = []

    def step_found(self, step: Step, artifact: Artifact) -> None:
        assert artifact.manifest.step == step.name
        self.events.append(f"found {step.name}")

    def step_begins(self, step: Step, resumed: bool) -> "Listener":
        self.events.append(f"{'resumed' if resumed else 'begins'} {step.name}")
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None:
        assert artifact.manifest.step == step.name
        self.events.append(f"done {step.name}")

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        pass


def write(context: StepContext) -> dict[str, object]:
    context.progress.update(0, 3)
    context.storage.write_bytes("work/note", b"gone when the step is done")
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
        ("shards/000000000.parquet", 2),
        ("shards/000000001.parquet", 1),
    ]
    artifact.verify()
    shard = tmp_path / "one" / "shards" / "000000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"000000001\.parquet does not match its checksum"):
        artifact.verify()


def test_missing_shard_is_never_read_as_empty(tmp_path: Path) -> None:
    artifact = Run(str(tmp_path), steps()).execute(Listener())["one"]
    (tmp_path / "one" / "shards" / "000000000.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"000000000\.parquet is missing"):
        artifact.read()


def test_step_that_dies_is_resumed_and_its_shards_are_no_result(tmp_path: Path) -> None:
    def die(context: StepContext) -> dict[str, object]:
        write(context)
        raise RuntimeError("power cut")

    dying = Step(name="one", config={"k": 1}, inputs=(), work=die)
    with pytest.raises(RuntimeError):
        Run(str(tmp_path), [dying]).execute(Listener())
    assert Run(str(tmp_path), steps()).artifact(steps()[0]) is None
    half_written = tmp_path / "one" / "shards" / "000000001.parquet.unfinished"
    half_written.touch()
    assert events_of(Run(str(tmp_path), steps()))[0] == "resumed one"
    assert not half_written.exists() and not (tmp_path / "one" / "work").exists()


def test_what_lost_processes_left_is_gone_when_the_step_is_done(tmp_path: Path) -> None:
    def lose(context: StepContext) -> dict[str, object]:
        (tmp_path / "one" / "shards").mkdir()
        (tmp_path / "one" / "shards" / ".000000001.parquet.abc.unfinished").touch()
        return write(context)

    losing = Step(name="one", config={"k": 1}, inputs=(), work=lose)
    Run(str(tmp_path), [losing]).execute(Listener())
    shards = ["000000000.parquet", "000000001.parquet"]
    assert sorted(file.name for file in (tmp_path / "one" / "shards").iterdir()) == shards


def test_work_of_a_run_that_was_killed_behind_its_manifest_is_deleted(tmp_path: Path) -> None:
    run = Run(str(tmp_path), steps())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "delete", _die_at_work)
        with pytest.raises(KeyboardInterrupt):
            run.execute(Listener())
    assert (tmp_path / "one" / "manifest.json").exists()
    assert (tmp_path / "one" / "work" / "note").exists()
    assert events_of(run)[0] == "found one"
    assert not (tmp_path / "one" / "work").exists()


def _die_at_work(storage: LocalStorage, prefix: str) -> None:
    if prefix == "work":
        raise KeyboardInterrupt


def test_half_done_step_of_another_configuration_is_never_gone_on_with(tmp_path: Path) -> None:
    def die(context: StepContext) -> dict[str, object]:
        write_shards(context.storage, pa.table({"id": [*"abcdefgh"]}), 2)
        raise RuntimeError("power cut")

    old = {"k": 1, "gone": {"a": 1}, "x": "y" * 99, "z1": 0, "z2": 0}
    dying = Step(name="one", config=old, inputs=(), work=die)
    with pytest.raises(RuntimeError):
        Run(str(tmp_path), [dying]).execute(Listener())
    changed = Run(str(tmp_path), steps({"k": 2}))
    assert [changed.state(step) for step in changed.steps] == ["changed", "waiting"]
    message = r'\(gone\.a: 1 -> null, k: 1 -> 2, x: "y+… -> null and 2 more\): use --rebuild'
    with pytest.raises(UserError, match=message):
        changed.execute(Listener())
    assert events_of(changed, rebuild=True)[0] == "begins one"
    artifact = changed.artifact(changed.steps[0])
    assert artifact is not None and artifact.read()["id"].to_pylist() == ["a", "b", "c"]


def test_run_ends_at_the_step_that_is_named(tmp_path: Path) -> None:
    run = Run(str(tmp_path), steps())
    assert [step.name for step in run.steps_until("one")] == ["one"]
    assert [step.name for step in run.steps_until("two")] == ["one", "two"]
    assert events_of(run, until="one") == ["begins one", "done one"]
    assert 0 <= run.execute(Listener())["one"].manifest.seconds_s < 60


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
    (tmp_path / "one" / "shards" / "000000007.parquet").write_bytes(b"old")
    Run(str(tmp_path), steps({"k": 2})).execute(Listener(), rebuild=True)
    assert not (tmp_path / "one" / "shards" / "000000007.parquet").exists()


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


def test_rejects_of_many_shards_are_counted_a_shard_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: StepContext) -> dict[str, object]:
        write(context)
        duplicates = [("d", reason, "") for reason in DUPLICATES]
        write_rejects(context.storage, duplicates, 0)
        for number in range(1, 6):
            rows = [(f"x{number}", "empty", ""), *duplicates, (f"y{number}", f"long {number}", "")]
            write_rejects(context.storage, rows, number)
        return {"num_duplicates": 6 * len(DUPLICATES)}

    in_full: list[str] = []

    def read(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
        if columns is None:
            in_full.append(path)
        return read_table(storage, path, columns)

    monkeypatch.setattr(artifacts, "read_table", read)
    step = Step(name="s", config={}, inputs=(), work=refuse, max_reject_share=0.1)
    told = (
        r"refused 10 rows, mostly 'empty' \(5\), 'long 1' \(1\), 'long 2' \(1\), and.*"
        r" x1: empty: ''; y1: long 1: ''; x2: empty: ''$"
    )
    with pytest.raises(TooManyRejects, match=told):
        Run(str(tmp_path), [step]).execute(Listener())
    assert in_full == [f"rejects/00000000{number}.parquet" for number in range(3)]  # for examples


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


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """A folder of somebody who also calls things `one` and `two`."""
    for name in ("one/chapter.txt", "two/train.py", "recipe.yaml", "two/manifest.json"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text('{"name": "my app", "fingerprint": "x"}')
    return tmp_path / "work"


def test_folder_that_is_no_run_is_left_alone(thesis: Path) -> None:
    before = names(thesis)
    run = Run(str(thesis), steps())
    for work in (
        run.delete_steps,
        lambda: run.execute(Listener()),
        lambda: run.execute(Listener(), rebuild=True),
        lambda: run.execute(Listener(), until="three"),
        run.check_folder,
    ):
        with pytest.raises(UserError, match="is no run of Tokay, and holds files, which stay"):
            work()
    assert names(thesis) == before


def test_prefix_that_is_no_run_is_left_alone(bucket: str) -> None:
    storage = open_storage(f"{bucket}/mine")
    storage.write_bytes("one/chapter.txt", b"1")
    with pytest.raises(UserError, match="is no run of Tokay"):
        Run(f"{bucket}/mine", steps()).delete_steps()
    assert storage.list() == ["one/chapter.txt"]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_steps_folder_that_no_step_made_is_left_alone(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "run") if place == "local" else request.getfixturevalue("bucket") + "/run"
    Run(uri, steps()[:1]).execute(Listener())
    storage = open_storage(uri)
    storage.write_bytes("two/chapter.txt", b"1")
    storage.write_bytes("two/manifest.json", b'{"step": "thesis", "fingerprint": "x"}')
    before = storage.list()
    for fresh in (True, False):
        run = Run(uri, steps({"k": 2}))
        with pytest.raises(UserError, match="two holds files that no step 'two' made; nothing was"):
            run.delete_steps() if fresh else run.execute(Listener(), rebuild=True)
    assert storage.list() == before


def test_steps_folder_behind_a_symbolic_link_is_left_alone(tmp_path: Path) -> None:
    Run(str(tmp_path / "a"), steps()).execute(Listener())
    Run(str(tmp_path / "b"), steps()[:1]).execute(Listener())
    (tmp_path / "b" / "two").symlink_to(tmp_path / "a" / "two")
    before = names(tmp_path)
    with pytest.raises(UserError, match="b/two is a symbolic link; nothing was touched"):
        Run(str(tmp_path / "b"), steps()).delete_steps()
    assert names(tmp_path) == before


@pytest.mark.parametrize("place", ["local", "s3"])
def test_deleting_steps_leaves_all_else(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "run") if place == "local" else request.getfixturevalue("bucket") + "/run"
    run = Run(uri, steps())
    run.execute(Listener())
    for path in ("notes.txt", "three/x", "one-more/x"):
        run.storage.write_bytes(path, b"1")
    run.delete_steps()
    kept = {".tokay", "notes.txt", "one-more/x", "three/x", "run.lock"}
    assert set(run.storage.list()) == kept
    assert events_of(run)[0] == "begins one"


def test_run_of_before_there_were_markers_gets_one(tmp_path: Path) -> None:
    Run(str(tmp_path), steps()).execute(Listener())
    (tmp_path / MARKER).unlink()
    assert events_of(Run(str(tmp_path), steps())) == ["found one", "found two"]
    assert (tmp_path / MARKER).exists()


def test_step_that_is_half_deleted_is_no_result_and_its_rest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(str(tmp_path), steps())
    run.execute(Listener())
    delete = LocalStorage.delete
    deleted: list[str] = []

    def die(storage: LocalStorage, prefix: str) -> None:
        deleted.append(prefix)
        if len(deleted) > 2:
            raise KeyboardInterrupt
        delete(storage, prefix)

    monkeypatch.setattr(LocalStorage, "delete", die)
    with pytest.raises(KeyboardInterrupt):
        run.delete_steps()
    monkeypatch.undo()
    assert deleted[0] == "manifest.json" and run.state(steps()[0]) == "waiting"
    assert (tmp_path / "one" / "shards" / "000000001.parquet").exists()
    seen: list[str] = []

    def look(context: StepContext) -> dict[str, object]:
        seen.extend(context.storage.list())
        return write(context)

    again = Run(str(tmp_path), [Step(name="one", config={"k": 1}, inputs=(), work=look)])
    assert events_of(again) == ["begins one", "done one"]
    assert seen == ["work/begun.json"]


def test_nothing_is_deleted_while_another_process_is_at_work(tmp_path: Path) -> None:
    run = Run(str(tmp_path), steps())
    run.execute(Listener())
    before = names(tmp_path)
    with run.alone():
        other = Run(str(tmp_path), steps())
        for work in (other.delete_steps, lambda: other.execute(Listener(), rebuild=True)):
            with pytest.raises(UserError, match="another process is at work"):
                work()
        assert names(tmp_path) == before
        run.delete_steps()  # its own holder may
    assert names(tmp_path) == [".tokay", "run.lock"]


def test_note_of_begun_work_that_is_broken_is_one_line(tmp_path: Path) -> None:
    run = Run(str(tmp_path), steps())
    run.storage.write_bytes("one/work/begun.json", b"[" * 10_000)
    with pytest.raises(ArtifactError, match=r"begun\.json is not what this version of Tokay") as e:
        run.state(steps()[0])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0"])
def test_step_with_a_name_that_is_no_folders_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name of a folder"):
        Run(str(tmp_path), [Step(name=name, config={}, inputs=(), work=write)])
