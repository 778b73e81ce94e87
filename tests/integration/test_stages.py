"""Stages through real Ray Data: order, rejects, errors, and what a killed driver leaves."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.data import DataContext
from ray.data.exceptions import ExecutionTimeoutError

from cluster.artifacts import Artifact, write_shards
from cluster.errors import EngineDied, TokayError, TooManyRejects, UserError
from cluster.stages import Limit, Stage, StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import Run, Step, StepContext

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_ROWS, ROWS_PER_SHARD = 60, 3
RESOURCES = StageResources(num_cpus=1, shards_in_flight=2)


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def step_found(self, step: Step, artifact: Artifact) -> None: ...

    def step_begins(self, step: Step, resumed: bool) -> "Silent":
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None: ...

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        self.notes.append(note)


@dataclass(frozen=True, kw_only=True)
class Square(Stage):
    """Squares n, refuses multiples of 10, notes each shard that it worked on.

    It finishes no shard before ``nodes_at_work`` nodes have begun one.
    """

    notes: str
    seconds_a_shard: float = 0.0
    nodes_at_work: int = 0
    fail_with: str = ""
    columns: tuple[str, ...] = ("id", "n")
    resources: StageResources = RESOURCES

    def load(self) -> StageFunction:
        if self.fail_with == "load":
            raise UserError("model 'x' does not exist: correct llm.model")
        if self.fail_with == "kill at load":
            os._exit(1)

        async def square(table: pa.Table) -> StageOutput:
            node = ray.get_runtime_context().get_node_id()
            Path(f"{self.notes}.{node}").touch()
            while len(list(Path(self.notes).parent.glob("notes.*"))) < self.nodes_at_work:
                await asyncio.sleep(0.1)
            await asyncio.sleep(self.seconds_a_shard)
            first = table["id"][0].as_py()
            with Path(self.notes).open("a") as notes:
                notes.write(f"{first}\n")
            if first == "r015" and self.fail_with in ("kill", "die") and self._first_time():
                if self.fail_with == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise EngineDied("the engine died")
            if first == "r015" and self.fail_with == "kill always":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fail_with == "die always":
                raise EngineDied("the engine died")
            rows = table.to_pylist()
            if self.fail_with == "lose":
                rows = rows[1:]
            kept = [{"id": row["id"], "square": row["n"] ** 2} for row in rows if row["n"] % 10]
            refused = [(row["id"], "round number", "") for row in rows if row["n"] % 10 == 0]
            return StageOutput(
                rows=pa.Table.from_pylist(
                    kept, schema=pa.schema([("id", pa.string()), ("square", pa.int64())])
                ),
                rejects=refused,
                metrics={"num_seen": table.num_rows},
            )

        return square

    def _first_time(self) -> bool:
        mark = Path(f"{self.notes}.failed")
        if mark.exists():
            return False
        mark.touch()
        return True


def make_run(
    folder: Path | str,
    stage: Square,
    limit: Limit | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> Run:
    def numbers(context: StepContext) -> dict[str, object]:
        table = pa.table({"id": [f"r{n:03}" for n in range(NUM_ROWS)], "n": list(range(NUM_ROWS))})
        write_shards(context.storage, table, rows_per_shard)
        return {}

    return Run(
        f"{folder}/run",
        [
            Step(name="numbers", config={}, inputs=(), work=numbers),
            Step(
                name="squares",
                config={},
                inputs=("numbers",),
                work=lambda context: run_stage(stage, context.input("numbers"), context, limit),
            ),
        ],
    )


def squares_of(folder: Path | str) -> Artifact:
    run = make_run(folder, Square(notes=""))
    found = run.artifact(run.steps[1])
    assert found is not None
    return found


def test_stage_keeps_shard_numbers_rejects_and_metrics(ray_session: None, tmp_path: Path) -> None:
    stage = Square(notes=str(tmp_path / "notes"))
    squares = make_run(tmp_path, stage).execute(Silent())["squares"]
    table = squares.read()
    expected = [n for n in range(NUM_ROWS) if n % 10]
    assert table["id"].to_pylist() == [f"r{n:03}" for n in expected]
    assert table["square"].to_pylist() == [n**2 for n in expected]
    assert len(squares.shards) == NUM_ROWS // ROWS_PER_SHARD
    assert squares.rejects()["reason"].to_pylist() == ["round number"] * 6
    assert squares.manifest.metrics == {"num_seen": NUM_ROWS}


class Twice(Square):
    """Gives each row twice."""

    @property
    def rows_per_row(self) -> int:
        return 2

    def load(self) -> StageFunction:
        async def repeat(table: pa.Table) -> StageOutput:
            return StageOutput(rows=pa.concat_tables([table] * 2))

        return repeat


def test_stage_may_give_several_rows_for_each(ray_session: None, tmp_path: Path) -> None:
    squares = make_run(tmp_path, Twice(notes="")).execute(Silent())["squares"]
    assert squares.num_rows == 2 * NUM_ROWS


def test_stage_that_loses_a_row_fails(ray_session: None, tmp_path: Path) -> None:
    run = make_run(tmp_path, Square(notes=str(tmp_path / "notes"), fail_with="lose"))
    with pytest.raises(TokayError, match="lost rows of shards"):
        run.execute(Silent())
    assert run.artifact(run.steps[1]) is None


def test_stage_stops_when_its_limit_is_broken_and_keeps_what_is_done(
    ray_session: None, tmp_path: Path
) -> None:
    stage = Square(notes=str(tmp_path / "notes"), seconds_a_shard=0.2)
    strict = Limit(share=2 / NUM_ROWS, num_all=NUM_ROWS, remedy="give other numbers")
    run = make_run(tmp_path, stage, strict)
    told = (
        r"step 'squares' refused [345] rows, mostly 'round number' \([345]\), and accepted is a"
        r" share of 0\.03.* of 60: give other numbers\. Examples: r0[0-5]0: round number"
    )
    with pytest.raises(TooManyRejects, match=told):
        run.execute(Silent())
    shards = tmp_path / "run" / "squares" / "shards"
    assert 3 <= len(list(shards.glob("*.parquet"))) < NUM_ROWS // ROWS_PER_SHARD
    with pytest.raises(TooManyRejects, match=told):  # at once, by what is on the disk
        run.execute(Silent())
    enough = Limit(share=0.1, num_all=NUM_ROWS, remedy="")
    squares = make_run(tmp_path, stage, enough).execute(Silent())["squares"]
    assert squares.num_rejects == 6
    assert squares.manifest.metrics == {"num_seen": NUM_ROWS}
    noted = (tmp_path / "notes").read_text().split()
    assert len(noted) - len(set(noted)) <= RESOURCES.shards_in_flight  # under way when it stopped


@pytest.mark.parametrize("fail_with", ["kill", "die"])
def test_stage_outlives_a_killed_actor_and_a_dead_engine(
    fail_with: str, ray_session: None, tmp_path: Path
) -> None:
    stage = Square(notes=str(tmp_path / "notes"), fail_with=fail_with)
    squares = make_run(tmp_path, stage).execute(Silent())["squares"]
    assert (tmp_path / "notes.failed").exists()
    assert squares.read()["id"].to_pylist() == [f"r{n:03}" for n in range(NUM_ROWS) if n % 10]
    assert squares.num_rejects == 6


def test_engine_that_dies_again_and_again_fails_the_step(ray_session: None, tmp_path: Path) -> None:
    stage = Square(notes=str(tmp_path / "notes"), fail_with="die always")
    with pytest.raises(EngineDied, match="the engine died"):
        make_run(tmp_path, stage).execute(Silent())


@pytest.mark.parametrize(
    "fail_with", ["kill always", pytest.param("kill at load", marks=pytest.mark.chaos)]
)
def test_actor_that_dies_again_and_again_ends_the_step_with_one_line(
    fail_with: str, ray_session: None, tmp_path: Path
) -> None:
    stage = Square(notes=str(tmp_path / "notes"), fail_with=fail_with)
    told = (
        r"^step 'squares': an actor died 4 times on nodes that are still alive, the last time so:"
        r" Worker unexpectedly exits with a connection [^\n]*, for what is done stays$"
    )
    with pytest.raises(TokayError, match=told):
        make_run(tmp_path, stage).execute(Silent())
    squares = make_run(tmp_path, Square(notes=str(tmp_path / "notes"))).execute(Silent())["squares"]
    assert squares.read().to_pylist() == expected_rows()
    assert not (tmp_path / "run" / "squares" / "work").exists()


def test_stage_outlives_a_long_time_without_a_shard(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = DataContext.get_current()
    assert context.execution_no_progress_timeout_s == -1
    slow = Square(notes=str(tmp_path / "notes"), seconds_a_shard=4)
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 1.5)  # Ray's own: half an hour
    with pytest.raises(ExecutionTimeoutError, match="no progress"):
        make_run(tmp_path / "ended", slow, rows_per_shard=60).execute(Silent())
    monkeypatch.undo()
    make_run(tmp_path, slow, rows_per_shard=60).execute(Silent())


def test_users_mistake_in_an_actor_stays_the_users_mistake(
    ray_session: None, tmp_path: Path
) -> None:
    run = make_run(tmp_path, Square(notes=str(tmp_path / "notes"), fail_with="load"))
    with pytest.raises(UserError, match=r"^model 'x' does not exist: correct llm\.model$"):
        run.execute(Silent())


def test_killed_driver_goes_on_with_the_shards_that_are_missing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from cluster.session import connect; from test_stages import *\n"
        "connect(Path(sys.argv[1]) / 'logs')\n"
        "stage = Square(notes=sys.argv[1] + '/notes', seconds_a_shard=0.4)\n"
        "make_run(Path(sys.argv[1]), stage).execute(Silent())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    shards = tmp_path / "run" / "squares" / "shards"
    first = subprocess.Popen(command, start_new_session=True, env=here)
    limit = time.monotonic() + 300
    while len(list(shards.glob("*.parquet"))) < 5 and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {file.name: file.stat().st_mtime_ns for file in shards.glob("*.parquet")}
    assert 5 <= len(before) < NUM_ROWS // ROWS_PER_SHARD
    assert not (tmp_path / "run" / "squares" / "manifest.json").exists()

    subprocess.run(command, check=True, timeout=500, env=here)
    after = {file.name: file.stat().st_mtime_ns for file in shards.glob("*.parquet")}
    assert {name: after[name] for name in before} == before  # found again, not made again
    done = squares_of(tmp_path)
    assert done.num_rows + done.num_rejects == NUM_ROWS
    done.verify()


def expected_rows() -> list[dict[str, object]]:
    return [{"id": f"r{n:03}", "square": n**2} for n in range(NUM_ROWS) if n % 10]


def drive(code: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    """Runs a driver of its own, whose Ray has its own environment."""
    head = "import os, sys; from pathlib import Path\nfrom test_stages import *\n"
    here = {"PYTHONPATH": str(Path(__file__).parent), **(environment or {})}
    command = [sys.executable, "-c", head + code, *arguments]
    subprocess.run(command, check=True, timeout=500, env=os.environ | here)


@pytest.mark.chaos
def test_stage_on_a_faulty_s3_gives_the_rows_of_a_sound_one(
    faulty_bucket: str, tmp_path: Path
) -> None:
    drive(
        "from cluster.session import connect\n"
        "connect(Path(sys.argv[2]))\n"
        "stage = Square(notes=sys.argv[2] + '/notes')\n"
        "make_run(sys.argv[1], stage, rows_per_shard=30).execute(Silent())\n",  # it is slow
        faulty_bucket,
        str(tmp_path),
    )
    squares = make_run(faulty_bucket, Square(notes="")).artifact(
        make_run("", Square(notes="")).steps[1]
    )
    assert squares is not None
    squares.verify()
    assert squares.read().to_pylist() == expected_rows()
    assert squares.num_rejects == 6


NODES_THAT_COME = """
import threading
from ray.cluster_utils import Cluster
from cluster import actor_health
from cluster.session import connect, disconnect

