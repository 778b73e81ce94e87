"""What a run of any size costs in its data plane, worked out of what `scale.py` measured.

    python benchmarks/scale_costs.py LINES [LINES ...]

LINES are files of the JSON lines that `scale.py` prints, of several sizes and shares of seeds, with
two workers. Prints the tables of docs/scale.md. What `candidates` searches for grows as S P, and is
in the first table alone. To each other step's lines a time is fitted by non-negative least squares
of the relative error:

    seconds x workers = a + b P + c S

for P passages and S seeds; `off` is how far a line is from it at most. A run's seconds on a cluster
are a + (b P + c S) / cores, where `cores` are those that do the step's work. Storage calls are
fitted to the lines that have them, by the shards of passages and of seeds. Those of the two largest
exchanges grow as sources times partitions, which is counted apart: two GETs each.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project is not installed

from pipelines.corpus.parts import passages_per_shard

Line = dict[str, Any]

# Of ray_cluster.yaml, whose prices docs/operating-a-cluster.md has: the CPUs that Ray has on the
# head, the actors of the recipe `cluster`, and dollars an hour of the nodes that are up meanwhile.
CORES = {"passages": 12, "seeds": 12, "queries": 8, "embeddings": 4, "pairs": 12}
CORES |= {"scores": 8, "fret": 12, "mixture": 12}
# Steps that read no passages, or know of no seeds; the others grow with both.
GROWS_WITH = {"passages": (1, 0), "embeddings": (1, 0)}
GROWS_WITH |= dict.fromkeys(("queries", "scores", "mixture"), (0, 1))
HEAD, LLM, INDEX = 0.81, 8 * 1.57, 4 * 0.92
DOLLARS_AN_HOUR = defaultdict(lambda: HEAD)
DOLLARS_AN_HOUR |= {"queries": HEAD + LLM, "scores": HEAD + LLM, "embeddings": HEAD + INDEX}
SEEDS = 500_000
SEEDS_A_SHARD = 256
SIZES = (10**6, 10**8, 10**9)
CORPUS_BYTES, PASSAGE_BYTES = 600, 330  # of a passage: in the corpus, and in its shard
NUM_KEYS = 13  # of a passage: its id and its bands
PUT_USD, GET_USD = 0.005 / 1000, 0.0004 / 1000  # S3 Standard, us-west-2; PUT, POST and LIST alike


def read_lines(files: Sequence[Path]) -> dict[str, list[Line]]:
    """Returns the lines of each step, without those of steps that were done before."""
    steps: dict[str, list[Line]] = {}
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if "seconds" in line:
                steps.setdefault(line["step"], []).append(line)
    return steps


def fit(rows: Any, values: Sequence[float]) -> tuple[np.ndarray, float]:
    """Returns non-negative factors of the columns, and the largest relative error of a row."""
    columns, target = np.array(rows, float), np.array(values, float)
    factors, _ = nnls(columns / target[:, None], np.ones(len(target)))
    return factors, float(np.abs(columns @ factors / target - 1).max())


def fit_step(step: str, lines: Sequence[Line]) -> tuple[np.ndarray, float]:
    """Returns seconds of a core for a start, a passage and a seed, and the largest error."""
    rows = np.array(of_sizes(lines)) * (1, *GROWS_WITH.get(step, (1, 1)))
    return fit(rows, [line["seconds"] * line["workers"] for line in lines])


def of_sizes(lines: Sequence[Line]) -> list[list[float]]:
    """Returns 1, P and S of each line."""
    return [[1, line["passages"], line["passages"] * line["seeds"]] for line in lines]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def duration(seconds: float) -> str:
    """Says seconds as people do."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def measured(steps: dict[str, list[Line]]) -> str:
    """Returns each step's lines beside each other."""
    sizes = sorted({(n["passages"], n["seeds"]) for lines in steps.values() for n in lines})
    rows = []
    for step, lines in steps.items():
        cells = []
        for size in sizes:
            line = next((n for n in lines if (n["passages"], n["seeds"]) == size), None)
            cells.append(
                f"{line['seconds']:,.1f} s; {line['driver_over_imports_mib']:.0f};"
                f" {line['largest_worker_mib']:.0f}"
                if line
                else ""
            )
        rows.append([f"`{step}`", *cells])
    return table(["step", *(f"{p:,}, {p * s:,.0f}" for p, s in sizes)], rows)


