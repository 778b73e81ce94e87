"""The data plane alone: what each step costs a row in time and memory, with no model in it.

Sentences of public test sets are recombined with a fixed seed, so that every passage differs. They
go through the product's own steps, one after the other as `tokay run` has them. What stands for a
model returns seeded numbers: queries are words of their passage, a query's vector lies near its
passage's, scores are drawn. So these figures say nothing of an LLM's or an encoder's speed, and the
labels mean nothing. The step `student` and the tokens of `mixture` are real.

    python benchmarks/scale.py DATA PASSAGES [PASSAGES ...] [--until mixture] [--workers 2]
        [--seeds 0.1] [--drawn-candidates] [--shuffle] [--folder FOLDER] [--storage s3://BUCKET/RUN]
        [--requests-log FILE]

DATA is the folder that holds retrieval/*/corpus.jsonl. Each number of passages has a process of its
own. With --folder (and --storage) the same command goes on where a killed one stopped; without it
all is deleted at the end. --drawn-candidates leaves the search out: each query's neighbours are
drawn. --shuffle makes `pairs` again, of the same rows, through Ray Data's own shuffle.

Prints a JSON line a step. `driver_mib` is this process's highest PSS without shared memory (which
is the object store), `driver_over_imports_mib` what of it came after the imports, and
`largest_worker_mib` the same of Ray's largest worker and the processes that it has started; all are
looked at five times a second. Files and bytes are those in the step's folder when its work ends:
what it made, and in `work_` what is deleted then, such as an exchange's spills. `requests` are
counted in the log of an S3 server that writes a line for each, such as moto_server's.
"""

import argparse
import contextlib
import importlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project is not installed

from actors.words import num_words
from benchmarks.stand_ins import NUM_SCORED, SEED, drawn, module_of, seeded
from cluster.artifacts import Artifact
from cluster.exchange import PARTITION, Exchange
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.plain_json import dump_json
from cluster.session import connect, disconnect
from cluster.steps import Run, Step, StepContext
from cluster.storage import Storage, join, open_storage, write_table
from pipelines.corpus.cutting import reject_reason
from pipelines.recipe.graph import build_run
from pipelines.recipe.recipe import Recipe

PASSAGES_PER_FILE = 10_000  # about 6 MB
SENTENCE_WORDS = range(8, 41)
PASSAGE_WORDS = 80  # a passage has at least so many, and fewer than the 160 at which it is cut
SAMPLED_EVERY_S = 0.2
MIB = 2**20
# What steps import when they are first called, so that it is no growth of theirs.
IMPORTS = ("ray.data", "torch", "transformers", "actors.encoder", "datasketch", "scipy.stats")

Line = dict[str, Any]


# --- the corpus