actor_health._LOOK_EVERY_S = 0.2
folder, listener = Path(sys.argv[1]), Silent()
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
os.environ["RAY_ADDRESS"] = cluster.address
connect(folder / "logs")

def come(missing, has):
    told = f"waiting for {missing} of 2 actors (each 1 CPU, 0.001 llm; the cluster has {has}): "
    while not any(note.startswith(told) for note in listener.notes):
        assert running.is_alive()
        time.sleep(0.1)
    cluster.add_node(num_cpus=1, num_gpus=1, resources={"llm": 1})

resources = StageResources(num_actors=2, num_cpus=1, node_resource="llm", shards_in_flight=1)
stage = Square(notes=f"{folder}/notes", nodes_at_work=2, resources=resources)
running = threading.Thread(target=lambda: make_run(folder, stage).execute(listener), daemon=True)
running.start()
come(2, "4 CPU, 0 llm")
come(1, "5 CPU, 1 llm")
running.join()
assert listener.notes[-1] == "", listener.notes
disconnect()
cluster.shutdown()
"""


def test_stage_tells_which_nodes_it_waits_for_and_takes_them_as_they_come(tmp_path: Path) -> None:
    drive(NODES_THAT_COME, str(tmp_path))
    assert squares_of(tmp_path).read().to_pylist() == expected_rows()
    assert len(list(tmp_path.glob("notes.*"))) == 2


def test_process_that_asked_for_no_gpu_sees_none(ray_session: None) -> None:
    look = ray.remote(num_cpus=0)(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert ray.get(look.remote()) == ""


TWO_NODES = """
import threading
from ray.cluster_utils import Cluster
from cluster.session import connect, disconnect