def units(steps: dict[str, list[Line]]) -> str:
    """Returns the factors of each step."""
    rows = []
    for step, lines in steps.items():
        if step not in CORES:
            continue
        (start, passage, seed), off = fit_step(step, lines)
        largest = max(lines, key=lambda line: line["num_rows"])
        written = [largest[name] / largest["num_rows"] for name in ("bytes", "work_bytes")]
        rows.append(
            [
                f"`{step}`",
                *(f"{start / 2:.1f}", f"{passage * 1e6:.0f}", f"{seed * 1e6:.0f}", f"{off:.0%}"),
                *(f"{each:.0f}" for each in written),
            ]
        )
    head = ["step", "start, s", "a passage, µs", "a seed, µs", "off", "bytes a row", "on the way"]
    return table(head, rows)


def costs(steps: dict[str, list[Line]], calls: dict[str, list[Line]]) -> str:
    """Returns time, storage calls and dollars of a cluster."""
    rows = []
    totals = np.zeros((len(SIZES), 4))
    for step, lines in steps.items():
        if step not in CORES:
            continue
        (start, passage, seed), _ = fit_step(step, lines)
        cells = []
        for number, passages in enumerate(SIZES):
            seconds = start / 2 + (passage * passages + seed * SEEDS) / CORES[step]
            puts, gets = requests(step, calls.get(step, []), passages)
            dollars = seconds / 3600 * DOLLARS_AN_HOUR[step] + puts * PUT_USD + gets * GET_USD
            totals[number] += seconds, puts, gets, dollars
            cells.append(cell(seconds, puts, gets, dollars))
        rows.append([f"`{step}`", *cells])
    rows.append(["all of these", *(cell(*total) for total in totals)])
    return table(["step", *(f"{size:,} passages" for size in SIZES)], rows)


def cell(seconds: float, puts: float, gets: float, dollars: float) -> str:
    """Returns a cell of the table of costs."""
    called = f"{puts / 1000:,.0f}; {gets / 1000:,.0f}" if puts else "; "
    return f"{duration(seconds)}; {called}; {dollars:,.2f}"


def requests(step: str, lines: Sequence[Line], passages: int) -> tuple[float, float]:
    """Returns the PUT, POST and LIST, and the GET and HEAD, of a step at a size."""
    if not lines:
        return 0.0, 0.0
    found = []
    for names in (("PUT", "POST", "LIST"), ("GET", "HEAD")):
        values = [max(1, sum(line["requests"].get(name, 0) for name in names)) for line in lines]
        shards = [num_shards(n["passages"], n["passages"] * n["seeds"]) for n in lines]
        factors, _ = fit(shards, values)
        found.append(float(factors @ num_shards(passages, SEEDS)))
    sources, partitions = {
        "passages": (passages * CORPUS_BYTES / 2**26, passages * NUM_KEYS / 4e6),
        "pairs": (passages * PASSAGE_BYTES / 2**24, SEEDS / SEEDS_A_SHARD),
    }.get(step, (0, 0))
    return found[0], found[1] + 2 * sources * partitions


def num_shards(passages: float, seeds: float) -> tuple[float, float, float]:
    """Returns 1, and how many shards passages and seeds have."""
    return 1, passages / passages_per_shard(int(passages * CORPUS_BYTES)), seeds / SEEDS_A_SHARD


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, nargs="+")
    steps = read_lines(parser.parse_args().lines)
    timed = {
        step: [n for n in lines if n["workers"] == 2 and not {"by", "requests"} & n.keys()]
        for step, lines in steps.items()
    }
    if "candidates" in timed:
        timed["candidates"] = [n for n in timed["candidates"] if not n["drawn_candidates"]]
    calls = {step: [n for n in lines if "requests" in n] for step, lines in steps.items()}
    for title, text in {
        "Seconds; the driver's MiB over its imports; the largest worker's MiB": measured(timed),
        "Unit costs": units(timed),
        "Time; thousands of PUT, POST and LIST; of GET and HEAD; dollars": costs(timed, calls),
    }.items():
        print(f"{title}\n\n{text}\n")


if __name__ == "__main__":
    main()
