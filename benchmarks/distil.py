"""Whether distillation makes an encoder better: variants by sets, layers and training seeds.

    python benchmarks/distil.py run --runs FOLDER --results FILE.jsonl --variant NAME[,NAME]
        [--set cranfield,scifact] [--layers 6,3] [--seed 0,1,2] [--data FOLDER]
    python benchmarks/distil.py table --results FILE.jsonl [--seeds 1,2,3] [--against VARIANT]
        [--markdown]

`run` takes the variants of distil.yaml. Each cell is one `tokay run`, up to what is exported, over
the passages of a test set; its human queries judge, with the product's own evaluation. A set has
one run folder, in which only what a cell changes is made again, so that the LLM writes its queries
once. Variants come innermost, so that a student of fewer layers learns its start's vectors once for
all of them. The seed is that of batches and dropout. A cell is one line of FILE.jsonl, with the
nDCG@10 of every query, rounded to four digits; one that failed is a line too, with its error. What
stands there is skipped, so the same command goes on where it stopped, and tries again what failed.

Models: the retriever; `before`, the student as it is cut; `start`, what the training on labels
starts from, which is `before` unless embedding distillation comes first; `trained`, in any case;
`exported`, as the gate chose.

`table` gives differences in points of 100, of each query averaged over the seeds, then over the
queries of a set, then over sets, all sets alike. Intervals (95 %) and two-sided p are from a paired
bootstrap of the queries of each set; chance in training is in them only as far as seeds differ.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.artifacts import Artifact
from cluster.errors import TokayError
from cluster.plain_json import dump_json
from pipelines.datasets.test_sets import load_folder
from pipelines.encoders import MODEL, TRAINED, load_encoder, saved_encoder
from pipelines.evaluation.evaluate import evaluate_at
from pipelines.evaluation.mteb_model import ModelIdentity
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.training.gate import START
from pipelines.yaml_files import read_yaml, write_yaml

SETS = ("cranfield", "scifact", "stackexchange-answers", "cosqa", "liveqa-med")
VARIANTS = Path(__file__).with_suffix(".yaml")
CELL = ("variant", "set", "layers", "seed")
METRIC = "ndcg_at_10"
TIMED = ("embedding_distillation", "training", "linear_adapter", "gate")
OF_VERDICT = ("verdict", "reason", "fusion", "scale", "num_judged")
PERFECT = 0.999
NUM_DRAWS, DRAWS_AT_ONCE = 10_000, 500
SIGNIFICANT = 0.05

Tree = dict[str, Any]
Line = dict[str, Any]


# --- run


def merge(tree: Tree, over: Tree) -> Tree:
    """Returns a recipe's keys with others over them, as a recipe lies over its base."""
    merged = dict(tree)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below or {}, value) if isinstance(value, dict) else value
    return merged


def keys_of(config: Tree, variant: str, layers: int) -> Tree:
    """Returns a variant's keys: `common`, the variant, then what both say of so many layers."""
    if variant not in config["variants"]:
        sys.exit(f"variant {variant!r}: accepted are {', '.join(config['variants'])}")
    parts, key = (config["common"], config["variants"][variant]), f"layers_{layers}"
    if not any(key in part for part in parts):
        sys.exit(f"--layers {layers}: neither common nor {variant} has {key}")
    keys: Tree = {}
    for part in (*parts, *(part.get(key, {}) for part in parts)):
        keys = merge(keys, {k: v for k, v in part.items() if not re.fullmatch(r"layers_\d+", k)})
    return keys


def recipe_of(keys: Tree, folder: Path, seed: int) -> Tree:
    """Returns the recipe of a cell; `folder` is its test set.

    The order of batches has a seed of its own. Without dropout it is all that differs.
    """
    test_set = {"name": folder.name, "path": str(folder)}
    cell: Tree = {"name": "distil", "corpus": {"path": str(folder)}, "evaluation": [test_set]}
    seeds = {"mixture": {"seed": seed}, "training": {"seed": seed}}
    cell |= seeds
    if keys.get("embedding_distillation") is not None:
        cell["embedding_distillation"] = seeds
    if keys.get("linear_adapter") is not None:
        cell["linear_adapter"] = {"seed": seed}
    return merge(keys, cell)


