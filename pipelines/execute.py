"""Running a recipe in a folder, and finding in a folder what a run left."""

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster.artifacts import Artifact, Json
from cluster.errors import UserError
from cluster.session import connect
from cluster.steps import Run
from cluster.storage import LocalStorage, Storage, join, open_storage
from pipelines.console import JsonLines, RunConsole
from pipelines.encoders import EncoderConfig
from pipelines.fit import refuse_unfit
from pipelines.graph import ENCODER, TITLES, build_run
from pipelines.recipe import Recipe
from pipelines.report.write import print_evaluation, write_report
from pipelines.student import MODEL

RECIPE = "recipe.yaml"


def execute(
    recipe: Recipe,
    uri: str,
    console: Console,
    *,
    until: str | None = None,
    rebuild: bool = False,
    fresh: bool = False,
    as_json: bool = False,
) -> dict[str, Artifact]:
    """Runs a recipe, shows its progress, and writes its report when all steps are done.

    Raises:
        UserError: A part of it cannot fit its GPU, among other mistakes.
    """

    def needless(step: str) -> bool:
        order = list(TITLES)
        if until in order and order.index(step) > order.index(until):
            return True
        return not fresh and Artifact.open(open_storage(join(uri, step))) is not None

    run = build_run(recipe, uri)
    run.check_folder()
    run.steps_until(until)
    refuse_unfit(recipe, needless=needless)  # before anything starts, is paid for or is deleted
    with run.alone():
        if not (fresh or rebuild):
            run.check_configuration(run.steps)
        storage = run.storage
        if not as_json:
            console.print(f"[bold]{recipe.name}[/] in {storage.uri}", soft_wrap=True)
        if fresh or any(run.state(step) != "done" for step in run.steps):
            if not as_json:
                console.print("[dim]starting Ray ...[/]")
            connect(log_folder(storage))
        if fresh:
            run.delete_steps()
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        storage.write_bytes(RECIPE, text.encode())
        if as_json:
            artifacts = run.execute(JsonLines(), until=until, rebuild=rebuild)
        else:
            with RunConsole(console) as listener:
                artifacts = run.execute(listener, until=until, rebuild=rebuild)
    if until is None:
        document = write_report(uri)
        if not as_json:
            print_evaluation(document, console)
            console.print(f"report: {document['html']}", soft_wrap=True)
    return artifacts


def log_folder(storage: Storage) -> Path | None:
    """Returns where the chatter of Ray and vLLM goes; a run on S3 leaves it in Ray's own logs."""
    return storage.folder / "logs" if isinstance(storage, LocalStorage) else None


def run_status(uri: str) -> dict[str, dict[str, Json]] | None:
    """Returns what is known of each step of a run folder, or None if it is no run folder."""
    run = open_run(uri)
    if run is None:
        return None
    rows: dict[str, dict[str, Json]] = {}
    for step in run.steps:
        artifact = run.artifact(step)
        rows[step.name] = {
            "state": run.state(step),
            "num_rows": artifact.num_rows if artifact and artifact.shards else None,
            "num_rejects": artifact.num_rejects if artifact else None,
            "seconds_s": artifact.manifest.seconds_s if artifact else None,
        }
    return rows


def open_run(uri: str) -> Run | None:
    """Opens a run by its folder, with the recipe that it was last run with; None if it is none."""
    recipe = read_recipe(open_storage(uri))
    return None if recipe is None else build_run(recipe, uri)


def read_recipe(storage: Storage) -> Recipe | None:
    """Returns the recipe that a run folder was last run with."""
    try:
        tree: Any = yaml.safe_load(storage.read_bytes(RECIPE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Recipe.model_validate(tree)


def find_models(model: str) -> dict[str, str | EncoderConfig]:
    """Returns names and places of the models that `tokay eval MODEL` means.

    Args:
        model: A run folder (retriever, student_before, student_prefinetuned if there is that stage,
            student_after), or anything an encoder is loaded from.
    """
    if not (model.startswith("s3://") or Path(model).is_dir()):
        return {model: model}
    storage = open_storage(model)
    recipe = read_recipe(storage)
    if recipe is None:
        return {model: model}
    found: dict[str, str | EncoderConfig] = {"retriever": recipe.retriever}
    steps = {"student_before": ("student", MODEL), "student_after": ("export", MODEL)}
    if recipe.prefinetuning:
        steps["student_prefinetuned"] = ("prefinetuning", ENCODER)
    for name, (step, folder) in steps.items():
        artifact = Artifact.open(open_storage(join(storage.uri, step)))
        if artifact is None:
            raise UserError(
                f"run {model} has no finished step {step!r} yet: run `tokay run` on it first"
            )
        found[name] = join(artifact.uri, folder)
    return found
