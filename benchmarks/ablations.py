"""Gecko's ablations (its tables 4 to 6) with a recipe of your own, as one table.

    python benchmarks/ablations.py [RECIPE] [--storage RUN] [--test-sets cranfield stsb banking77]
        [--dimensions 384 128] [--tables mixture labels tasks format] [--training-seeds 1]
        [--set KEY=VALUE ...]

- stages: the untrained student, pre-finetuned, FRet alone, all sets.
- mixture: all sets; without FRet; without the sets of one kind.
- labels: FRet alone; the seed or the relabelled passage as positive; without a hard negative, with
  a random one, or the lowest ranked one.
- tasks: equally many FRet examples of one task alone, of all tasks by rows, of all tasks evenly.
- format: all sets without the unified format.

The recipe's queries are written and scored once; RUN may be a copy of a finished run, and is left
with the last variant. FRet alone is trained for --fret-epochs. Each variant is judged on the named
test sets of the recipe, or all of them. Prints a table in Markdown and a JSON line; run again, it
goes on where it stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.artifacts import Artifact
from cluster.plain_json import dump_json
from cluster.storage import open_storage
from pipelines.datasets.test_sets import TestSet
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe

FLAGS = {"retrieval": "--beir"}  # the others are named after their kind
BEFORE = {"start": "student/model", "pre-finetuned": "prefinetuning/encoder"}


@dataclass(frozen=True)
class Variant:
    """A row of the table and the recipe keys that make it."""

    table: str
    name: str
    settings: dict[str, object]

    def key(self, seed: int) -> str:
        """Names its scores in the notes."""
        return f"{self.name}, {seed}"


def variants(recipe: Recipe, rows_by_task: Counter[str], fret_epochs: float) -> Iterator[Variant]:
    """Yields the tables' variants; the last is the only one that needs another pre-finetuning."""
    yield Variant("stages", "all sets", {})
    yield Variant("mixture", "all sets", {})
    labelled = recipe.mixture.labelled
    if labelled:
        yield Variant("mixture", "without FRet", {"mixture.fret_weight": 0})
    for kind in sorted({each.kind for each in labelled}):
        kept = [
            each.model_dump(mode="json", exclude_defaults=True)
            for each in labelled
            if each.kind != kind
        ]
        yield Variant("mixture", f"without {kind} sets", {"mixture.labelled": kept})
    fret_alone = {"mixture.labelled": [], "training.epochs": fret_epochs}
    yield Variant("stages", "FRet alone", fret_alone)
    labels = {
        "seed, no hard negative": ("seed", "none"),
        "seed, lowest ranked": ("seed", "lowest"),
        "relabelled, no hard negative": ("fused", "none"),
        "relabelled, random": ("fused", "random"),
        "relabelled, lowest ranked": ("fused", "lowest"),
    }
    for name, (positive, negative) in labels.items():
        chosen = {"fret.positive": positive, "fret.negative": negative}
        yield Variant("labels", name, fret_alone | chosen)
    fewest = min(rows_by_task.values())
    few = fret_alone | {
        "mixture.fret_max_rows": fewest,
        "training.epochs": fret_epochs * rows_by_task.total() / fewest,
    }
    for task in sorted(rows_by_task):
        yield Variant("tasks", f"{task} alone", few | {"mixture.fret_only_tasks": [task]})
    yield Variant("tasks", "all, by rows", few)
    yield Variant("tasks", "all, evenly", few | {"mixture.fret_tasks": "uniform"})
    plain = {"student.query_template": "{text}", "student.passage_template": "{title} {text}"}
    yield Variant("format", "all sets, without the unified format", plain)