def read_lines(results: Path) -> list[Line]:
    """Returns what was measured; nothing where there is no such file."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def stands(lines: Iterable[Line], cell: Line) -> bool:
    """Says whether a cell was measured with the same keys."""
    return any(
        line["exit_code"] == 0 and line["keys"] == cell["keys"] and key(line) == key(cell)
        for line in lines
    )


def key(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in CELL)


def run_cell(cell: Line, data: Path, runs: Path) -> Line:
    """Runs and measures a cell; returns its line."""
    storage, file = runs / cell["set"], runs / f"{cell['set']}.yaml"
    runs.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(cell["keys"], data / "retrieval" / cell["set"], cell["seed"])
    file.write_text(write_yaml(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "pipelines.cli", "run", str(file), "--storage", str(storage)]
    command += ["--rebuild", "--until", "export", "--json"]
    started = time.perf_counter()
    with (runs / f"{cell['set']}.log").open("a", encoding="utf-8") as log:
        ended = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True)
        log.write(ended.stderr)
    line: Line = {"benchmark": "distil", **cell, "exit_code": ended.returncode}
    try:
        if ended.returncode:
            said = ended.stderr.strip().splitlines()
            line["error"] = said[-1] if said else "nothing was said"
        else:
            line |= measure(load_recipe(file), storage, runs / "mteb")
    except TokayError as error:
        line |= {"exit_code": error.exit_code, "error": str(error)}
    return line | {"wall_s": round(time.perf_counter() - started, 1)}


def measure(recipe: Recipe, storage: Path, results: Path) -> Line:
    """Returns the figures of a finished run; `results` keeps what was measured of each model.

    It does what the step `evaluation` does, but measures the trained student beside what the gate
    chose, and the retriever and the student before once a set, not once a run.
    """
    run = build_run(recipe, str(storage))
    found = {step.name: run.artifact(step) for step in run.steps_until("export")}
    steps: dict[str, Artifact] = {name: each for name, each in found.items() if each is not None}
    student = recipe.student
    before = saved_encoder(steps["student"], student, MODEL)
    distilled = steps.get("embedding_distillation")
    models = {
        "retriever": recipe.retriever,
        "before": before,
        "start": saved_encoder(distilled, student, TRAINED) if distilled else before,
        "trained": saved_encoder(steps[recipe.trained_by], student, TRAINED),
        "exported": saved_encoder(steps["export"], student, MODEL),
    }
    (test_set,) = recipe.evaluation
    data, scores = load_folder(test_set), {}
    for name, model in models.items():
        encoder = load_encoder(model)
        known = ModelIdentity(
            name="distil", revision=encoder.fingerprint, num_parameters=encoder.num_parameters
        )
        (result,) = evaluate_at(encoder, data, model=known, task=test_set.task, results=results)
        scores[name] = result.per_query[METRIC]
    queries = sorted(scores["retriever"])
    metrics = {name: step.manifest.metrics for name, step in steps.items()}
    judged = next((each for each in metrics.values() if "verdict" in each), None)
    return {
        "queries": queries,
        METRIC: {
            name: [round(by_query[query], 4) for query in queries]
            for name, by_query in scores.items()
        },
        "gate": metrics.get("gate"),
        "verdict": {name: judged[name] for name in OF_VERDICT} if judged else None,
        "fret": {name: metrics["fret"][name] for name in ("num_queries", "num_kept")},
        "seconds_s": {name: steps[name].manifest.seconds_s for name in TIMED if name in steps},
        "versions": steps["training"].manifest.versions,
    }


def run(arguments: argparse.Namespace) -> None:
    """Measures every cell that the file of results does not hold."""
    config = read_yaml(arguments.config.read_bytes(), str(arguments.config))
    cells = [
        dict(zip(CELL, (variant, name, layers, seed), strict=True))
        | {"keys": keys_of(config, variant, layers)}
        for name in arguments.set
        for layers in arguments.layers
        for seed in arguments.seed
        for variant in arguments.variant
    ]
    for number, cell in enumerate(cells, 1):
        if stands(read_lines(arguments.results), cell):
            continue
        line = run_cell(cell, arguments.data, arguments.runs)
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(dump_json(line) + "\n")
        means = {
            name: round(float(np.mean(each)), 4) for name, each in line.get(METRIC, {}).items()
        }
        shown = f"{number}/{len(cells)} {key(cell)} {line['wall_s']} s {line.get('error', means)}"
        print(shown, file=sys.stderr, flush=True)


# --- table


class Difference(NamedTuple):
    """A mean difference with its 95 % interval and two-sided p."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        mean, low, high = (100 * each for each in self[:3])
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def bootstrap(by_set: Mapping[str, np.ndarray]) -> tuple[Difference, dict[str, Difference]]:
    """Returns the mean over sets of the mean over queries, and each set's own.

    The queries of each set are drawn with replacement, apart from those of other sets. p is twice
    the share of draws on the other side of 0, or on it (Efron and Tibshirani, 1993, chapter 15).

    Args:
        by_set: Differences of a set's queries, ``[queries]``.
    """
    rng = np.random.default_rng(0)
    drawn = {}
    for name, values in by_set.items():
        chances, shape = np.full(len(values), 1 / len(values)), DRAWS_AT_ONCE
        parts = [
            rng.multinomial(len(values), chances, size=shape) @ values / len(values)
            for _ in range(NUM_DRAWS // DRAWS_AT_ONCE)
        ]
        drawn[name] = np.concatenate(parts)
    means = {name: float(values.mean()) for name, values in by_set.items()}
    overall = _difference(float(np.mean(list(means.values()))), np.mean(list(drawn.values()), 0))
    return overall, {name: _difference(means[name], drawn[name]) for name in by_set}


def _difference(mean: float, drawn: np.ndarray) -> Difference:
    low, high = np.percentile(drawn, [2.5, 97.5])
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (1 + len(drawn)))
    return Difference(mean, float(low), float(high), p)


