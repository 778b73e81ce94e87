"""`tokay inspect`: training examples in the terminal, to be read before they are trusted."""

import heapq
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.artifacts import Json
from cluster.errors import UserError, excerpt
from pipelines.report.examples import ORDERS, describe_examples
from pipelines.report.run_folder import files_of_a_run, open_run_folder

TEXT_CHARACTERS = 100


def inspect_run(
    uri: str, *, task: str | None, dropped_by: str | None, order: str, num_examples: int
) -> list[dict[str, Json]]:
    """Returns examples of a run's FRet artifact, as report.json describes them.

    Args:
        uri: The run folder.
        task: Only queries of this task.
        dropped_by: Only queries dropped for this reason (part of it is enough; `any`: for any
            reason); None: only kept ones.
        order: A key of `ORDERS`: `shift` (positives that the retriever ranks lowest first), `doubt`
            (QL and RC disagree most), `hardest` (the positive explains the query least), `stored`.
        num_examples: How many.

    Raises:
        UserError: The run has no FRet artifact, there is no such order, or no query matches.
    """
    run = open_run_folder(uri)
    fret = run.artifacts.get("fret")
    if fret is None:
        raise UserError(f"run {uri} has no finished step 'fret': let `tokay run` get that far")
    if order not in ORDERS:
        raise UserError(f"--by {order!r}: accepted are {', '.join(ORDERS)}")

    def matches(row: dict[str, Any]) -> bool:
        reason = row["dropped_by"]
        if dropped_by is None:
            wanted = reason is None
        else:
            wanted = reason is not None and (dropped_by == "any" or dropped_by in reason)
        return wanted and (task is None or row["task"] == task)

    def key(row: dict[str, Any]) -> float:
        return ORDERS[order](row) if row["fused"] else float("-inf")

    with files_of_a_run(uri):
        rows = (row for table in fret.tables() for row in table.to_pylist() if matches(row))
        chosen = heapq.nlargest(num_examples, rows, key=key)
        if not chosen:
            reasons = ", ".join(sorted(fret.manifest.metrics.get("dropped_by", {})))
            raise UserError(f"run {uri} has no such query; its reasons for dropping are: {reasons}")
        return describe_examples(chosen, fret, run.artifacts.get("passages"))


def print_examples(examples: list[dict[str, Json]], console: Console) -> None:
    """Prints each query with its candidates, the best first."""
    for example in examples:
        console.print()
        console.print(
            Text.assemble(
                (example["query"] or "(nothing)", "bold"),
                (f"  {example['task']}", "dim"),
                (f"  dropped: {example['dropped_by']}" if example["dropped_by"] else "", "red"),
            )
        )
        if not example["candidates"]:
            console.print(_line(example["seed"], "seed"))
            continue
        table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1), expand=True)
        for heading in ("R", "QL (rank)", "RC (rank)", "cosine"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("passage", ratio=1, no_wrap=True, overflow="ellipsis")
        for row in example["candidates"]:
            table.add_row(
                f"{row['fused']:.2f}",
                *(_score(row[judge], row[f"{judge}_rank"]) for judge in ("ql", "rc")),
                f"{row['similarity']:.2f}",
                _line(row, ", ".join(row["roles"])),
            )
        console.print(table)


def _score(score: float | None, rank: int | None) -> str:
    return "" if score is None else f"{score:.2f} ({rank})"


def _line(passage: dict[str, Any], role: str) -> Text:
    text = excerpt(passage["text"], TEXT_CHARACTERS)
    return Text.assemble(
        (f"[{role}] " if role else "", "green"),
        (passage["title"] or "", "bold"),
        " ",
        (text, "dim"),
    )
