"""What is certain to fail, checked before anything is run or paid for.

A recipe is checked key by key when it is read. Here its keys are compared with each other
and with its models' own files: names and configurations, neither weights nor code.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from actors.embedded import find_model, is_hub_id, refuse_missing
from actors.encoder_folder import read_cross_encoder, read_folder
from actors.engine import LlmConfig
from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.fret.prompts import WRITTEN
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.variables import unset_variables
from pipelines.training.config import TrainingConfig
from pipelines.training.embedding_distillation import TEACHER

PATIENCE_S = 15.0  # for an answer from S3 or the hub, whose clients try for minutes
_ENCODERS = (
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)

T = TypeVar("T")
Settings = dict[str, Any]  # of a model: its config.json


def check_recipe(recipe: Recipe, *, here: bool = True) -> None:
    """Refuses a recipe with a step that is certain to fail; loads nothing and runs no code.

    If it is to run `here`, this machine's folders and packages are looked at too.

    Raises:
        UserError: The key, what was given, what is accepted.
    """
    _check_keys(recipe)
    if here and not os.environ.get("RAY_ADDRESS"):
        _check_tracking(recipe)
    models = recipe.models
    names = {key: each.model for key, each in models.items()}
    names = {key: name for key, name in names.items() if not unset_variables([name])}
    for key, name in names.items():
        try:
            refuse_missing(name, here=here)
        except UserError as error:
            raise UserError(f"{key}.model: {error}") from error
    with ThreadPoolExecutor(len(models)) as pool:  # the hub may be slow
        settings = pool.map(
            lambda key: _settings(key, names[key], here, models[key].trust_remote_code),
            names,
        )
        configs = dict.fromkeys(models, Settings()) | dict(zip(names, settings, strict=True))
    _check_llm(recipe, configs["llm"])
    for key, model in models.items():
        if not isinstance(model, LlmConfig):
            _check_length(f"{key}.max_tokens", model.max_tokens, model.model, configs[key])
    _check_student(recipe, configs["student"])
    _check_teacher(recipe, configs)


def within(seconds: float, late: str, work: Callable[[], T]) -> T:
    """Returns what `work` returns, or raises what it raises; UserError if it takes longer."""
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(work())
        except Exception as error:  # raised again below, in the caller's thread
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # one that does not keep the process alive
    if not wait([answer], seconds).done:
        raise UserError(f"{late} within {seconds:.0f} s")
    return answer.result()


def _check_keys(recipe: Recipe) -> None:
    asked = recipe.queries.max_passage_tokens + recipe.queries.max_query_tokens
    for key, tokens in (
        ("queries.max_passage_tokens and max_query_tokens", asked),
        ("scores.max_passage_tokens", recipe.scores.max_passage_tokens),
    ):
        if tokens >= recipe.llm.max_model_tokens:
            raise UserError(
                f"{key}: {tokens} given, and llm.max_model_tokens is"
                f" {recipe.llm.max_model_tokens}, which the prompt shares: lower one or raise it"
            )
    asked_for = {*recipe.queries.tasks}
    unknown = [task for task in recipe.mixture.fret_only_tasks if task not in asked_for]
    if unknown and WRITTEN not in asked_for:
        raise UserError(
            f"mixture.fret_only_tasks: {unknown[:3]} given, and queries.tasks are"
            f" {', '.join(recipe.queries.tasks)}"
        )
    if recipe.has_probe and recipe.candidates.max_seed_rank == 1:
        raise UserError(
            "candidates.max_seed_rank: 1 given, which keeps only queries whose seed the retriever"
            " ranks first, so that a probe has nothing to tell: raise it, or name the judges in"
            " fret.fusion"
        )
    for key, stage in recipe.stages.items():
        watched = stage.training.validation
        if watched and watched.test_set is None and not stage.mixture.validation_examples:
            raise UserError(
                f"{key}training.validation has nothing to look at: set"
                f" {key}mixture.validation_examples or {key}training.validation.test_set"
            )


def _check_tracking(recipe: Recipe) -> None:
    for key, stage in recipe.stages.items():
        training = stage.training
        for package in () if training.node_resource else training.tracking:
            if package in ("mlflow", "wandb") and find_spec(package) is None:
                raise UserError(
                    f"{key}training.tracking names {package}, which is not installed:"
                    f" pip install {package}, or take it out"
                )


def _check_llm(recipe: Recipe, settings: Settings) -> None:
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if isinstance(rope, dict) and rope.get("rope_type", "default") == "default":
        llm = recipe.llm
        _check_length("llm.max_model_tokens", llm.max_model_tokens, llm.model, settings)


def _check_length(key: str, tokens: int, model: str, settings: Settings) -> None:
    positions = _number(settings, "max_position_embeddings")
    if positions and tokens > positions:
        raise UserError(f"{key}: {tokens} given, and {model} takes at most {positions}")


def _check_student(recipe: Recipe, settings: Settings) -> None:
    student, kind = recipe.student, settings.get("model_type")
    num_layers = _number(settings, "num_hidden_layers")
    if student.layers and num_layers and student.layers[-1] >= num_layers:
        raise UserError(
            f"student.layers: {list(student.layers)} given, and {student.model} has {num_layers}"
            f" layers: accepted are 0 to {num_layers - 1}"
        )
    if student.layers and kind == "modernbert" and student.layers[0] != 0:
        raise UserError("student.layers: a ModernBERT's first layer differs, so keep layer 0")
    if student.bidirectional and kind in _ENCODERS:
        raise UserError(
            f"student.bidirectional: {student.model} is a {kind}, which is bidirectional already:"
            " leave it out"
        )
    dimensions = student.projection or _number(settings, "dimensions")
    if not dimensions:
        return
    asked = {
        f"{key}training.loss.matryoshka_dimensions": stage.training.loss.matryoshka_dimensions
        for key, stage in recipe.stages.items()
        if isinstance(stage.training, TrainingConfig)
    }
    for number, test_set in enumerate(recipe.evaluation):
        asked[f"evaluation.{number}.dimensions"] = test_set.dimensions
    for key, sizes in asked.items():
        if sizes and max(sizes) > dimensions:
            raise UserError(
                f"{key}: {max(sizes)} given, and the student's vectors have {dimensions} dimensions"
            )


def _check_teacher(recipe: Recipe, configs: dict[str, Settings]) -> None:
    """Refuses embedding distillation from vectors that are longer or shorter than the student's."""
    if recipe.embedding_distillation is None:
        return
    key = TEACHER if TEACHER in configs else "retriever"
    given = _number(configs[key], "dimensions")
    own = recipe.student.projection or _number(configs["student"], "dimensions")
    if given and own and given != own:
        raise UserError(
            f"embedding_distillation: the vectors of {key}.model {recipe.models[key].model} have"
            f" {given} dimensions, and the student's {own}: name a {TEACHER} of as many, or change"
            " student.projection"
        )


