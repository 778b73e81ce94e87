"""Two nodes, one of which is lost at a random moment of a step, or the driver is: the same rows.

The steps are the product's, each of many small Ray tasks; only what models would write is drawn.
The drivers are processes of their own, and the cluster outlives them, so that what a killed one has
started may still be writing while the next goes on. TOKAY_CHAOS_SEED repeats the moments of a test
that has failed and printed it.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, Json, open_artifact, write_shards
from cluster.shard_log import ShardLog
from cluster.steps import Run, Step, StepContext
from cluster.storage import open_storage

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]
SEED = int(os.environ.get("TOKAY_CHAOS_SEED", time.time_ns()))
STEPS = ("passages", "seeds", "corpus_queries", "pairs", "fret", "mixture")
NUM_FILES, DOCUMENTS_PER_FILE, NUM_SCORED = 40, 75, 5


# --- what the drivers run


def write_inputs(folder: Path) -> None:
    """A corpus with copies, near-copies and rejects, a labelled set and a test set."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 9))) for _ in range(4000)]

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(8, 14))).capitalize() + "."

    texts: list[str] = []
    (folder / "corpus").mkdir()
    for number in range(NUM_FILES):
        lines = ["broken", json.dumps({"_id": f"short {number}", "text": "short"})]
        for row in range(DOCUMENTS_PER_FILE):
            if texts and draw.random() < 0.2:
                text = draw.choice(texts).split()
                for _ in range(draw.choice([0, 0, 1, 2, 20])):
                    text[draw.randrange(len(text))] = draw.choice(words)
                texts.append(" ".join(text))
            else:
                texts.append(" ".join(sentence() for _ in range(6)))
            # Many titles nearly repeat another one.
            title = f"how bees of the meadow find {' '.join(draw.choices(words[:30], k=2))} again"
            document = {"_id": f"{number}-{row}", "title": title, "text": texts[-1]}
            lines.append(json.dumps(document))
        (folder / "corpus" / f"{number:02}.jsonl").write_text("\n".join(lines))
    pairs = [json.dumps({"query": sentence(), "positive": sentence()}) for _ in range(400)]
    (folder / "labelled.jsonl").write_text("\n".join([*pairs, "broken", '{"query": "no answer"}']))
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text(json.dumps({"_id": "d", "title": "", "text": texts[0]}))
    asked = [f"how bees of the meadow find {words[0]} {word} again" for word in words[:30]]
    lines = [json.dumps({"_id": f"q{number}", "text": text}) for number, text in enumerate(asked)]
    (beir / "queries.jsonl").write_text("\n".join(lines))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td\t1\n")


def queries(context: StepContext) -> dict[str, Json]:
    from pipelines.corpus.held_out import HELD_OUT
    from pipelines.ids import query_id
    from pipelines.records import QUERY

    rows = [
        {
            "id": query_id(seed["id"]),
            "seed_id": seed["id"],
            "task": "question answering",
            "query": " ".join(random.Random(seed["id"]).sample(seed["text"].split(), 6)),
            "dropped_by": HELD_OUT if seed["held_out"] else None,
        }
        for seed in context.input("seeds").read().to_pylist()
    ]
    write_shards(context.storage, pa.Table.from_pylist(rows, schema=QUERY), 16)
    return {}


def embeddings(context: StepContext) -> dict[str, Json]:
    write_shards(context.storage, context.input("passages").read(["id"]), 1000)
    return {}


def candidates(context: StepContext) -> dict[str, Json]:
    from pipelines.records import CANDIDATES

    ids = context.input("embeddings").read()["id"].to_pylist()
    rows = [
        row
        for name in ("queries", "corpus_queries")
        for row in context.input(name).read().to_pylist()
    ]
    for row in rows:
        draw = random.Random(row["id"])
        near = [row["seed_id"], *draw.sample(ids, NUM_SCORED + 2)]
        row |= {
            "candidate_ids": list(dict.fromkeys(near)) if row["dropped_by"] is None else [],
            "lexical": [],
            "hybrid": [],
            "seed_rank": 1,
        }
        row["similarities"] = [draw.random() for _ in row["candidate_ids"]]
    write_shards(context.storage, pa.Table.from_pylist(rows, schema=CANDIDATES), 24)
    return {}


def scores(context: StepContext) -> dict[str, Json]:
    from pipelines.records import SCORES

    rows = context.input("pairs").read(["passage_id", "query_ids"]).to_pylist()
    for row in rows:
        draw, num = random.Random(row["passage_id"]), len(row["query_ids"])
        row |= {name: [draw.gauss(0, 1) for _ in range(num)] for name in SCORES.names[2:4]}
        row["errors"] = ["cannot be read" if draw.random() < 0.01 else None for _ in range(num)]
    write_shards(context.storage, pa.Table.from_pylist(rows, schema=SCORES), 64)
    return {}


