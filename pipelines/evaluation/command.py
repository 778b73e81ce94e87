"""What `tokay eval` does: models times test sets, as tables for people or JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from actors.text_encoder import TextEncoder
from cluster.errors import UserError
from cluster.plain_json import dump_json
from pipelines.credentials import key_with_credentials
from pipelines.datasets.mteb_tasks import find_mteb_tasks, quiet_mteb
from pipelines.datasets.test_sets import MTEB, TestSet, load_test_sets
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.evaluation.bootstrap import Estimate
from pipelines.evaluation.compare import averages, compare
from pipelines.evaluation.evaluate import Result, evaluate_at
from pipelines.evaluation.location import Location, SavedEncoder
from pipelines.evaluation.model_card import training_sets
from pipelines.evaluation.mteb_model import ModelIdentity
from pipelines.screen import Screen

# mteb's types as the papers' tables head them.
_SHORT = {
    "Classification": "Cls",
    "Clustering": "Clu",
    "PairClassification": "Pair",
    "Reranking": "Rer",
    "Retrieval": "Ret",
    "Summarization": "Sum",
}


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How `tokay eval` measures.

    Attributes:
        dimensions: Cut the vectors to each of these; empty: as long as they are.
        results: Folder of mteb's results, read and written; None: neither.
        num_actors: Ray actors that share the encoding; 1: in this process, without Ray.
        max_tokens: Longer texts are cut; None: where the model says, or 256.
        trust_remote_code: Run Python code that comes with a model, of a run's if its recipe says
            so too.
        as_json: Print JSON instead of tables.
    """

    dimensions: tuple[int, ...] = ()
    results: Path | None = None
    num_actors: int = 1
    max_tokens: int | None = None
    trust_remote_code: bool = False
    as_json: bool = False


def folder_test_set(kind: str, path: str, split: str = "test", task: str | None = None) -> TestSet:
    """Returns the test set that a folder, or mteb's name, on the command line means."""
    name = path if kind == MTEB else Path(path).resolve().name
    given = {"name": name, "path": path, "kind": kind, "split": split, "task": task}
    try:
        return TestSet.model_validate(given)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"test set {path!r} is called {name!r}: {said}") from error


def read_dimensions(given: str | None) -> tuple[int, ...]:
    """Returns ``768,256`` as numbers.

    Raises:
        UserError: It is something else.
    """
    if not given:
        return ()
    parts = given.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--dimensions {given!r}: give whole numbers with commas, such as 768,256")
    return tuple(map(int, parts))


def name_models(given: Mapping[str, Mapping[str, Location]]) -> dict[str, Location]:
    """Returns the models of several runs and folders, each under its own name.

    Args:
        given: Run, folder or id -> its models by name; two runs have models of the same names,
            which then stand behind the run's, by as much of its path as tells it apart.
    """
    names = [_short_name(name) for models in given.values() for name in models]
    twice = {name for name in names if names.count(name) > 1}
    sources = [Path(source).resolve().name for source in given]
    return {
        f"{short if sources.count(short) == 1 else source}/{name}"
        if _short_name(name) in twice
        else name: location
        for short, (source, models) in zip(sources, given.items(), strict=True)
        for name, location in models.items()
    }


def run_eval(
    models: Mapping[str, Location],
    test_sets: Sequence[TestSet],
    options: EvalOptions | None = None,
) -> list[dict[str, Any]]:
    """Measures models on test sets and prints the results.

    Args:
        models: Name -> model folder, hub id, ``embedded:NAME`` or endpoint ``http(s)://HOST/v1``.
        test_sets: Folders and mteb's tasks.
        options: How.

    Returns:
        The results as they stand in the JSON.

    Raises:
        UserError: Nothing to measure on, a bad folder, name or model; before anything is encoded
            wherever it can be known.
    """
    options = options or EvalOptions()
    if any(key_with_credentials(name) is not None for name in models):
        raise UserError(
            "the endpoint's address holds credentials, which results and logs would show: leave"
            " them out; its key is read from OPENAI_API_KEY"
        )
    if not test_sets:
        raise UserError(
            "nothing to measure on: give a folder (--beir, --sts, --pairs, --classification, "
            "--clustering, --rerank) or --mteb NAME"
        )
    if options.results is not None:
        _check_folder(options.results)
    known = [(each.name, each.kind, each.split) for each in test_sets]
    for name, *_ in (each for each in known if known.count(each) > 1):
        raise UserError(f"two test sets are called {name!r}: give each once, by its own name")
    if named := [test_set.path for test_set in test_sets if test_set.kind == MTEB]:
        with quiet_mteb():
            for name in named:
                find_mteb_tasks(name)
    results: list[Result] = []
    loaded = list(load_test_sets(test_sets))
    data = [each for _, each in loaded]
    with _progress(shown=not options.as_json) as show:
        for given, location in models.items():
            name = _short_name(given)
            with _loaded(location, options) as encoder:
                model = _identify(name, location, encoder)
                for test_set, each in loaded:
                    results += evaluate_at(
                        encoder,
                        each,
                        model=model,
                        task=test_set.task,
                        dimensions=options.dimensions or (None,),
                        results=options.results,
                        on_progress=show(
                            f"{name} on {test_set.name}", getattr(each, "num_texts", None)
                        ),
                    )
    rows = [result.to_json(items=False) for result in results]
    compared, means = compare(results), averages(results)
    notes = {each.name: list(each.notes) for each in data if getattr(each, "notes", ())}
    if options.as_json:
        document = {"results": rows, "differences": compared, "averages": means, "notes": notes}
        print(dump_json(document, indent=2))
    else:
        _print_tables(results, compared, means)
        for dataset, lines in notes.items():
            Screen().print(Text(f"{dataset}: {'; '.join(lines)}", style="dim"), soft_wrap=True)
    return rows


