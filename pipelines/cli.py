"""The `tokay` command."""

import gc
import os
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.errors import TokayError, excerpt
from cluster.plain_json import dump_json
from pipelines.screen import Screen, plain, write_any_text

app = typer.Typer(
    name="tokay",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Screen()

Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe key: path.to.key=value.")
]
StorageUri = Annotated[
    str | None, typer.Option("--storage", help="Run folder: a path, file:// or s3://.")
]
Rebuild = Annotated[bool, typer.Option(help="Rebuild steps made with another configuration.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Address = Annotated[
    str, typer.Option(help="The cluster's dashboard.", envvar="RAY_API_SERVER_ADDRESS")
]
TestFolders = Annotated[
    list[str] | None,
    typer.Option(help="A folder of test data: a path, file:// or s3://; may be repeated."),
]
RecipeFile = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or laptop, gpu, gpu-80gb, gpu-8x80gb, cluster or gecko-mini."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run a model's own Python code; a recipe must allow it too."
    ),
]
MAX_ERROR = 2000  # characters
LOCAL_DASHBOARD = "http://127.0.0.1:8265"


@app.callback()
def tokay(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Distils a large language model into a small text-embedding model: an open Gecko."""
    os.environ["TOKAY_VERBOSE"] = "1" if verbose else ""


@app.command("run")
def run_command(
    recipe: RecipeFile,
    storage: StorageUri = None,
    settings: Settings = None,
    until: Annotated[str | None, typer.Option(help="The last step to run.")] = None,
    rebuild: Rebuild = False,
    fresh: Annotated[bool, typer.Option(help="Delete the run folder's steps first.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe here, or on the cluster of RAY_ADDRESS; finished steps are not repeated."""
    from pipelines.recipe.read import load_recipe
    from pipelines.run.execute import execute

    loaded = load_recipe(recipe, settings, trust_remote_code=trust_remote_code)
    execute(
        loaded,
        storage or f"runs/{loaded.name}",
        console,
        until=until,
        rebuild=rebuild,
        fresh=fresh,
        as_json=as_json,
    )


@app.command()
def demo(
    storage: Annotated[str, typer.Option(help="Run folder.")] = "runs/demo",
    settings: Settings = None,
    rebuild: Rebuild = False,
    fresh: Annotated[bool, typer.Option(help="Start over.")] = False,
) -> None:
    """Learn to search the documentation of this Python environment, end to end."""
    from pipelines.demo.command import run_demo

    run_demo(storage, settings or [], rebuild, fresh, console)


@app.command()
def plan(
    recipe: RecipeFile,
    storage: StorageUri = None,
    settings: Settings = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="See on a few queries, beside the run, how the LLM judges."),
    ] = False,
    rebuild: Rebuild = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show the steps, what is done, what fits the GPUs, and what the rest would cost."""
    from pipelines.recipe.read import load_recipe
    from pipelines.run.checks import check_recipe
    from pipelines.run.plan import make_plan, print_plan
    from pipelines.run.probe import print_judged, run_probe

    loaded = load_recipe(
        recipe, settings, keep_unset=not probe, trust_remote_code=trust_remote_code
    )
    uri = storage or f"runs/{loaded.name}"
    if probe:
        shown = Screen(stderr=True) if as_json else console
        found = run_probe(loaded, uri, shown, rebuild=rebuild)
        _print_json(found) if as_json else print_judged(found, console)
        return
    check_recipe(loaded)
    made = make_plan(loaded, uri)
    _print_json(made) if as_json else print_plan(made, console)


@app.command()
def keys(
    below: Annotated[str, typer.Argument(help="A key, such as training.loss.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the keys of a recipe, with what they accept, their defaults and what they mean."""
    from dataclasses import asdict

    from pipelines.recipe.keys import print_keys, recipe_keys

    listed = recipe_keys(below)
    _print_json([asdict(key) for key in listed]) if as_json else print_keys(listed, console)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead.")] = False,
) -> None:
    """Write the HTML report of a run, and say where it is."""
    from pipelines.report.write import write_report

    document = write_report(run)
    _print_json(document) if as_json else console.print(document["html"])


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    by: Annotated[
        str, typer.Option(help="What comes first: shift, doubt, hardest or stored.")
    ] = "shift",
    task: Annotated[str | None, typer.Option(help="Only queries of this task.")] = None,
    dropped: Annotated[
        str | None, typer.Option(help="Queries dropped for this reason; 'any': for any reason.")
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="How many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Read a run's training examples: queries, candidates, scores and what became of them."""
    from pipelines.report.inspection import inspect_run, print_examples

    examples = inspect_run(run, task=task, dropped_by=dropped, order=by, num_examples=num)
    _print_json(examples) if as_json else print_examples(examples, console)


@app.command("eval")
def eval_command(
    models: Annotated[
        list[str], typer.Argument(help="Runs, export folders, hub ids or endpoints.")
    ],
    beir: TestFolders = None,
    sts: TestFolders = None,
    pairs: TestFolders = None,
    classification: TestFolders = None,
    clustering: TestFolders = None,
    rerank: TestFolders = None,
    mteb: Annotated[
        list[str] | None, typer.Option(help="Name of an mteb task or benchmark.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the folders.")] = "test",
    task: Annotated[str | None, typer.Option(help="The {task} of the query template.")] = None,
    dimensions: Annotated[
        str | None, typer.Option(help="Cut the vectors to these dimensions, such as 768,256.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Keep mteb's results here, and reuse those there are [default: no]."),
    ] = None,
    actors: Annotated[int, typer.Option(min=1, help="Ray actors to encode with; 1: no Ray.")] = 1,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=8, help="Cut texts here [default: where the model says, or 256]."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models with mteb on folders of test data or mteb's own tasks."""
    from cluster.session import silence
    from pipelines.evaluation.command import (
        EvalOptions,
        folder_test_set,
        name_models,
        read_dimensions,
        run_eval,
    )
    from pipelines.run.execute import find_models

    silence(None)
    given = {
        "retrieval": beir,
        "sts": sts,
        "pairs": pairs,
        "classification": classification,
        "clustering": clustering,
        "rerank": rerank,
        "mteb": mteb,
    }
    test_sets = [
        folder_test_set(kind, path, split, task)
        for kind, paths in given.items()
        for path in paths or ()
    ]
    options = EvalOptions(
        dimensions=read_dimensions(dimensions),
        results=results,
        num_actors=actors,
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
    )
    locations = {model: find_models(model, trust_remote_code=trust_remote_code) for model in models}
    run_eval(name_models(locations), test_sets, options)


@app.command()
def submit(
    recipe: RecipeFile,
    storage: Annotated[str, typer.Option(help="Where the cluster writes the run: s3://...")],
    address: Address = LOCAL_DASHBOARD,
    settings: Settings = None,
    submission_id: Annotated[str | None, typer.Option(help="A name for the job.")] = None,
    ship_code: Annotated[bool, typer.Option(help="Run this checkout's code there.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe on a cluster through the Ray Jobs API; prints the job's id."""
    from cluster import jobs
    from pipelines.recipe.read import load_recipe, read_keys
    from pipelines.run.checks import check_recipe
    from pipelines.run.fit import refuse_unfit
    from pipelines.yaml_files import write_yaml

    # A mistake is reported here, not by a job an hour later.
    loaded = load_recipe(recipe, settings, trust_remote_code=trust_remote_code)
    check_recipe(loaded, here=False)
    refuse_unfit(loaded, here=False)
    keys, files = read_keys(recipe, settings), {}
    if loaded.prompts:
        files["prompts.yaml"] = Path(loaded.prompts).read_text(encoding="utf-8")
        keys["prompts"] = "prompts.yaml"
    job = jobs.submit(
        write_yaml(keys),
        name=Path(recipe).name,
        address=address,
        storage=storage,
        flags=["--trust-remote-code"] if trust_remote_code else [],
        files=files,
        submission_id=submission_id,
        ship_code=ship_code,
    )
    if as_json:
        _print_json({"id": job, "address": address, "storage": storage})
    else:
        console.print(f"{job}  (tokay status {job} --address {address})", soft_wrap=True)


@app.command()
def status(
    target: Annotated[str | None, typer.Argument(help="A job's id or a run folder.")] = None,
    address: Address = LOCAL_DASHBOARD,
    as_json: AsJson = False,
) -> None:
    """Show the cluster's jobs, one of them, or the steps of a run folder."""
    from cluster import jobs
    from pipelines.run.execute import run_status

    steps = run_status(target) if target else None
    if target and steps is not None:
        _print_rows([{"step": s, **row} for s, row in steps.items()], as_json)
        return
    _print_rows(
        [
            {
                "job": job.id,
                "status": job.status,
                "recipe": job.recipe,
                "storage": job.storage,
                "exit_code": job.exit_code,
                "started": job.started.isoformat(timespec="seconds") if job.started else None,
                "message": job.message,
            }
            for job in jobs.status(address, target)
        ],
        as_json,
    )


@app.command()
def logs(
    job: Annotated[str, typer.Argument(help="A job's id.")],
    address: Address = LOCAL_DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
) -> None:
    """Print what a job has printed."""
    from cluster import jobs

    for piece in jobs.logs(address, job, follow=follow):
        sys.stdout.write(plain(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()


@app.command()
def stop(
    job: Annotated[str, typer.Argument(help="A job's id.")], address: Address = LOCAL_DASHBOARD
) -> None:
    """Stop a job; submitted again, its run goes on where it stopped."""
    from cluster import jobs

    stopped = jobs.stop(address, job)
    console.print(f"{job} stopped" if stopped else f"{job} had already ended")


@app.command("version")
def version_command() -> None:
    """Print the version."""
    console.print(version("tokay"))


def _print_json(document: object) -> None:
    print(dump_json(document, indent=1))


def _print_rows(rows: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    if not rows:
        console.print("nothing there")
        return
    table = Table(box=None, header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(table)


def main() -> None:
    """Runs the console script; an error is one line, and the exit code says whose it is."""
    write_any_text()
    gc.set_threshold(100_000)  # it took a fifth of the time in which torch and mteb are imported
    for command in entry_points(group="tokay.commands"):
        app.command(command.name)(command.load())
    try:
        app()
    except TokayError as error:
        if os.environ.get("TOKAY_VERBOSE"):
            raise
        line = excerpt(plain(" ".join(str(error).split())), MAX_ERROR)
        print(f"tokay: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == "utf-8" or os.environ.get("TOKAY_VERBOSE"):
            raise
        print(f"tokay: this locale has no {error.object!a}: set LC_ALL=C.UTF-8", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tokay: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