def tokay(*arguments: str) -> str:
    """Runs the command; returns what it printed."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class Ablations:
    """A run folder, and the scores that were measured in it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.name: str = arguments.recipe
        self.storage: Path = arguments.storage
        self.fixed: list[str] = arguments.set
        self.recipe = load_recipe(self.name, self.fixed)
        self.test_sets = [
            test_set
            for test_set in self.recipe.evaluation
            if test_set.kind != "mteb"
            and (not arguments.test_sets or test_set.name in arguments.test_sets)
        ]
        self.dimensions: list[int] = arguments.dimensions
        self.notes = self.storage / "ablations.json"
        self.of = {"recipe": self.name, "set": self.fixed, "fret_epochs": arguments.fret_epochs}
        self.scores: dict[str, dict[str, float]] = {}
        if self.notes.exists():
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
            if notes["of"] != self.of:
                sys.exit(f"{self.notes} is of {notes['of']}, not of {self.of}: use another storage")
            self.scores = notes["scores"]

    def rows_by_task(self) -> Counter[str]:
        """Writes and scores the queries, and counts FRet's examples of each task."""
        self._run({}, "fret")
        fret = Artifact.open(open_storage(str(self.storage / "fret")))
        assert fret is not None
        table = fret.read(["task", "dropped_by"]).to_pylist()
        return Counter(row["task"] for row in table if row["dropped_by"] is None)

    def measure(self, variant: Variant, seed: int) -> None:
        """Trains and judges a variant, unless that is done."""
        key = variant.key(seed)
        if self._is_judged(key):
            return
        self._run(variant.settings | {"training.seed": seed}, "export")
        if variant.table != "format":
            for name, folder in BEFORE.items():
                if (self.storage / folder).exists() and not self._is_judged(name):
                    self._judge(name, folder)
        self._judge(key, "export/model")

    def _is_judged(self, key: str) -> bool:
        scores = self.scores.get(key, {})
        names = {test_set.name for test_set in self.test_sets}
        if not self.dimensions:
            return names <= {each.rpartition("@")[0] for each in scores}
        return {f"{name}@{size}" for name in names for size in self.dimensions} <= scores.keys()

    def _run(self, settings: dict[str, object], until: str) -> None:
        given = [*self.fixed]
        given += [
            f"{key}={yaml.safe_dump(v, default_flow_style=True, width=10**6).splitlines()[0]}"
            for key, v in settings.items()
        ]
        sets = [word for setting in given for word in ("--set", setting)]
        command = ["run", self.name, "--storage", str(self.storage), *sets]
        tokay(*command, "--rebuild", "--until", until)

    def _judge(self, key: str, folder: str) -> None:
        cut = ["--dimensions", ",".join(map(str, self.dimensions))] if self.dimensions else []
        alike: dict[tuple[str, str | None], list[TestSet]] = defaultdict(list)
        for test_set in self.test_sets:
            alike[test_set.split, test_set.task].append(test_set)
        for (split, task), test_sets in alike.items():
            flags = ["--split", split, *(["--task", task] if task else []), *cut]
            for each in test_sets:
                flags += [FLAGS.get(each.kind, f"--{each.kind}"), each.path]
            report = json.loads(tokay("eval", str(self.storage / folder), *flags, "--json"))
            names = {Path(each.path).resolve().name: each.name for each in test_sets}
            for row in report["results"]:
                place = f"{names[row['dataset']]}@{row['dimensions']}"
                self.scores.setdefault(key, {})[place] = row["score"]
        self.notes.write_text(
            dump_json({"of": self.of, "scores": self.scores}, indent=1), encoding="utf-8"
        )
        print(key, self.scores[key], file=sys.stderr, flush=True)

    def rows(self, table: str, name: str, keys: list[str]) -> Iterator[list[str]]:
        """Yields a row of the table for each number of dimensions, means over the keys."""
        measured = [self.scores[key] for key in keys if key in self.scores]
        sizes = {int(key.rpartition("@")[2]) for scores in measured for key in scores}
        for size in self.dimensions or [max(sizes)] if measured else ():
            each = [
                [scores[f"{test_set.name}@{size}"] for test_set in self.test_sets]
                for scores in measured
            ]
            means = [statistics.fmean(scores) for scores in each]
            cells = [*map(statistics.fmean, zip(*each, strict=True)), statistics.fmean(means)]
            seeds = ", ".join(f"{mean:.4f}" for mean in means) if len(means) > 1 else ""
            yield [table, name, str(size), *(f"{cell:.4f}" for cell in cells), seeds]


def main() -> None:
    """Runs what the notes of an earlier run do not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="gecko-mini")
    parser.add_argument("--storage", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--test-sets", nargs="*", default=["cranfield", "stsb", "banking77"])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[])
    tables = ["stages", "mixture", "labels", "tasks", "format"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables[1:])
    parser.add_argument("--training-seeds", type=int, default=1)
    parser.add_argument("--fret-epochs", type=float, default=3)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    ablations = Ablations(arguments)
    rows_by_task = ablations.rows_by_task()
    chosen = [
        variant
        for variant in variants(ablations.recipe, rows_by_task, arguments.fret_epochs)
        if variant.table in arguments.tables
    ]
    for variant in chosen:
        for seed in range(arguments.training_seeds):
            ablations.measure(variant, seed)
    names = [test_set.name for test_set in ablations.test_sets]
    heads = ["table", "variant", "dim", *names, "mean", "each seed's mean"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    printed = [("", name, [name]) for name in BEFORE]
    seeds = range(arguments.training_seeds)
    printed += [(each.table, each.name, [each.key(seed) for seed in seeds]) for each in chosen]
    for given in printed:
        for row in ablations.rows(*given):
            print(f"| {' | '.join(row)} |")
    print(dump_json({"benchmark": "ablations", "fret": rows_by_task, **ablations.scores}))


if __name__ == "__main__":
    main()