def _check_folder(results: Path) -> None:
    """Makes the folder of results; raises UserError where there can be none."""
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if results.is_file() else error.strerror
        raise UserError(
            f"--results {results} can be no folder ({reason}); give a new one, or mteb's"
        ) from error


def _identify(name: str, location: Location, encoder: TextEncoder) -> ModelIdentity:
    folder = location.folder if isinstance(location, SavedEncoder) else location
    card = Path(folder.model if isinstance(folder, EncoderConfig) else folder) / "README.md"
    return ModelIdentity(
        name=name,
        revision=encoder.fingerprint,
        num_parameters=encoder.num_parameters,
        training_sets=training_sets(card.read_text(encoding="utf-8")) if card.is_file() else (),
    )


@contextmanager
def _loaded(location: Location, options: EvalOptions) -> Iterator[TextEncoder]:
    if options.num_actors == 1:
        yield _load(location, options)
        return
    from actors.encoder_actor import EncoderActors

    actors = EncoderActors(partial(_load, location, options), options.num_actors)
    with quiet_mteb():
        pass  # imported while the actors load
    try:
        yield actors
    finally:
        actors.close()


def _load(location: Location, options: EvalOptions) -> TextEncoder:
    if isinstance(location, EncoderConfig):
        return load_encoder(location)
    trusted = options.trust_remote_code
    if isinstance(location, SavedEncoder):
        trusted = trusted and location.trust_remote_code
        location = location.folder
    if location.startswith(("http://", "https://")):
        from pipelines.evaluation.endpoint import EndpointEncoder

        return EndpointEncoder(location)
    from actors.encoder import Encoder

    return Encoder.load(location, max_tokens=options.max_tokens, trust_remote_code=trusted)


def _short_name(model: str) -> str:
    """Returns the last part of a folder's path, and any other name as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[str, int | None], Callable[[int], None]]]:
    """Yields a function that begins a bar, ``(what, texts) -> advance``."""
    console = Screen(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
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
    results: Sequence[Result],
    compared: Sequence[Mapping[str, Any]],
    means: Sequence[Mapping[str, Any]],
) -> None:
    console = Screen()
    for dataset, task_type in dict.fromkeys((each.dataset, each.task_type) for each in results):
        measured = [e for e in results if (e.dataset, e.task_type) == (dataset, task_type)]
        size = ", ".join(
            f"{count:,} {name.removeprefix('num_')}" for name, count in measured[0].counts.items()
        )
        console.print(Text.assemble("\n", (dataset, "bold"), f"  {task_type}  ", (size, "dim")))
        console.print(_scores(measured))
        for row in compared:
            same = row["dataset"] == dataset and row["metric"] == measured[0].metric
            if same and row["difference"] is not None:
                console.print(_difference(row))
        for result in measured:
            if result.reason:
                line = f"{result.model} ({result.dimensions}) has no score: {result.reason}"
                console.print(Text(line), soft_wrap=True)
    if any(result.score.interval for result in results):
        console.print("In brackets: 95 % bootstrap intervals.", style="dim")
    if any(result.seen for result in results):
        console.print("* the model was trained on a set of this name", style="dim")
    if any(row["num_test_sets"] > 1 for row in means):
        console.print(_means(means))


def _scores(results: Sequence[Result]) -> Table:
    table = _table("model", "dim")
    shown = [results[0].metric]
    if results[0].task_type == "Retrieval":
        shown += [name for name in ("recall_at_10",) if name in results[0].estimates]
    for heading in (*shown, "texts/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        speed = f"{result.texts_per_s:,.0f}" if result.texts_per_s else ""
        name = result.model + ("*" if result.seen else "")
        estimates = [_show(result.estimates[metric]) for metric in shown]
        table.add_row(Text(name), str(result.dimensions), *estimates, speed)
    return table


def _difference(row: Mapping[str, Any]) -> Text:
    names = []
    for side in ("after", "before"):
        cut = row["after_dimensions"] != row["before_dimensions"]
        names.append(row[side] + (f" ({row[f'{side}_dimensions']})" if cut else ""))
    low_high = f" [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]" if row["interval"] else ""
    return Text(f"{names[0]} - {names[1]}: {row['metric']} {row['difference']:+.3f}{low_high}")


def _means(means: Sequence[Mapping[str, Any]]) -> Table:
    types = dict.fromkeys(name for row in means for name in row["types"])
    table = _table("model", "dim")
    for heading in (*(_SHORT.get(name, name) for name in types), "mean (tasks)", "mean (types)"):
        table.add_column(heading, justify="right")
    for row in means:
        figures = [row["types"].get(name) for name in types]
        figures += [row["mean_task"], row["mean_task_type"]]
        shown = ["" if figure is None else f"{figure:.3f}" for figure in figures]
        table.add_row(Text(row["model"]), str(row["dimensions"]), *shown)
    return table


def _table(*headings: str) -> Table:
    return Table(*headings, box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))


def _show(estimate: Estimate) -> Text:
    if estimate.mean != estimate.mean:
        return Text("none")
    if not estimate.interval:
        return Text(f"{estimate.mean:.3f}")
    interval = f"[{estimate.low:.3f}, {estimate.high:.3f}]"
    return Text.assemble(f"{estimate.mean:.3f} ", (interval, "dim"))