STAND_INS: dict[str, Callable[[StepContext], dict[str, Json]]] = {
    "queries": queries,
    "embeddings": embeddings,
    "candidates": candidates,
    "scores": scores,
}


def many_tasks() -> None:
    """Makes what a task does so small that there are dozens in each part of a step."""
    from cluster import shard_groups
    from pipelines.corpus import parts, repeats, seeds
    from pipelines.fret import fret
    from pipelines.mixture import mixture

    parts._FEWEST_BYTES = 1
    repeats._MAX_KEYS, repeats._MAX_PAIRS = 2000, 20
    shard_groups.shard_groups.__defaults__ = (20_000,)
    seeds._SHARDS_A_TASK = 1
    fret.QUERIES_PER_SHARD, fret.TEXTS_PER_SHARD = 64, 256
    mixture.EXAMPLES_PER_SHARD = 64


def run_of(inputs: Path, uri: str) -> Run:
    from pipelines.recipe.graph import build_run
    from pipelines.recipe.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "losses",
            "corpus": {"path": str(inputs / "corpus")},
            "seeds": {"num_seeds": 600, "rows_per_shard": 8},
            "corpus_queries": {"max_titles": 200, "max_sentences": 200},
            "llm": {"model": "embedded:SmolLM2-135M-Instruct"},
            "retriever": {"model": "embedded:all-MiniLM-L6-v2"},
            "scores": {"num_scored": NUM_SCORED},
            "fret": {"max_query_similarity": 0.5},
            "mixture": {
                "labelled": [{"name": "answers", "path": str(inputs / "labelled.jsonl")}],
                "validation_examples": 50,
            },
            "student": {"model": "embedded:all-MiniLM-L6-v2", "layers": [0]},
            "training": {"batch_size": 16, "epochs": 2},
            "gate": {"num_queries": 40, "num_seeds": 30},
            "evaluation": [{"name": "bees", "path": str(inputs / "beir")}],
        }
    )
    steps = build_run(recipe, uri).steps
    return Run(uri, [noted(replace(s, work=STAND_INS.get(s.name, s.work))) for s in steps])


def noted(step: Step) -> Step:
    """A step that notes, beside the run, when its files were written; before some are deleted."""

    def work(context: StepContext) -> dict[str, Json]:
        metrics = step.work(context)
        context.log.flush()
        folder = Path(context.storage.uri)
        noted = folder.parent.with_name(f"{step.name}.json")
        noted.write_text(json.dumps(times(folder)))
        return metrics

    return replace(step, work=work)


def times(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".unfinished"
    }


class Events:
    """Prints each word of a step and of its progress; a `RunListener` and its `Progress`."""

    def step_found(self, step: Step, artifact: Artifact) -> None: ...

    def step_begins(self, step: Step, resumed: bool) -> "Events":
        self.step = step.name
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None:
        print("done", step.name, flush=True)

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        print("update", self.step, f"{done:.0f}/{total or 0:.0f}", note, flush=True)


def drive(inputs: str, uri: str, until: str) -> None:
    """What a driver does."""
    from cluster.session import connect, disconnect

    many_tasks()
    connect(Path(f"{uri}-logs"))
    run_of(Path(inputs), uri).execute(Events(), until=until)
    disconnect()


# --- what the tests do to them