def score(line: Line, model: str) -> np.ndarray:
    """Returns a model's score of each query, ``[queries]``; an exported start is the start."""
    if model == "exported" and line["gate"] and line["gate"]["weight"] == START:
        model = "start"
    return np.array(line[METRIC][model])


def over_seeds(lines: Iterable[Line], model: str, minus: str | None = None) -> dict[str, Any]:
    """Returns each set's scores (or differences) of queries, averaged over its lines."""
    grouped, queries = defaultdict(list), {}
    for line in lines:
        if queries.setdefault(line["set"], line["queries"]) != line["queries"]:
            sys.exit(f"{line['set']}: its lines are of different queries: give each its own file")
        values = score(line, model)
        grouped[line["set"]].append(values - score(line, minus) if minus else values)
    return {name: np.mean(each, axis=0) for name, each in grouped.items()}


def lost(lines: Sequence[Line]) -> dict[str, float]:
    """Returns what queries lose that the start answers perfectly, of each set that has such."""
    starts, gains = over_seeds(lines, "start"), over_seeds(lines, "trained", "start")
    perfect = {name: gains[name][starts[name] >= PERFECT] for name in starts}
    return {name: -float(each.mean()) for name, each in perfect.items() if each.size}


def shares(lines: Sequence[Line]) -> tuple[float, dict[str, float]]:
    """Returns the student's mean over sets as a share of the retriever's, and each set's."""
    own, theirs = (
        {name: float(each.mean()) for name, each in over_seeds(lines, model).items()}
        for model in ("trained", "retriever")
    )
    of_sets = {name: own[name] / theirs[name] for name in own}
    return sum(own.values()) / sum(theirs.values()), of_sets


def by_variant(lines: Iterable[Line]) -> dict[tuple[str, int], list[Line]]:
    grouped = defaultdict(list)
    for line in lines:
        grouped[line["variant"], line["layers"]].append(line)
    return dict(grouped)