def _settings(key: str, name: str, here: bool, trusted: bool) -> Settings:
    """Returns a model's config.json, with its vectors' `dimensions`; empty where it is not known.

    Raises:
        UserError: The hub, or the bucket, says that there is no such model; or an encoder's folder
            asks for what is not supported.
    """
    folder = find_model(name) if here or is_hub_id(name) else None
    if folder is None:
        return _fetched(key, name)
    if key == "cross_encoder":
        read_cross_encoder(folder, trust_remote_code=trusted)
    elif key != "llm":
        read_folder(folder, trust_remote_code=trusted)
    settings = _json((folder / "config.json").read_bytes, dict)
    settings["dimensions"] = _number(settings, "hidden_size")
    for module in _json((folder / "modules.json").read_bytes, list):
        if not (isinstance(module, dict) and str(module.get("type", "")).endswith(".Dense")):
            continue
        path = Path(str(module.get("path", "")))
        if not path.is_absolute() and ".." not in path.parts:
            read = (folder / path / "config.json").read_bytes
            settings["dimensions"] = _number(_json(read, dict), "out_features")
    return settings


def _fetched(key: str, name: str) -> Settings:
    """Asks the bucket or the hub; leaves out `dimensions`, which further modules may change."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if name.startswith("s3://"):
        missing: type[Exception] = FileNotFoundError
        read = partial(open_storage(name).read_bytes, "config.json")
    elif is_hub_id(name):
        missing, read = RepositoryNotFoundError, partial(_hub_config, name)
    else:
        return {}
    try:
        content = within(PATIENCE_S, f"{key}.model {name} did not answer", read)
    except missing as error:
        raise UserError(
            f"{key}.model: {name!r} is neither a model's folder nor a model that the hub lets us"
            " read: correct it, or give HF_TOKEN"
        ) from error
    except Exception:  # no network, no credentials, no such file: the step that needs it says so
        return {}
    return _json(lambda: content, dict)


def _hub_config(name: str) -> bytes:
    """Fetches a small file once; the hub's own download tries for a minute."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(name, "config.json")
    answer = get_session().get(url, headers=build_hf_headers(), timeout=PATIENCE_S)
    hf_raise_for_status(answer)
    return bytes(answer.content)


def _json(read: Callable[[], bytes], kind: type[T]) -> T:
    """Returns a small JSON file's object or list; empty where it is not one: loading says so."""
    try:
        value = json.loads(read())
    except (OSError, ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _number(settings: Settings, name: str) -> int | None:
    """Returns a configuration's whole number above 0, or else that of its text part."""
    text = settings.get("text_config")
    for part in (settings, text if isinstance(text, dict) else {}):
        value = part.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
