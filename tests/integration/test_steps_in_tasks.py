"""Steps whose work is one Ray task: what the driver hears of it, and what dies on the way."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from actors.vectors import BrokenVectors
from cluster import step_task
from cluster.artifacts import Artifact, Json, open_artifact, write_shards
from cluster.errors import TokayError, UserError
from cluster.stages import StageResources
from cluster.step_task import run_in_task
from cluster.steps import Run, Step, StepContext
from cluster.storage import join
from pipelines.encoders import MODEL, TRAINED
from pipelines.evaluation import evaluation
from pipelines.recipe.read import load_recipe
from pipelines.training import export, gate, student, training

pytestmark = pytest.mark.slow
ONE = StageResources()
HEAVY = {"torch", "transformers", "sentence_transformers", "mteb", "datasets", "sklearn"}


@dataclass
class Heard:
    """A listener that keeps what it hears."""

    updates: list[tuple[float, float | None, str]] = field(default_factory=list)

    def step_found(self, step: Step, artifact: Artifact) -> None: ...
    def step_done(self, step: Step, artifact: Artifact) -> None: ...
    def step_begins(self, step: Step, resumed: bool) -> "Heard":
        return self

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        self.updates.append((done, total, note))


def write_numbers(context: StepContext) -> dict[str, Json]:
    context.log.append(write_shards(context.storage, pa.table({"n": range(10)}), 10))
    return {}


def count(notes: Path, how: str, context: StepContext) -> dict[str, Json]:
    """Notes its process, dies once or always, or fails; writes the rows that it was given."""
    with (notes / "processes").open("a") as file:
        file.write(f"{os.getpid()}\n")
    rows = context.inputs["numbers"].read()
    context.log.append(write_shards(context.storage, rows, 4))
    context.progress.update(1, 2, "half")
    if how == "dies always" or (how == "dies once" and not (notes / "died").exists()):
        (notes / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "waits to be lost" and not (notes / "died").exists():
        (notes / "died").touch()
        time.sleep(600)
    if how == "is the user's":
        raise UserError("model 'x' does not exist: correct student.model")
    if how == "is no number":
        raise BrokenVectors("the model x gives vectors that are no numbers")
    if how == "is another":
        raise KeyError("weights")
    time.sleep(3 * step_task._LOOK_EVERY_S)
    return {"threads": os.environ["OMP_NUM_THREADS"], "folder": str(Path.cwd())}


def counted(
    folder: Path, how: str = "", heard: Heard | None = None, resources: StageResources = ONE
) -> Artifact:
    notes = folder / "notes"
    notes.mkdir(exist_ok=True)
    work = partial(count, notes, how)
    numbers = Step(name="numbers", config={}, inputs=(), work=write_numbers)
    step = Step(
        name="counted",
        config={},
        inputs=("numbers",),
        work=lambda context: run_in_task(work, context, resources),
    )
    return Run(str(folder / "run"), [numbers, step]).execute(heard or Heard())["counted"]


def processes(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "notes" / "processes").read_text().split()]


def test_task_does_the_work_elsewhere_and_the_driver_hears_of_it(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    monkeypatch.chdir(tmp_path)
    made = counted(tmp_path, heard=heard)
    (there,) = processes(tmp_path)
    assert there != os.getpid()
    made.verify()
    assert made.read()["n"].to_pylist() == list(range(10)) and made.num_shards == 3
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if threads == "1":  # it has the node for itself
        threads = str(os.cpu_count())
    assert made.manifest.metrics == {"threads": threads, "folder": str(tmp_path)}
    assert heard.updates.count((1, 2, "half")) == 1
    assert not (tmp_path / "run/counted/work").exists()
    with pytest.raises(psutil.NoSuchProcess):  # nor does its memory stay
        psutil.Process(there).wait(30)
        psutil.Process(there)


def test_task_that_dies_runs_again(ray_session: None, tmp_path: Path) -> None:
    made = counted(tmp_path, "dies once")
    assert len(set(processes(tmp_path))) == 2
    assert made.read()["n"].to_pylist() == list(range(10)) and made.num_shards == 3


def test_task_that_dies_again_and_again_ends_the_step_with_one_line(
    ray_session: None, tmp_path: Path
) -> None:
    told = r"^step 'counted': an actor died 4 times on nodes that are still alive, the last time"
    with pytest.raises(TokayError, match=told):
        counted(tmp_path, "dies always")
    assert counted(tmp_path).num_rows == 10  # what died before counts no more


@pytest.mark.parametrize(
    ("how", "kind", "line"),
    [
        ("is the user's", UserError, "model 'x' does not exist: correct student.model"),
        ("is no number", BrokenVectors, "the model x gives vectors that are no numbers"),
        ("is another", TokayError, "the step's Ray task failed: KeyError: 'weights'"),
    ],
)
def test_error_of_a_task_is_what_it_was(
    how: str, kind: type[TokayError], line: str, ray_session: None, tmp_path: Path
) -> None:
    with pytest.raises(TokayError) as failure:
        counted(tmp_path, how)
    assert isinstance(failure.value, kind) and str(failure.value) == line
    assert len(processes(tmp_path)) == 1  # it is not tried again


QUICK = """
import sys; from pathlib import Path
from cluster.session import connect, disconnect
from cluster.step_task import run_in_task
from cluster.steps import StepContext
from cluster.storage import open_storage
from test_steps_in_tasks import Heard, ONE, quick

