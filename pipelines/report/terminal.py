"""The core of the report for a terminal: the table, and a few queries before and after."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.artifacts import Json
from cluster.errors import excerpt
from pipelines.report.test_sets import model_titles

RESULT_CHARACTERS = 160


def print_evaluation(document: dict[str, Json], console: Console) -> None:
    """Prints each test set's table and chosen queries; laid out for 80 to 120 columns."""
    titles = model_titles(document["gate"])
    if document["gate"]:
        console.print()
        _print_gate(document["gate"], console)
    if judges := document["judges"]:
        console.print(Text(_verdict(judges), "" if judges["relabels"] else "bold red"))
    if not document["test_sets"] and not document["scores"]:
        console.print("The run has no evaluation.", style="dim")
    if document["scores"]:
        console.print()
        console.print(_all_scores(document["scores"], titles))
    for name, test_set in document["test_sets"].items():
        console.print()
        console.print(
            Text.assemble(
                (name, "bold"),
                f"  {test_set['num_queries']:,} queries over {test_set['num_passages']:,} passages",
            )
        )
        console.print(_scores(test_set, titles))
        _print_difference(test_set, console)
        console.print(
            Text("\nqueries: nDCG@10 before → after, first results, ✓ is an answer", "dim")
        )
        for query in test_set["queries"]:
            console.print(_query(query))
            console.print()


def _print_gate(gate: dict[str, Any], console: Console) -> None:
    colour = "yellow" if gate["weight"] == 0 else "green"
    console.print(Text(gate["decision"], f"bold {colour}"))
    for note in gate["notes"]:
        console.print(Text(note, "dim"))


def _verdict(judges: dict[str, Any]) -> str:
    not_relabelled = " The labels are the seeds; the teacher did not relabel."
    return f"Teacher: {judges['reason']}.{'' if judges['relabels'] else not_relabelled}"


def _scores(test_set: dict[str, Any], titles: dict[str, str]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("nDCG@10 [95 %]", "recall@10 [95 %]", "texts/s", "parameters"):
        table.add_column(Text(heading), justify="right")
    for model, title in titles.items():
        if model not in test_set:
            continue
        row = test_set[model]
        table.add_row(
            title,
            _estimate(row["ndcg_at_10"], row["ndcg_at_10_interval"]),
            _estimate(row["recall_at_10"], row["recall_at_10_interval"]),
            f"{row['texts_per_s']:,.0f}",
            f"{row['num_parameters'] / 1e6:.1f} M",
            style="bold" if model == "student_after" else "",
        )
    return table


def _all_scores(scores: dict[str, Any], titles: dict[str, str]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("test set", "type", "dim"):
        table.add_column(heading)
    models = scores["models"]
    for model in models:
        table.add_column(titles[model].removeprefix("Student "), justify="right")
    for row in scores["rows"]:
        figures = [_figure(row[model]["score"]) if model in row else "" for model in models]
        name = Text(row["dataset"])
        table.add_row(name, row["task_type"], str(row["dimensions"]), *figures)
    for row in scores["means"]:
        figures = [_figure(row.get(model)) for model in models]
        table.add_row(row["name"], "", str(row["dimensions"]), *figures, style="bold")
    return table


def _figure(score: float | None) -> str:
    return "" if score is None else f"{score:.3f}"


def _estimate(value: float, interval: list[float]) -> Text:
    low, high = interval
    return Text.assemble(f"{value:.3f} ", (f"[{low:.3f}, {high:.3f}]", "dim not bold"))


def _print_difference(test_set: dict[str, Any], console: Console) -> None:
    gain, (low, high) = test_set["difference"]["ndcg_at_10"], test_set["difference"]["interval"]
    changes = test_set["changes"]
    console.print(
        Text.assemble(
            "after - before: nDCG@10 ",
            (f"{gain:+.3f}", _colour(gain)),
            f" [{low:+.3f}, {high:+.3f}]; {changes['better']} better,"
            f" {changes['worse']} worse, {changes['unchanged']} same",
        )
    )


def _query(query: dict[str, Any]) -> Table:
    before, after = query["ndcg_at_10"].values()
    table = Table(
        title=Text.assemble(
            f"{before:.2f} → ",
            (f"{after:.2f}", _colour(after - before)),
            ("  " + " ".join(query["query"].split()), "bold"),
        ),
        title_justify="left",
        title_style="",
        box=None,
        header_style="dim",
        padding=(0, 1),
        pad_edge=False,
        expand=True,
    )
    table.add_column("before", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("after", ratio=1, no_wrap=True, overflow="ellipsis")
    for hits in zip(*query["top_results"].values(), strict=True):
        table.add_row(*map(_hit, hits))
    return table


def _hit(hit: dict[str, Any]) -> Text:
    mark = ("✓ ", "green") if hit["relevant"] else ("· ", "dim")
    title, text = hit["title"] or "", excerpt(hit["text"], RESULT_CHARACTERS)
    return Text.assemble(mark, (title or ("" if text else hit["id"]), "bold"), "  ", (text, "dim"))


def _colour(gain: float) -> str:
    return "green" if gain > 0 else "red" if gain < 0 else "dim"
