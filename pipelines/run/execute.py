"""Runs a recipe in a folder, and finds what a run has left in one."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.artifacts import Artifact, Json
from cluster.errors import UserError
from cluster.session import connect
from cluster.storage import LocalStorage, Storage, join, open_storage
from pipelines.encoders import MODEL, TRAINED
from pipelines.evaluation.evaluation import STAGES
from pipelines.evaluation.location import Location, SavedEncoder
from pipelines.recipe.graph import TITLES, build_run
from pipelines.recipe.read import read_models, refuse_foreign_code
from pipelines.recipe.recipe import Recipe
from pipelines.report.run_folder import RECIPE, open_run_folder
from pipelines.report.terminal import print_evaluation
from pipelines.report.write import write_report
from pipelines.run.checks import check_recipe
from pipelines.run.console import JsonLines, RunConsole
from pipelines.run.fit import refuse_unfit
from pipelines.yaml_files import write_yaml


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
        UserError: The recipe has a mistake: a part of it cannot fit its GPU, for example.
    """

    def needless(step: str) -> bool:
        order = list(TITLES)
        if until in order and order.index(step) > order.index(until):
            return True
        return not fresh and Artifact.open(open_storage(join(uri, step))) is not None

    # Every mistake that can be seen is reported before anything is started, paid for or deleted.
    check_recipe(recipe)
    refuse_unfit(recipe, needless=needless)
    run = build_run(recipe, uri)
    run.check_folder()
    run.steps_until(until)
    with run.alone():
        if not (fresh or rebuild):
            run.check_configuration(run.steps)
        storage = run.storage
        if not as_json:
            title = Text.assemble((recipe.name, "bold"), f" in {storage.uri}")
            console.print(title, soft_wrap=True)
        if fresh or any(run.state(step) != "done" for step in run.steps):
            if not as_json:
                console.print("starting Ray ...", style="dim")
            connect(log_folder(storage))
        if fresh:
            run.delete_steps()
        storage.write_bytes(RECIPE, write_yaml(recipe.model_dump(mode="json")).encode())
        if as_json:
            artifacts = run.execute(JsonLines(), until=until, rebuild=rebuild)
        else:
            with RunConsole(console) as listener:
                artifacts = run.execute(listener, until=until, rebuild=rebuild)
    if until is None:
        document = write_report(uri)
        if not as_json:
            print_evaluation(document, console)
            console.print(Text(f"report: {document['html']}"), soft_wrap=True)
    return artifacts


def log_folder(storage: Storage) -> Path | None:
    """Returns where the output of Ray and vLLM goes; a run on S3 leaves it in Ray's own logs."""
    return storage.folder / "logs" if isinstance(storage, LocalStorage) else None


def run_status(uri: str) -> dict[str, dict[str, Json]] | None:
    """Returns what is known of each step of a run folder, or None if it is not a run.

    Only the folder's own files are read: what the recipe names may have moved or belong to anybody.
    """
    if not open_storage(uri).exists(RECIPE):
        return None
    run = open_run_folder(uri)
    rows: dict[str, dict[str, Json]] = {}
    for step in run.steps:
        artifact = run.artifacts.get(step)
        rows[step] = {
            "state": run.state(step),
            "num_rows": artifact.num_rows if artifact and artifact.num_shards else None,
            "num_rejects": artifact.num_rejects if artifact else None,
            "seconds_s": artifact.manifest.seconds_s if artifact else None,
        }
    return rows


def find_models(model: str, *, trust_remote_code: bool = False) -> dict[str, Location]:
    """Returns names and places of the models that `tokay eval MODEL` means.

    Args:
        model: A run folder (retriever, student_before, what `STAGES` names where there is such a
            stage, student_after), or anything an encoder can be loaded from.
        trust_remote_code: Whether the command line says that models may bring code; those of a run
            may if its recipe says so too.

    Raises:
        UserError: The run is not finished, of another version, or asks for code to be run alone.
    """
    if not (model.startswith("s3://") or Path(model).is_dir()):
        return {model: model}
    storage = open_storage(model)
    if not storage.exists(RECIPE):
        return {model: model}
    # First, since a run of another format may have another recipe too.
    Artifact.open(open_storage(join(storage.uri, "export")))
    place = join(storage.uri, RECIPE)
    recipe = read_models(storage.read_bytes(RECIPE), place)
    refuse_foreign_code(recipe, place, trust_remote_code, ("retriever", "student"))
    locations: dict[str, Location] = {"retriever": recipe.retriever}
    steps = {"student_before": ("student", MODEL), "student_after": ("export", MODEL)}
    steps |= {name: (step, TRAINED) for step, name in STAGES.items() if getattr(recipe, step)}
    for name, (step, folder) in steps.items():
        artifact = Artifact.open(open_storage(join(storage.uri, step)))
        if artifact is None:
            raise UserError(
                f"run {model} has no finished step {step!r} yet: run `tokay run` on it first"
            )
        locations[name] = SavedEncoder(
            folder=join(artifact.uri, folder), trust_remote_code=recipe.student.trust_remote_code
        )
    return locations