connect(Path(sys.argv[1], "logs"))
context = StepContext(storage=open_storage(sys.argv[1]), inputs={}, progress=Heard())
for _ in range(12):
    assert run_in_task(quick, context, ONE) == {"done": True}
disconnect()
"""


def quick(context: StepContext) -> dict[str, Json]:
    return {"done": True}


def test_driver_survives_the_end_of_a_task(tmp_path: Path) -> None:
    """Cancelling a task just as it ends makes Ray end the driver, in a few tries of some tens."""
    command = [sys.executable, "-c", QUICK, str(tmp_path)]
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(command, check=True, timeout=300, env=os.environ | here)


NODES = """
import os, sys, threading, time; from pathlib import Path
from ray.cluster_utils import Cluster
from cluster import actor_health
from cluster.session import connect, disconnect
from test_steps_in_tasks import Heard, StageResources, counted

actor_health._LOOK_EVERY_S = 0.2
folder, heard, nodes = Path(sys.argv[1]), Heard(), []
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
os.environ["RAY_ADDRESS"] = cluster.address
connect(folder / "logs")  # to the head: a driver dies with its own raylet

def until(told):
    while not any(note.startswith(told) for _, _, note in list(heard.updates)):
        time.sleep(0.1)

def work():
    counted(folder, "waits to be lost", heard, StageResources(node_resource="encoder"))

def come_and_go():  # in the main thread, where Ray can handle signals
    until("waiting for 1 of 1 actors (each 1 CPU, 0.001 encoder; the cluster has 4 CPU, 0 encoder)")
    nodes.append(cluster.add_node(num_cpus=1, resources={"encoder": 1}))
    until("half")
    cluster.add_node(num_cpus=1, resources={"encoder": 1})
    nodes[0].kill_raylet()

working = threading.Thread(target=work, daemon=True)
working.start()
come_and_go()
working.join()
disconnect()
cluster.remove_node(nodes[0])  # else Ray's own cleaning up at the exit finds it gone, and fails
cluster.shutdown()
"""


@pytest.mark.chaos
def test_task_waits_for_its_node_and_outlives_it(tmp_path: Path) -> None:
    checks = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000}
    checks["failure_threshold"] = 3
    fast = {f"RAY_health_check_{name}": str(value) for name, value in checks.items()}
    here = {"PYTHONPATH": str(Path(__file__).parent), **fast}
    command = [sys.executable, "-c", NODES, str(tmp_path)]
    subprocess.run(command, check=True, timeout=800, env=os.environ | here)
    assert len(set(processes(tmp_path))) == 2
    made = open_artifact(str(tmp_path / "run" / "counted"))
    assert made.read()["n"].to_pylist() == list(range(10)) and made.num_shards == 3


def steps(folder: Path, data: str) -> Run:
    """The steps with a model of a run whose other steps have written hardly anything."""
    settings = [
        f"corpus.path={data}/corpus.jsonl",
        f"evaluation=[{{name: headline, path: {data}}}, {{name: judge, path: {data}}}]",
        "gate={test_set: judge, interpolations: [0.5]}",
    ]
    recipe = load_recipe("laptop", settings)

    def made(name: str, metrics: dict[str, Json], **config: Json) -> Step:
        return Step(name=name, config=config, inputs=(), work=partial(write_texts, metrics))

    labels = {"num_queries": 9, "num_kept": 8, "dropped_by": {}, "num_evaluation_queries": 7}
    trained = training.step(recipe)
    return Run(
        str(folder / "run"),
        [
            made("passages", {}),
            made("fret", {**labels, "highest_overlap_kept": 0.5}, fusion="ql+rc"),
            student.step(recipe),
            made("mixture", {"sets": {"fret": 8}}),
            replace(trained, work=lambda context: run_in_task(train, context, ONE)),
            gate.step(recipe),
            export.step(recipe),
            evaluation.step(recipe),
        ],
    )


def write_texts(metrics: dict[str, Json], context: StepContext) -> dict[str, Json]:
    texts = pa.table({"text": ["the boundary layer of a flat plate", "x", "a longer text " * 9]})
    context.log.append(write_shards(context.storage, texts, 10))
    return metrics


def train(context: StepContext) -> dict[str, Json]:
    """Changes the student a little."""
    import torch  # here, since a driver goes without it

    from actors.encoder import Encoder

    encoder = Encoder.load(join(context.input("student").uri, MODEL), device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in encoder.model.parameters():
            weights.add_(0.02 * weights.std() * torch.randn_like(weights))
    encoder.save(Path(context.storage.uri, TRAINED), model_card="")
    return {}


def figures(folder: Path) -> dict[str, Json]:
    """Returns all that the steps found, but how long it took."""
    found: dict[str, Json] = {}
    for name in ("student", "gate", "export", "evaluation"):
        metrics = json.loads((folder / "run" / name / "manifest.json").read_text())["metrics"]
        for row in metrics.get("results", ()):
            del row["texts_per_s"]
        found[name] = metrics
    return found


DRIVER = """
import sys; from pathlib import Path
from cluster.session import connect, disconnect
from test_steps_in_tasks import HEAVY, Heard, steps

