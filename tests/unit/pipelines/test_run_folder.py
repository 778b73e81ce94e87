"""A run is shown and evaluated by its own files: what its recipe names may be gone, or a trap."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.encoder import Encoder
from cluster.artifacts import Json
from cluster.errors import UserError
from cluster.steps import BEGUN, Run, Step, StepContext
from cluster.storage import LocalStorage
from pipelines.evaluation.command import EvalOptions, _load
from pipelines.evaluation.location import SavedEncoder
from pipelines.recipe.graph import OPTIONAL_STAGES, TITLES
from pipelines.recipe.read import load_recipe
from pipelines.report.write import write_report
from pipelines.run.console import JsonLines
from pipelines.run.execute import find_models, run_status
from pipelines.yaml_files import write_yaml

NOWHERE = "/no/such/place"


def work(context: StepContext) -> dict[str, Json]:
    context.storage.write_bytes("model/config.json", b"{}")
    return {}


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of somebody else's whose recipe names places, data and models that must stay alone."""
    tree: dict[str, Any] = load_recipe("laptop").model_dump(mode="json")
    tree["corpus"]["path"] = NOWHERE
    tree["prompts"] = f"{NOWHERE}.yaml"
    tree["evaluation"] = [
        {"name": "mine", "path": NOWHERE},
        {"name": "STS12", "path": "STS12", "kind": "mteb"},
    ]
    tree["mixture"]["labelled"] = [{"name": "faq", "path": f"{NOWHERE}/faq.jsonl"}]
    for part in ("llm", "retriever", "student"):
        tree[part] |= {"model": NOWHERE, "trust_remote_code": True}
    folder = tmp_path / "run"
    steps = [
        Step(name=name, config={"v": 1}, inputs=inputs, work=work)
        for name, inputs in (
            ("passages", ()),
            ("seeds", ("passages",)),
            ("student", ()),
            ("export", ("student",)),
        )
    ]
    Run(str(folder), steps).execute(JsonLines())
    (folder / "recipe.yaml").write_text(write_yaml(tree), encoding="utf-8")

    def outside(*_: object) -> None:
        raise AssertionError("a file was hashed")

    monkeypatch.setattr(LocalStorage, "version", outside)
    return folder


def test_status_reads_the_run_folder_alone(foreign: Path) -> None:
    manifest = foreign / "passages/manifest.json"
    fields = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**fields, "fingerprint": "anew"}), encoding="utf-8")
    begun = foreign / "queries" / BEGUN
    begun.parent.mkdir(parents=True)
    begun.write_text("{}", encoding="utf-8")
    rows = run_status(str(foreign))
    assert rows is not None
    optional = (*OPTIONAL_STAGES, "corpus_queries", "probe", "cross_scores")
    optional += ("linear_adapter", "gate")
    assert list(rows) == [name for name in TITLES if not name.startswith(optional)]
    states = {name: row["state"] for name, row in rows.items()}
    assert {name: state for name, state in states.items() if state != "waiting"} == {
        "passages": "done",
        "seeds": "changed",
        "student": "done",
        "export": "done",
        "queries": "unfinished",
    }


@pytest.mark.parametrize(
    ("keys", "last"), [({"fret": {"fusion": "auto"}}, "index"), ({"probe": {"sample": 9}}, "probe")]
)
def test_status_lists_the_probe_where_the_recipe_has_one(
    foreign: Path, keys: Any, last: str
) -> None:
    (foreign / "recipe.yaml").write_text(write_yaml({"evaluation": [], **keys}), encoding="utf-8")
    rows = run_status(str(foreign))
    assert rows is not None and "probe" in rows
    assert [name for name in rows if rows[name]["state"] == "waiting"][-1] == last


def test_status_of_what_is_no_run_is_none(tmp_path: Path) -> None:
    assert run_status(str(tmp_path)) is None
    assert run_status("some-job") is None


def test_report_reads_the_run_folder_alone(foreign: Path) -> None:
    document = write_report(str(foreign))
    assert [step["name"] for step in document["steps"]] == [
        "passages",
        "seeds",
        "student",
        "export",
    ]


@pytest.mark.parametrize(
    "key",
    ["corpus", "evaluation", "resources", "estimate", "fret", "probe", *OPTIONAL_STAGES],
)
@pytest.mark.parametrize("value", [3, "text", ["text"], [{"name": 3}], None, {"path": []}])
def test_report_reads_a_recipe_of_any_shape(foreign: Path, key: str, value: object) -> None:
    (foreign / "recipe.yaml").write_text(write_yaml({"name": [1], key: value}), encoding="utf-8")
    assert write_report(str(foreign))["steps"]
    assert run_status(str(foreign))


def test_models_of_a_run_are_found_without_corpus_and_prompts(foreign: Path) -> None:
    found = find_models(str(foreign), trust_remote_code=True)
    assert list(found) == ["retriever", "student_before", "student_after"]
    assert found["student_after"] == SavedEncoder(
        folder=f"{foreign}/export/model", trust_remote_code=True
    )


def test_models_of_a_run_bring_code_only_if_both_say_so(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"recipe\.yaml sets retriever\.trust.*--trust-remote-code too"
    ):
        find_models(str(foreign))
    given: list[bool] = []
    monkeypatch.setattr(
        Encoder, "load", lambda *_, trust_remote_code, **__: given.append(trust_remote_code)
    )
    for recipe, command in ((True, True), (True, False), (False, True), (False, False)):
        location = SavedEncoder(folder="f", trust_remote_code=recipe)
        _load(location, EvalOptions(trust_remote_code=command))
    assert given == [True, False, False, False]
    given.clear()
    _load("some/model", EvalOptions(trust_remote_code=True))  # no recipe to ask
    assert given == [True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "ingredients:\n- flour\n",
            r"recipe\.yaml has the unknown key 'ingredients', made by anot",
        ),
        ("name: [unclosed\n", r"recipe\.yaml is not YAML: line 2"),
        ("- flour\n", r"recipe\.yaml is no recipe: accepted is a mapping"),
        ("name: a\nname: b\n", r"recipe\.yaml: keys that occur twice: 'name' in lines 1 and 2"),
    ],
)
def test_recipe_of_another_version_is_told_alike(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(content, encoding="utf-8")
    for read in (run_status, write_report, find_models):
        with pytest.raises(UserError, match=message):
            read(str(tmp_path))  # type: ignore[operator]
