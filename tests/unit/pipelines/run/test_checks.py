"""What is told before anything is run or paid for; models are folders of small JSON files here."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from pipelines.recipe.read import load_recipe, recipe_names
from pipelines.run import checks
from pipelines.run.checks import check_recipe
from pipelines.run.execute import execute
from pipelines.screen import Screen

BERT = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
}
QWEN = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2}

MakeModel = Callable[..., str]


@pytest.fixture
def model(tmp_path: Path) -> MakeModel:
    """Writes a model's configuration, and what its modules are."""

    def made(config: dict[str, Any], modules: dict[str, dict[str, Any]] | None = None) -> str:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        rows = {"": "Transformer", "1_Pooling": "Pooling", **dict.fromkeys(modules or {}, "Dense")}
        for path, settings in {"1_Pooling": {}, **(modules or {})}.items():
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        listed = [
            {"name": str(n), "type": f"sentence_transformers.models.{kind}", "path": path}
            for n, (path, kind) in enumerate(rows.items())
        ]
        (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
        return str(folder)

    return made


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_that_comes_with_tokay_has_nothing_to_be_told(
    name: str, no_hub: None, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKAY_DATA", str(data_folder))
    check_recipe(load_recipe(name))
    check_recipe(load_recipe(name), here=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["student.layers=[0, 6]"], "student.layers: [0, 6] given, and"),
        (["student.layers=[0, 6]"], "has 6 layers: accepted are 0 to 5"),
        (["student.bidirectional=true"], "is a bert, which is bidirectional already"),
        (
            ["training.loss.matryoshka_dimensions=[256, 385]"],
            "385 given, and the student's vectors",
        ),
        (["evaluation=[{name: a, path: b, dimensions: [999]}]"], "evaluation.0.dimensions: 999"),
        (
            ["student.projection=64", "training.loss.matryoshka_dimensions=[65]"],
            "training.loss.matryoshka_dimensions: 65 given, and the student's vectors have 64",
        ),
        (
            [
                "prefinetuning.mixture.labelled=[{name: a, path: b}]",
                "prefinetuning.training.loss.matryoshka_dimensions=[385]",
            ],
            "prefinetuning.training.loss.matryoshka_dimensions: 385",
        ),
        (
            ["embedding_distillation.teacher.model=embedded:nosuch"],
            "embedding_distillation.teacher.model: unknown embedded model",
        ),
        (
            ["embedding_distillation.teacher={model: embedded:all-MiniLM-L6-v2, max_tokens: 600}"],
            "embedding_distillation.teacher.max_tokens: 600 given, and",
        ),
        (
            ["embedding_distillation={}", "student.projection=64"],
            "embedding_distillation: the vectors of retriever.model embedded:all-MiniLM-L6-v2 have"
            " 384 dimensions, and the student's 64: name a",
        ),
        (
            ["embedding_distillation.training.validation={}"],
            "embedding_distillation.training.validation has nothing to look at: set embedding_dist",
        ),
        (["student.max_tokens=513"], "student.max_tokens: 513 given, and"),
        (["retriever.model=embedded:nosuch"], "retriever.model: unknown embedded model"),
        (["llm.model=/no/such/folder"], "llm.model: model '/no/such/folder': no such folder"),
        (
            ["queries.max_passage_tokens=1000"],
            "llm.max_model_tokens is 1024, which the prompt shares",
        ),
        (["mixture.fret_only_tasks=[poetry]"], "mixture.fret_only_tasks: ['poetry'] given, and"),
        (["training.validation={}"], "training.validation has nothing to look at: set mixture."),
        (["training.tracking=[mlflow]"], "training.tracking names mlflow, which is not installed"),
    ],
)
def test_mistake_that_a_step_would_find_is_told_before(
    settings: list[str], message: str, model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = load_recipe("laptop", [f"student.model={model(BERT)}", *settings])
    with pytest.raises(UserError, match=re.escape(message)):
        check_recipe(recipe)


def test_run_tells_it_before_it_writes_anything(tmp_path: Path, model: MakeModel) -> None:
    recipe = load_recipe("laptop", [f"student.model={model(BERT)}", "student.layers=[0, 6]"])
    with pytest.raises(UserError, match="has 6 layers"):
        execute(recipe, str(tmp_path / "run"), Screen())
    assert not (tmp_path / "run").exists()


def dense(inputs: int, outputs: int) -> dict[str, Any]:
    activation = "torch.nn.modules.linear.Identity"
    return {
        "in_features": inputs,
        "out_features": outputs,
        "bias": False,
        "activation_function": activation,
    }


def test_dimensions_are_those_of_the_last_dense_module(model: MakeModel) -> None:
    folder = model(BERT, {"2_Dense": dense(384, 512), "3_Dense": dense(512, 128)})
    settings = [f"student.model={folder}", "training.loss.matryoshka_dimensions=[129]"]
    with pytest.raises(UserError, match="129 given, and the student's vectors have 128"):
        check_recipe(load_recipe("laptop", settings))


def test_llm_shorter_than_asked_is_refused_unless_its_positions_are_scaled(
    model: MakeModel,
) -> None:
    short = QWEN | {"max_position_embeddings": 1000}
    with pytest.raises(UserError, match=r"llm\.max_model_tokens: 1024 given, and .* at most 1000"):
        check_recipe(load_recipe("laptop", [f"llm.model={model(short)}"]))
    scaled = short | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    check_recipe(load_recipe("laptop", [f"llm.model={model(scaled)}"]))


def test_model_in_a_place_that_is_not_set_is_left_to_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TOKAY_MODELS", raising=False)
    check_recipe(load_recipe("laptop", ["llm.model=${TOKAY_MODELS}/llm"], keep_unset=True))


@pytest.mark.parametrize(
    "config", ["", "[]", "{", '{"hidden_size": "x", "num_hidden_layers": [1]}', "[" * 100_000]
)
def test_configuration_that_is_none_is_refused_before(config: str, model: MakeModel) -> None:
    folder = model(BERT)
    Path(folder, "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        check_recipe(load_recipe("laptop", [f"student.model={folder}"]))


def test_encoder_folder_that_says_what_is_not_done_is_refused_before(model: MakeModel) -> None:
    folder = model(BERT)
    Path(folder, "1_Pooling/config.json").write_text('{"include_prompt": false}', encoding="utf-8")
    with pytest.raises(UserError, match="include_prompt false: accepted is true"):
        check_recipe(load_recipe("laptop", [f"retriever.model={folder}"]))


def test_model_that_the_hub_has_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError

    def missing(name: str) -> bytes:
        answer = httpx2.Response(404, request=httpx2.Request("GET", "https://hub"))
        raise RepositoryNotFoundError("404", response=answer)

    monkeypatch.setattr(checks, "_hub_config", missing)
    with pytest.raises(UserError, match=r"student\.model: 'no/such' is neither a model's folder"):
        check_recipe(load_recipe("laptop", ["student.model=no/such", "student.layers=null"]))


def test_hub_that_does_not_answer_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(name: str) -> bytes:
        asked.append(name)
        raise ExceptionGroup("any", [ValueError("no network")])

    monkeypatch.setattr(checks, "_hub_config", unreachable)
    check_recipe(load_recipe("gpu"))
    assert len(asked) == 3


def test_model_of_the_hub_is_read_by_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_hub_config", lambda _: json.dumps(BERT).encode())
    with pytest.raises(UserError, match="the/model has 6 layers"):
        check_recipe(load_recipe("laptop", ["student.model=the/model", "student.layers=[0, 9]"]))


def test_plan_runs_no_code_of_a_model_even_if_both_say_so(tmp_path: Path, model: MakeModel) -> None:
    own = {"auto_map": {"AutoTokenizer": ["tokens.Tokens", None], "AutoConfig": "tokens.Config"}}
    folder = Path(model({**BERT, **own, "model_type": "own"}))
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "tokens.py").write_text(code, encoding="utf-8")
    settings = {"tokenizer_class": "Tokens", **own}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": str(n), "text": f"word number {n} " * 30} for n in range(3)]
    corpus.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def answer(*more: str) -> subprocess.CompletedProcess[str]:
        asked = [f"corpus.path={corpus}"]
        for part in ("llm", "retriever", "student"):
            asked += [f"{part}.model={folder}", f"{part}.trust_remote_code=true"]
        command = [sys.executable, "-m", "pipelines.cli", "plan", "laptop", "--storage"]
        command += [str(tmp_path / "run"), "--set", "llm.max_model_tokens=512"]
        for setting in asked:
            command += ["--set", setting]
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)

    refused = answer()
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "tokay: recipe laptop sets llm.trust_remote_code and retriever.trust_remote_code and"
        " student.trust_remote_code, which runs Python code that comes with a model: give"
        " --trust-remote-code too if you trust it"
    )
    planned = answer("--trust-remote-code")
    assert planned.returncode == 0
    assert "LLM tokens and cost are unknown" in planned.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("raised", [TimeoutError("the work's own"), KeyError("name")])
def test_what_the_work_raises_is_raised_again(raised: Exception) -> None:
    def work() -> None:
        raise raised

    with pytest.raises(type(raised)) as error:
        checks.within(30, "the hub did not answer", work)
    assert error.value is raised


def test_answer_that_comes_too_late_is_refused() -> None:
    answered = threading.Event()
    with pytest.raises(UserError, match="the hub did not answer within 0 s"):
        checks.within(0.05, "the hub did not answer", lambda: answered.wait(30))
    answered.set()