folder = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
os.environ["RAY_ADDRESS"] = cluster.address
connect(folder / "logs")  # to the head: a driver dies with its own raylet
second = cluster.add_node(num_cpus=1)

def lose_second():
    while not (folder / f"notes.{second.node_id}").exists():
        time.sleep(0.05)
    second.kill_raylet()
    (folder / "lost").touch()

threading.Thread(target=lose_second).start()
resources = StageResources(num_actors=2, num_cpus=1, shards_in_flight=2)
stage = Square(
    notes=f"{folder}/notes", seconds_a_shard=0.5, nodes_at_work=2, resources=resources
)
make_run(folder, stage).execute(Silent())
disconnect()
cluster.remove_node(second)  # else Ray's own cleaning up at the exit finds it gone, and fails
cluster.shutdown()
"""


@pytest.mark.chaos
def test_stage_outlives_the_loss_of_a_node(tmp_path: Path) -> None:
    checks = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000}
    checks["failure_threshold"] = 3
    fast = {f"RAY_health_check_{name}": str(value) for name, value in checks.items()}
    drive(TWO_NODES, str(tmp_path), environment=fast)
    assert (tmp_path / "lost").exists()
    squares = squares_of(tmp_path)
    assert squares.read().to_pylist() == expected_rows()
    assert squares.num_rejects == 6
    assert len(list(tmp_path.glob("notes.*"))) == 2
