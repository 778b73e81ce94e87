"""A run of another version of Tokay, met by each command that takes a run."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cluster.artifacts import Json
from cluster.errors import OtherFormat
from cluster.steps import Run, Step, StepContext
from pipelines import cli
from pipelines.run.console import JsonLines
from pipelines.run.execute import find_models
from serving.command import find_model
from serving.corpus import check_corpus

RECIPE = "name: old\nmuch: {has: changed}\n"


def work(context: StepContext) -> dict[str, Json]:
    context.storage.write_bytes("model/config.json", b"{}")
    return {}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run of before there were numbers, with a recipe of which this version knows little."""
    names = ("passages", "student", "export")
    steps = [Step(name=name, config={}, inputs=(), work=work) for name in names]
    Run(str(tmp_path / "old"), steps).execute(JsonLines())
    for manifest in tmp_path.glob("old/*/manifest.json"):
        fields = json.loads(manifest.read_text())
        del fields["format"]
        manifest.write_text(json.dumps(fields))
    (tmp_path / "old/recipe.yaml").write_text(RECIPE)
    (tmp_path / "corpus.txt").write_text("a passage " * 50)
    return tmp_path / "old"


def invoke(command: str, old: Path) -> Result:
    words = command.replace("RUN", str(old)).replace("CORPUS", str(old.parent / "corpus.txt"))
    return CliRunner().invoke(cli.app, words.split())


@pytest.mark.parametrize(
    "command",
    [
        "run laptop --set corpus.path=CORPUS --storage RUN",
        "run laptop --set corpus.path=CORPUS --storage RUN --rebuild",
        "report RUN",
        "inspect RUN",
        "status RUN",
        "eval RUN --beir CORPUS",
    ],
)
def test_command_refuses_the_run_in_one_line(command: str, old: Path) -> None:
    before = {path for path in old.rglob("*") if path.name != "run.lock"}
    answer = invoke(command, old)
    assert isinstance(answer.exception, OtherFormat), (answer.output, answer.exception)
    assert answer.exception.exit_code == 2
    assert "is of format 1, and this version" in str(answer.exception)
    assert "\n" not in str(answer.exception)
    assert {path for path in old.rglob("*") if path.name != "run.lock"} == before


def test_plan_says_why_the_states_are_unknown(old: Path) -> None:
    answer = invoke("plan laptop --set corpus.path=CORPUS --storage RUN --json", old)
    plan = json.loads(answer.stdout)
    assert "is of format 1, and this version" in plan["unknown"]["states of the steps are"]


def test_server_refuses_the_run(old: Path) -> None:
    for look in (lambda: find_model(str(old)), lambda: check_corpus(str(old / "passages"))):
        with pytest.raises(OtherFormat, match="is of format 1"):
            look()


def test_exported_model_is_used_by_its_own_folder(old: Path) -> None:
    model = str(old / "export/model")
    assert find_models(model) == {model: model}
    assert find_model(model).model == model