connect(Path(sys.argv[1], "logs"))
heard = Heard()
steps(Path(sys.argv[1]), sys.argv[2]).execute(heard)
disconnect()
assert not HEAVY & set(sys.modules), HEAVY & set(sys.modules)
print(sorted({note for _, _, note in heard.updates if note}))
"""


def begin_driver(folder: Path, data: Path) -> subprocess.Popen[str]:
    """Starts a driver with a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), str(data)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_task(driver: subprocess.Popen[str], step: Path, when: Callable[[], bool]) -> None:
    """Kills the process of a step's task, once it has begun and something is so."""
    deadline = time.monotonic() + 900
    while not (list(step.glob("work/actors/task/*.json")) and when() and (task := attempt(driver))):
        assert driver.poll() is None and time.monotonic() < deadline
        assert not (step / "manifest.json").exists(), f"{step.name} ended before it was killed"
        time.sleep(0.01)
    task.kill()
    task.wait(60)


def attempt(driver: subprocess.Popen[str]) -> psutil.Process | None:
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()).startswith("ray::_attempt"):
                return process
    return None


@pytest.fixture(scope="module")
def unhurt(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of these steps in this process, without Ray."""
    folder = tmp_path_factory.mktemp("unhurt")
    steps(folder, str(data_folder / "retrieval" / "adi")).execute(Heard())
    return folder


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_steps_killed_at_their_work_end_with_the_same_figures(
    unhurt: Path, data_folder: Path, tmp_path: Path
) -> None:
    folder, run = tmp_path / "killed", tmp_path / "killed" / "run"
    shutil.copytree(unhurt, folder)
    for step in ("gate", "evaluation"):  # the others stay as they are
        shutil.rmtree(run / step)
    driver = begin_driver(folder, data_folder / "retrieval" / "adi")

    def at_work(step: str) -> bool:
        progress = run / step / "work" / "progress.json"
        return progress.exists() and json.loads(progress.read_text())[0] > 0

    def has_results(count: int) -> bool:
        return len(list((run / "evaluation" / "mteb").rglob("tokay/*.json"))) >= count

    kill_task(driver, run / "gate", lambda: at_work("gate"))
    kill_task(driver, run / "evaluation", lambda: has_results(1))
    first = {file: file.stat().st_mtime_ns for file in run.glob("evaluation/mteb/**/*.json")}
    kill_task(driver, run / "evaluation", lambda: has_results(4))
    told, _ = driver.communicate(timeout=1200)
    assert driver.returncode == 0
    assert figures(folder) == figures(unhurt)
    assert "weight 0.5" in told and "student_after" in told
    kept = [file for file, time in first.items() if file.stat().st_mtime_ns == time]
    assert any(file.parent.name == "tokay" for file in kept)  # it was not measured again
    before, after = (open_artifact(str(each / "run" / "gate")) for each in (unhurt, folder))
    assert models(before) == models(after)


def models(artifact: Artifact) -> dict[str, str]:
    artifact.verify()
    return {file.path: file.sha256 for file in artifact.files if "safetensors" in file.path}