def read_sentences(data: Path) -> list[str]:
    """Returns the sentences of all test sets that are fit to stand in a passage, each once."""
    sentences: dict[str, None] = {}
    for file in sorted(data.glob("retrieval/*/corpus.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            for sentence in re.split(r"(?<=[.!?])\s+", json.loads(line)["text"]):
                if num_words(sentence) in SENTENCE_WORDS and reject_reason(sentence) is None:
                    sentences[" ".join(sentence.split())] = None
    return list(sentences)


def draw_passages(sentences: Sequence[str], name: object, num: int) -> Iterator[dict[str, str]]:
    """Yields the documents of a file, each of which is one passage."""
    draw = random.Random(f"{SEED} {name}")
    words = [num_words(sentence) for sentence in sentences]
    for number in range(num):
        drawn: list[int] = []
        while sum(words[place] for place in drawn) < PASSAGE_WORDS:
            drawn.append(draw.randrange(len(sentences)))
        text = " ".join(sentences[place] for place in drawn)
        title = " ".join(draw.choice(sentences).split()[:5])
        yield {"_id": f"{name}-{number}", "title": title, "text": text}


def corpus_folder(folder: Path, num_passages: int) -> Path:
    return folder / f"corpus-{num_passages}"


def write_corpus(folder: Path, sentences: Sequence[str], num_passages: int) -> None:
    """Writes the files of a corpus that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, start in enumerate(range(0, num_passages, PASSAGES_PER_FILE)):
        if not (file := folder / f"{number:06}.jsonl").exists():
            files.append((file, number, min(PASSAGES_PER_FILE, num_passages - start)))
    with ProcessPoolExecutor(initializer=_keep_sentences, initargs=(sentences,)) as pool:
        list(pool.map(_write_file, *zip(*files, strict=True)) if files else ())


_sentences: Sequence[str] = ()


def _keep_sentences(sentences: Sequence[str]) -> None:
    global _sentences
    _sentences = sentences


def _write_file(file: Path, number: int, num: int) -> None:
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as lines:
        for document in draw_passages(_sentences, number, num):
            lines.write(f"{json.dumps(document)}\n")
    unfinished.rename(file)


# --- measuring


def pss(pid: int) -> int:
    """Returns a process's proportional memory in bytes, without that which it shares on purpose."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    return 1024 * sum(int(size) for size in re.findall(r"^Pss_(?:Anon|File): +(\d+)", text, re.M))


def workers() -> list[list[int]]:
    """Returns the processes of each worker of the Ray that this process has started, not agents."""
    found: dict[int, list[int]] = {}
    for process in psutil.Process().children(recursive=True):  # parents first
        with contextlib.suppress(psutil.Error):
            title = "".join(process.cmdline()[:1])
            if title.startswith("ray::") and not title.endswith("Agent"):
                found[process.pid] = [process.pid]
            elif (parent := process.ppid()) in found:
                found[parent].append(process.pid)
    return list(found.values())


class Meter(threading.Thread):
    """Looks at the memory of this process and of Ray's workers, again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = self.worker = 0
        self._ended = threading.Event()

    def reset(self) -> None:
        """Forgets what was highest."""
        self.driver = self.worker = 0

    def run(self) -> None:
        while not self._ended.wait(SAMPLED_EVERY_S):
            self.driver = max(self.driver, pss(os.getpid()))
            for pids in workers():
                with contextlib.suppress(OSError):
                    self.worker = max(self.worker, sum(map(pss, pids)))

    def end(self) -> None:
        self._ended.set()
        self.join()


def count_requests(log: str) -> Counter[str]:
    """Counts the requests in a web server's log by method; listings apart from other GETs."""
    # What was refused or not found may be in colour.
    found = re.findall(r'"(?:\x1b\[[\d;]*m)*(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP', log)
    return Counter("LIST" if "list-type=" in url else method for method, url in found)


class Measured:
    """Runs steps, and prints a line of each; a `cluster.steps.RunListener` and its `Progress`."""

    rows = "rows"  # what the line calls them

    def __init__(self, meter: Meter, imports_bytes: int, log: Path | None, **given: Any) -> None:
        """Takes what every line begins with."""
        self._meter, self._imports_bytes, self._log, self._given = meter, imports_bytes, log, given
        self._line: Line = {}
        self._files: Line = {}

    def begin(self, **given: Any) -> None:
        self._line = given
        self._log_size = self._log.stat().st_size if self._log else 0
        self._meter.reset()
        self._begin = time.perf_counter()

    def note_files(self, storage: Storage) -> None:
        """Counts the files in a step's folder; while its work is still there."""
        self._files = dict.fromkeys(("files", "bytes", "work_files", "work_bytes"), 0)
        for file in storage.scan():
            part = "work_" if file.path.startswith("work/") else ""
            self._files[f"{part}files"] += 1
            self._files[f"{part}bytes"] += file.num_bytes

    def noting_files(self, step: Step) -> Step:
        """Returns a step that has its files counted when its work ends."""

        def work(context: StepContext) -> Any:
            metrics = step.work(context)
            context.log.flush()
            self.note_files(context.storage)
            return metrics

        return replace(step, work=work)

    def end(self, num_rows: int, **given: Any) -> None:
        seconds = time.perf_counter() - self._begin
        line = self._given | self._line
        line |= {
            f"num_{self.rows}": num_rows,
            "seconds": round(seconds, 2),
            f"{self.rows}_per_s": round(num_rows / seconds, 1),
            "driver_mib": round(self._meter.driver / MIB, 1),
            "driver_over_imports_mib": round((self._meter.driver - self._imports_bytes) / MIB, 1),
            "largest_worker_mib": round(self._meter.worker / MIB, 1),
            **self._files,
            **given,
        }
        if self._log:
            with self._log.open() as log:
                log.seek(self._log_size)
                line["requests"] = dict(count_requests(log.read()))
        print(dump_json(line), flush=True)

    def step_found(self, step: Step, artifact: Artifact) -> None:
        print(dump_json(self._given | {"step": step.name, "done_before": True}), flush=True)

    def step_begins(self, step: Step, resumed: bool) -> "Measured":
        self.begin(step=step.name, **({"resumed": True} if resumed else {}))
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None:
        metrics = artifact.manifest.metrics
        named = ("num_pairs", "num_kept", "num_examples", "num_duplicates", "index")
        self.end(artifact.num_rows, **{name: metrics[name] for name in named if name in metrics})

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Shows nothing."""


# --- the rival


def run_shuffle(exchange: Exchange, sources: Sequence[Any], context: StepContext) -> Counter[str]:
    """Does what `run_exchange` does, by Ray Data's groupby; returns the counts of all."""
    import ray

    storage = context.storage

    def split(batch: pa.Table) -> pa.Table:
        return exchange.split(pickle.loads(batch["source"][0].as_py()))

    def merge(group: pa.Table) -> pa.Table:
        partition = group[PARTITION][0].as_py()
        keys = [(name, "ascending") for name in exchange.order]
        rows = group.drop_columns([PARTITION])
        table, counts = exchange.merge(rows.take(pc.sort_indices(rows, keys)))
        entry = write_table(storage, shard_path(partition), table) if table.num_rows else None
        return pa.table({"written": [json.dumps([entry and asdict(entry), dict(counts)])]})

    read = ray.data.from_items(
        [{"source": pickle.dumps(source)} for source in sources], override_num_blocks=len(sources)
    )
    rows = read.map_batches(split, batch_size=1, batch_format="pyarrow")
    groups = rows.groupby(PARTITION, num_partitions=exchange.num_partitions)
    totals = Counter[str]()
    for row in groups.map_groups(merge, batch_format="pyarrow").iter_rows():
        entry, counts = json.loads(row["written"])
        totals.update(counts)
        if entry:
            context.log.append([FileEntry(**entry)])
    return totals


def shuffle(run: Run, folder: Storage, measured: Measured) -> None:
    """Makes `pairs` again by Ray Data's shuffle, as it is set by default, and compares the rows."""
    from ray.data import DataContext

    steps = {step.name: step for step in run.steps}
    step = steps["pairs"]
    own, *inputs = (run.artifact(steps[name]) for name in ("pairs", *step.inputs))
    folder.delete("")
    context = StepContext(
        storage=folder, inputs=dict(zip(step.inputs, inputs, strict=True)), progress=measured
    )
    settings = DataContext.get_current()
    sorting, settings.shuffle_strategy = settings.shuffle_strategy, DataContext().shuffle_strategy
    with mock.patch.object(module_of(step), "run_exchange", run_shuffle):
        measured.begin(step="pairs", by=f"ray.data {settings.shuffle_strategy.value}")
        metrics = step.work(context)
        files = context.log.files()
    settings.shuffle_strategy = sorting
    same = files == own.shards
    measured.note_files(folder)
    measured.end(files.num_rows, num_pairs=metrics["num_pairs"], same_files=same)
    folder.delete("")


# --- the run


def recipe_of(data: Path, corpus: Path, num_passages: int, arguments: argparse.Namespace) -> Recipe:
    """Returns a recipe of a cluster's shape on this machine, at a thousandth of its models."""
    actors = {"num_actors": arguments.workers, "num_cpus": 1}
    student = {"model": "embedded:all-MiniLM-L6-v2", "layers": [0, 2, 5], "max_tokens": 192}
    cranfield = {"name": "cranfield", "path": str(data / "retrieval" / "cranfield")}
    return Recipe.model_validate(
        {
            "name": "scale",
            "corpus": {"path": str(corpus)},
            "seeds": {
                "num_seeds": max(1, round(arguments.seeds * num_passages)),
                "rows_per_shard": 256,
            },
            "llm": {"model": "embedded:SmolLM2-135M-Instruct"},
            "retriever": {"model": "embedded:all-MiniLM-L6-v2"},
            "candidates": {"num_candidates": NUM_SCORED},
            "scores": {"num_scored": NUM_SCORED},
            "student": student,
            "training": {"epochs": 1, "batch_size": 256},
            "evaluation": [cranfield],  # whose queries are kept out of training
            "resources": {"llm": actors, "encoder": actors, "index": {"num_cpus": 0}},
        }
    )


def run(folder: Path, num_passages: int, arguments: argparse.Namespace) -> None:
    """Prints a line a step for one number of passages."""
    recipe = recipe_of(arguments.data, corpus_folder(folder, num_passages), num_passages, arguments)
    name = f"{num_passages}-{arguments.seeds:g}{'-drawn' * arguments.drawn_candidates}"
    uri = join(arguments.storage or str(folder), name)
    for module in IMPORTS:
        importlib.import_module(module)
    meter = Meter()
    with mock.patch("os.cpu_count", return_value=arguments.workers):  # that Ray is given
        connect(folder / "logs")
    given = {
        "benchmark": "scale",
        "passages": num_passages,
        "seeds": arguments.seeds,
        "workers": arguments.workers,
        "drawn_candidates": arguments.drawn_candidates,
    }
    measured = Measured(meter, pss(os.getpid()), arguments.requests_log, **given)
    product = build_run(recipe, uri)
    steps = [
        drawn(step, recipe)
        if step.name == "candidates" and arguments.drawn_candidates
        else seeded(step)
        for step in product.steps
    ]
    meter.start()
    made = Run(uri, [measured.noting_files(step) for step in steps])
    made.execute(measured, until=arguments.until)
    if arguments.shuffle:
        shuffle(product, open_storage(f"{uri}-shuffle"), measured)
    meter.end()
    disconnect()


def main() -> None:
    """Runs each number of passages in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("passages", type=int, nargs="+")
    parser.add_argument("--until", default="mixture", help="the last step")
    parser.add_argument("--workers", type=int, default=2, help="CPUs that Ray is given")
    parser.add_argument("--seeds", type=float, default=0.1, help="a share of the passages")
    parser.add_argument("--drawn-candidates", action="store_true")
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps the corpora and the runs")
    parser.add_argument("--storage", help="of the runs, if not in the folder")
    parser.add_argument("--requests-log", type=Path, help="which the S3 server writes")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        run(arguments.folder, arguments.only, arguments)
        return
    sentences = read_sentences(arguments.data)
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(folder).absolute()
        for number in arguments.passages:
            write_corpus(corpus_folder(folder, number), sentences, number)
            own = [sys.executable, *sys.argv, "--folder", str(folder), "--only", str(number)]
            subprocess.run(own, check=True)


if __name__ == "__main__":
    main()