def current(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines that are measured, of a variant's latest keys; a cell's last line."""
    measured = [line for line in lines if line["exit_code"] == 0]
    latest = {(line["variant"], line["layers"]): line["keys"] for line in measured}
    kept = [e for e in measured if e["keys"] == latest[e["variant"], e["layers"]]]
    return list({key(line): line for line in kept}.values())


def falls(each: Mapping[str, Difference]) -> list[str]:
    """Returns the number of sets that fall, and the set that gains least."""
    worst = min(each, key=lambda name: each[name].mean)
    num = sum(difference.mean < 0 for difference in each.values())
    return [f"{num} of {len(each)}", f"{worst} {100 * each[worst].mean:+.2f}"]


class Section(NamedTuple):
    """A table with its title."""

    title: str
    head: list[str]
    rows: list[list[str]]


def summary(lines: Sequence[Line]) -> Iterator[Section]:
    """Yields a line a variant and number of layers, then each set's differences."""
    sets = list(dict.fromkeys(line["set"] for line in lines))
    rows, gated, of_sets = [], [], []
    for (variant, layers), own in by_variant(lines).items():
        name = [variant, str(layers)]
        gain, gains = bootstrap(over_seeds(own, "trained", "start"))
        against, _ = bootstrap(over_seeds(own, "trained", "retriever"))
        (share, each_share), losses = shares(own), lost(own)
        lowest = min(each_share, key=lambda each: each_share[each])
        seeds = sorted({*Counter(line["set"] for line in own).values()})
        rows.append(
            [
                *(*name, "-".join(map(str, seeds)), str(gain), f"{gain.p:.2g}", *falls(gains)),
                f"{100 * np.mean([*losses.values()]):.2f}" if losses else "",
                *(str(against), f"{against.p:.2g}"),
                *(f"{share:.1%}", f"{lowest} {each_share[lowest]:.1%}"),
            ]
        )
        of_sets.append([*name, "trained", *(str(gains.get(each, "")) for each in sets)])
        if all(line["gate"] for line in own):
            gain, gains = bootstrap(over_seeds(own, "exported", "start"))
            gated.append([*name, str(gain), f"{gain.p:.2g}", *falls(gains)])
            of_sets.append([*name, "exported", *(str(gains.get(each, "")) for each in sets)])
        shown = [f"{-100 * losses[each]:+.2f}" if each in losses else "" for each in sets]
        of_sets.append([*name, "trained, perfect queries", *shown])
    head = ["variant", "layers"]
    gain_head = ["over the start", "p", "sets that fall", "worst"]
    share_head = ["over the retriever", "p", "of the retriever", "lowest"]
    yield Section(
        "Trained, without the gate",
        [*head, "seeds", *gain_head, "perfect queries lose", *share_head],
        rows,
    )
    yield Section("Exported, by the gate", [*head, *gain_head], gated)
    yield Section("Over the start, set by set", [*head, "model", *sets], of_sets)


def decisions(lines: Iterable[Line]) -> Iterator[Section]:
    """Yields what the gate decided, cell by cell, how often it erred, and the verdicts."""
    rows, counts, verdicts = [], defaultdict(Counter), defaultdict(Counter)
    for line in lines:
        start = score(line, "start")
        trained = bootstrap({"": score(line, "trained") - start})[0]
        exported = bootstrap({"": score(line, "exported") - start})[0]
        gate, verdict = line["gate"], (line["verdict"] or {}).get("verdict", "")
        if verdict:
            verdicts[verdict].update(["all", "gained" if trained.mean > 0 else "did not"])
        if not gate:
            continue
        student = gate["candidates"][-1]
        said = f"{100 * student['difference']:+.2f}, p {student['p']:.2g}"
        shown = (said, gate["exported"], str(trained), str(exported), verdict)
        rows.append([*map(str, key(line)), *shown])
        if gate["weight"] == START:
            done, erred, told = "start exported", "winner rejected", trained
            wrong = trained.mean > 0
        else:
            done, erred, told = "student or mixture exported", "loser shipped", exported
            wrong = exported.mean < 0
        happened = ["decisions", done]
        if wrong:
            happened.append(erred)
            if told.p < SIGNIFICANT:
                happened.append(f"significant {erred}")
        for group in ((line["variant"], str(line["layers"])), ("all", "")):
            counts[group].update(happened)
    head = ["student, held out", "exported", "trained, test set", "exported, test set", "verdict"]
    yield Section("The gate's decisions", [*CELL, *head], rows)
    columns = [
        *("decisions", "student or mixture exported", "loser shipped", "significant loser shipped"),
        *("start exported", "winner rejected", "significant winner rejected"),
    ]
    rows = [[*group, *(str(each[name]) for name in columns)] for group, each in counts.items()]
    yield Section("How often the gate errs", ["variant", "layers", *columns], sorted(rows))
    rows = [[v, *(str(verdicts[v][n]) for n in ("all", "gained", "did not"))] for v in verdicts]
    hits = verdicts["GO"]["gained"] + verdicts["SKIP"]["did not"]
    given = verdicts["GO"]["all"] + verdicts["SKIP"]["all"]
    title = f"Verdicts: GO and SKIP came true in {hits} of {given}"
    yield Section(title, ["verdict", "cells", "trained gained", "did not"], sorted(rows))


def compared(lines: Sequence[Line], against: str) -> Section:
    """Returns variants minus one of them, over the sets and seeds that both were measured with."""
    grouped = by_variant(lines)
    sets, rows = list(dict.fromkeys(line["set"] for line in lines)), []
    for (variant, layers), own in grouped.items():
        theirs = {(line["set"], line["seed"]): line for line in grouped.get((against, layers), [])}
        both = [line for line in own if (line["set"], line["seed"]) in theirs]
        if variant == against or not both:
            continue
        other = [theirs[line["set"], line["seed"]] for line in both]
        for model in ("trained", "exported"):
            after, before = over_seeds(both, model), over_seeds(other, model)
            gain, gains = bootstrap({name: after[name] - before[name] for name in after})
            each = [str(gains.get(name, "")) for name in sets]
            rows.append([variant, str(layers), model, str(gain), f"{gain.p:.2g}", *each])
    return Section(f"Minus {against}", ["variant", "layers", "model", "mean", "p", *sets], rows)


def show(section: Section, markdown: bool) -> None:
    """Prints a table that has rows."""
    if not section.rows:
        return
    table = [section.head, *section.rows]
    widths = [0 if markdown else max(map(len, column)) for column in zip(*table, strict=True)]
    edge, between = ("| ", " | ") if markdown else ("", "  ")
    print(f"\n{section.title}\n")
    for number, row in enumerate(table):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"{edge}{between.join(cells)}{edge[::-1]}".rstrip())
        if markdown and number == 0:
            print(f"|{'---|' * len(row)}")