@dataclass
class Nodes:
    """A head and another node, each with one CPU."""

    folder: str

    def __post_init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": self.folder}
        head |= {"no_monitor": True, "include_log_monitor": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second: Any = None

    def lose(self) -> None:
        """Kills the processes of the second node; its workers see that it is gone, and end."""
        if self.second:
            self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def complete(self) -> None:
        """Starts a second node if there is none."""
        self.second = self.second or self.cluster.add_node(num_cpus=1)


@dataclass(frozen=True)
class Sound:
    """What a run is that nothing disturbs.

    Attributes:
        inputs: Of the run.
        folder: The run's.
        num_updates: How often each step tells how far it is.
    """

    inputs: Path
    folder: Path
    num_updates: Counter[str]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    root = Path(__file__).parents[2]
    checks = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000}
    checks["failure_threshold"] = 3
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="ray", dir="/tmp") as at:
        for name, value in checks.items():
            patch.setenv(f"RAY_health_check_{name}", str(value))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", f"{root}{os.pathsep}{Path(__file__).parent}")
        nodes = Nodes(at)
        patch.setenv("RAY_ADDRESS", nodes.cluster.address)
        yield nodes
        nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def sound(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    write_inputs(folder)
    nodes.complete()
    driver = start(folder, folder / "run", "mixture")
    assert driver.stdout is not None
    updates = Counter(line.split()[1] for line in driver.stdout if line.startswith("update"))
    assert driver.wait() == 0
    return Sound(folder, folder / "run", updates)


def start(inputs: Path, run: Path, until: str) -> "subprocess.Popen[str]":
    code = "import sys, test_losses; test_losses.drive(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(inputs), str(run), until]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def begin(step: str, sound: Sound, run: Path, moment: float) -> "subprocess.Popen[str]":
    """Starts a driver on a run whose steps before this one are done; returns within the step."""
    run.mkdir()
    for path in sound.folder.iterdir():
        if path.is_dir() and path.name not in names_from(step):
            shutil.copytree(path, run / path.name)
    shutil.copyfile(sound.folder / ".tokay", run / ".tokay")
    driver = start(sound.inputs, run, step)
    assert driver.stdout is not None
    updates = (line for line in driver.stdout if line.startswith(f"update {step} "))
    for _ in range(1 + int(moment * sound.num_updates[step])):
        told = next(updates)
    time.sleep(random.random() * 0.1 * moment)
    print(f"{step} at {moment:.3f}, {told.strip()}")
    if (run / step / "manifest.json").exists():  # it ended first
        assert moment > 0.01
        driver.communicate()
        shutil.rmtree(run)
        return begin(step, sound, run, moment / 2)
    return driver


def names_from(step: str) -> tuple[str, ...]:
    order = ("passages", "seeds", "queries", "corpus_queries", "embeddings", "candidates")
    order += ("pairs", "scores", "fret", "student", "mixture")
    return order[order.index(step) :]


def check(step: str, sound: Sound, run: Path) -> None:
    """The artifact is that of the undisturbed run, and nothing else is there."""
    expected, found = (open_artifact(str(folder / step)) for folder in (sound.folder, run))
    found.verify()
    assert found.manifest.files == expected.manifest.files
    assert found.manifest.metrics == expected.manifest.metrics
    assert (found.num_rejects, found.num_duplicates) == (
        expected.num_rejects,
        expected.num_duplicates,
    )
    assert found.rejects().equals(expected.rejects())
    for shard in found.shards:
        assert found.shard(shard).equals(expected.shard(shard))
    there = {str(file.relative_to(found.uri)) for file in Path(found.uri).rglob("*")}
    there = {path for path in there if not (Path(found.uri) / path).is_dir()}
    listed = {file.path for file in found.files}
    assert there == listed | {"manifest.json", "files.parquet"}
    assert not (Path(found.uri) / "work").exists()


def finished(folder: Path) -> dict[str, int]:
    """What a step promises not to make again: spills, and the files that its logs name."""
    written = times(folder)
    kept = {path for path in written if path.endswith(".spill")}
    for log in [*folder.rglob("work/log")]:
        owner = log.parents[1]
        kept |= {
            str((owner / file.path).relative_to(folder))
            for file in ShardLog(open_storage(owner)).files()
        }
    again: tuple[str, ...] = ("work/dropped/",)  # one small task
    if folder.name == "mixture":
        again += ("rejects/", "validation/")  # which the driver writes
    return {path: written[path] for path in kept & written.keys() if not path.startswith(again)}


@pytest.mark.parametrize("replaced", [False, True], ids=["lost", "replaced"])
@pytest.mark.parametrize("step", STEPS)
def test_step_outlives_the_loss_of_a_node(
    step: str, replaced: bool, sound: Sound, nodes: Nodes, tmp_path: Path
) -> None:
    print(f"TOKAY_CHAOS_SEED={SEED}")
    nodes.complete()
    moment = random.Random(f"{SEED} {step} {replaced}").uniform(0, 0.9)
    driver = begin(step, sound, tmp_path / "run", moment)
    nodes.lose()
    if replaced:
        nodes.complete()
    driver.communicate()
    assert driver.returncode == 0
    check(step, sound, tmp_path / "run")


@pytest.mark.parametrize(
    ("step", "half"), [*((step, 1) for step in STEPS), ("passages", 0), ("fret", 0)]
)
def test_step_goes_on_where_its_driver_was_killed(
    step: str, half: int, sound: Sound, nodes: Nodes, tmp_path: Path
) -> None:
    print(f"TOKAY_CHAOS_SEED={SEED}")
    nodes.complete()
    moment = random.Random(f"{SEED} {step} {half}").uniform(0.5 * half, 0.5 + 0.4 * half)
    run = tmp_path / "run"
    driver = begin(step, sound, run, moment)
    driver.kill()
    driver.communicate()
    before = finished(run / step)
    driver = start(sound.inputs, run, step)
    driver.communicate()
    assert driver.returncode == 0
    check(step, sound, run)
    if step != "corpus_queries":  # which is drawn again
        after = json.loads((tmp_path / f"{step}.json").read_text())
        again = sorted(path for path in before if after.get(path) != before[path])
        print(f"{len(before)} files were finished, {again} are made again")
        assert not again
        assert before or not half
