"""What `tokay eval` does: models times test sets, as a table for people or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cluster.errors import UserError
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.evaluation.bootstrap import Estimate
from pipelines.evaluation.dataset import RetrievalDataset, read_beir
from pipelines.evaluation.evaluate import RetrievalResult, difference, evaluate
from pipelines.evaluation.mteb_model import TextEncoder, quiet_mteb
from pipelines.evaluation.mteb_tasks import MtebResult, evaluate_mteb, find_mteb_tasks

# The model of a run that the others are compared with.
STUDENT_AFTER = "student_after"


def run_eval(
    models: Mapping[str, str | EncoderConfig],
    *,
    beir: Sequence[Path] = (),
    mteb: Sequence[str] = (),
    split: str = "test",
    task: str | None = None,
    as_json: bool = False,
    max_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Measures models on BEIR folders and mteb tasks and prints what it found.

    Args:
        models: Name -> model folder, hub id, ``embedded:NAME`` or endpoint ``http(s)://HOST/v1``.
        beir: Folders in BEIR's layout.
        mteb: mteb's names of tasks.
        split: Which qrels of the folders.
        task: For the query template; Gecko's for each test set if None.
        as_json: Print JSON instead of a table.
        max_tokens: Longer texts are cut.

    Returns:
        The results as they stand in the JSON.

    Raises:
        UserError: Nothing to measure on, a bad folder, name or model; before anything is encoded
            wherever it can be known.
    """
    if not beir and not mteb:
        raise UserError("nothing to measure on: give --beir FOLDER or --mteb NAME")
    datasets = [read_beir(folder, split) for folder in beir]
    if mteb:
        with quiet_mteb():
            find_mteb_tasks(mteb)
    retrieval: list[RetrievalResult] = []
    named: list[MtebResult] = []
    with _progress(shown=not as_json) as show:
        for given, location in models.items():
            name = _short_name(given)
            encoder = _load(location, max_tokens)
            for dataset in datasets:
                advance = show(f"{name} on {dataset.name}", _num_texts(dataset))
                retrieval.append(
                    evaluate(encoder, dataset, task=task, model=name, on_progress=advance)
                )
            for mteb_name in mteb:
                advance = show(f"{name} on {mteb_name}", None)
                named += evaluate_mteb(encoder, [mteb_name], model=name, on_progress=advance)
    rows = [result.to_json(per_query=False) for result in retrieval]
    rows += [result.to_json() for result in named]
    compared = compare(retrieval)
    if as_json:
        print(json.dumps({"results": rows, "differences": compared}, indent=2))
    else:
        _print_tables(retrieval, named, compared)
    return rows


def compare(results: Sequence[RetrievalResult]) -> list[dict[str, Any]]:
    """Returns the trained student less each other model of its run, on every test set."""
    rows: list[dict[str, Any]] = []
    for after in results:
        if after.model != STUDENT_AFTER:
            continue
        for before in results:
            same = (before.dataset, before.split) == (after.dataset, after.split)
            if before.model == after.model or not same:
                continue
            gain = difference(before, after)
            rows.append(
                {
                    "before": before.model,
                    "after": after.model,
                    "dataset": after.dataset,
                    "split": after.split,
                    "metric": "ndcg_at_10",
                    "difference": gain.mean,
                    "interval": [gain.low, gain.high],
                }
            )
    return rows


def _load(location: str | EncoderConfig, max_tokens: int) -> TextEncoder:
    if isinstance(location, EncoderConfig):
        return load_encoder(location)
    if location.startswith(("http://", "https://")):
        from pipelines.evaluation.endpoint import EndpointEncoder

        return EndpointEncoder(location)
    from actors.encoder import Encoder

    return Encoder.load(location, max_tokens=max_tokens)


def _short_name(model: str) -> str:
    """Returns the last part of a folder's path, and any other name as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _num_texts(dataset: RetrievalDataset) -> int:
    return len(dataset.passages) + len(dataset.qrels)


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[str, int | None], Callable[[int], None]]]:
    """Yields a function that begins a bar, ``(what, texts) -> advance``."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as progress:

        def show(what: str, total: int | None) -> Callable[[int], None]:
            bar = progress.add_task(what, total=total)
            return lambda num_texts: progress.advance(bar, num_texts)

        yield show


def _print_tables(
    retrieval: Sequence[RetrievalResult],
    named: Sequence[MtebResult],
    compared: Sequence[Mapping[str, Any]],
) -> None:
    console = Console()
    if retrieval:
        table = _table("model", "test set")
        for heading in ("nDCG@10", "recall@10", "texts/s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for result in sorted(retrieval, key=lambda result: result.dataset):
            table.add_row(
                result.model,
                result.dataset,
                _show(result.ndcg_at_10),
                _show(result.recall_at_10),
                f"{result.texts_per_s:,.0f}",
            )
        console.print(table)
    for row in compared:
        low, high = row["interval"]
        console.print(
            f"{row['after']} - {row['before']} on {row['dataset']}: nDCG@10 "
            f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]",
            markup=False,
            highlight=False,
        )
    if retrieval:
        console.print("In brackets: 95 % bootstrap intervals over queries.", style="dim")
    if named:
        table = _table("model", "mteb task", "type", "metric")
        table.add_column("score", justify="right")
        for outcome in named:
            table.add_row(
                outcome.model,
                outcome.dataset,
                outcome.task_type,
                outcome.metric,
                f"{outcome.score:.3f}",
            )
        console.print(table)


def _table(*headings: str) -> Table:
    return Table(*headings, box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))


def _show(estimate: Estimate) -> Text:
    interval = f"[{estimate.low:.3f}, {estimate.high:.3f}]"
    return Text.assemble(f"{estimate.mean:.3f} ", (interval, "dim"))