def table(arguments: argparse.Namespace) -> None:
    """Prints what the file of results comes to."""
    lines = [
        e for e in read_lines(arguments.results) if e["seed"] in (arguments.seeds or [e["seed"]])
    ]
    measured = current(lines)
    if not measured:
        sys.exit(f"{arguments.results} holds no measured cell")
    sections = [*summary(measured), *decisions(measured)]
    if arguments.against:
        sections = [compared(measured, arguments.against)]
    for section in sections:
        show(section, arguments.markdown)
    failed = [line for line in lines if line["exit_code"]]
    outdated = len(lines) - len(failed) - len(measured)
    print(f"\n{len(measured)} cells; {outdated} lines of other keys; {len(failed)} failures")
    for line in failed:
        print(f"  {key(line)}: {line['error']}")


def main() -> None:
    """Runs cells or prints their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    runs = commands.add_parser("run", help="measure cells")
    data = Path(os.environ.get("TOKAY_DATA", "data"))
    runs.add_argument("--data", type=Path, default=data, help="with retrieval/SET in BEIR's layout")
    runs.add_argument("--runs", type=Path, required=True, help="of the run folders, one a set")
    runs.add_argument("--results", type=Path, required=True)
    runs.add_argument("--config", type=Path, default=VARIANTS, help="the variants")
    runs.add_argument("--variant", type=names, required=True)
    runs.add_argument("--set", type=names, default=SETS)
    runs.add_argument("--layers", type=numbers, default=[6, 3])
    runs.add_argument("--seed", type=numbers, default=[0])
    runs.set_defaults(command=run)
    tables = commands.add_parser("table", help="print what was measured")
    tables.add_argument("--results", type=Path, required=True)
    tables.add_argument("--seeds", type=numbers, help="of these alone")
    tables.add_argument("--against", help="a variant that the others are compared with")
    tables.add_argument("--markdown", action="store_true")
    tables.set_defaults(command=table)
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
