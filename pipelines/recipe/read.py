"""Reads a recipe: YAML over its `base`, `--set` over both, and says of a mistake what is accepted.

A recipe may name another one as its `base`, by name or file, and then holds only what differs.
"""

import difflib
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import UserError, excerpt
from pipelines.datasets.decontamination import DecontaminationConfig
from pipelines.fret.languages import OF_PASSAGE, language_code
from pipelines.fret.prompts import WRITTEN, load_prompts
from pipelines.recipe.keys import model_in
from pipelines.recipe.recipe import Recipe, RunModels
from pipelines.recipe.variables import fill_in, is_name, unset_variables
from pipelines.yaml_files import MAX_BYTES, leaves, read_value, read_yaml


def load_recipe(
    source: str | Path,
    settings: Sequence[str] | None = None,
    *,
    keep_unset: bool = False,
    trust_remote_code: bool = False,
) -> Recipe:
    """Reads a recipe by its file, or by the name of one that comes with Tokay.

    Args:
        source: A YAML file, or a name such as `laptop`.
        settings: Overrides, each `path.to.key=value`; the value is YAML.
        keep_unset: Leave a ${NAME} that the environment lacks as it stands: a plan can be made
            without the place.
        trust_remote_code: Whether the command line, too, says that models may bring code.

    Raises:
        UserError: No such recipe, not YAML, an unknown key or a value that is not accepted; or
            models of it may bring code, and the command line does not say so.
    """
    tree = read_keys(source, settings, keep_unset=keep_unset)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"recipe {source}: {_explain(error)}") from error
    _refuse_infinite(recipe, f"recipe {source}")
    refuse_foreign_code(recipe, f"recipe {source}", trust_remote_code)
    _check_prompts(recipe)
    return recipe


def refuse_foreign_code(
    recipe: Recipe | RunModels,
    place: str,
    allowed: bool,
    parts: Sequence[str] = (),
) -> None:
    """Raises UserError where the recipe lets its models bring code, and `allowed` is false.

    The command line must allow it too. Looked at are the `parts` whose models are to be loaded, by
    default all of a recipe's; `place` is what the error calls the recipe.
    """
    models = recipe.models if isinstance(recipe, Recipe) else {}
    models |= {part: getattr(recipe, part) for part in parts}
    trusted = [part for part, model in models.items() if model.trust_remote_code]
    if trusted and not allowed:
        keys = [f"{part}.trust_remote_code" for part in trusted]
        raise UserError(
            f"{place} sets {' and '.join(keys)}, which runs Python code that comes with a model:"
            " give --trust-remote-code too if you trust it"
        )


def _check_prompts(recipe: Recipe) -> None:
    """Raises UserError for prompts that do not exist, and for tasks or labels that have none."""
    if recipe.queries.language not in (None, OF_PASSAGE):
        language_code(recipe.queries.language)
    if recipe.prompts and unset_variables([recipe.prompts]):
        return
    prompts, tasks = load_prompts(recipe.prompts), recipe.queries.tasks
    unknown = [excerpt(task) for task in tasks if task not in prompts.tasks]
    if unknown and tasks != (WRITTEN,):
        raise UserError(
            f"queries.tasks: {unknown[:3]} have no prompt; accepted are"
            f" {', '.join(prompts.tasks)}, or {WRITTEN} alone"
        )
    if recipe.scores.relevance not in prompts.scores:
        raise UserError(
            f"scores.relevance: {excerpt(recipe.scores.relevance)!r} has no prompt; accepted are"
            f" {', '.join(prompts.scores)}"
        )


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with Tokay."""
    folder = Path(str(files("pipelines") / "recipes"))
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_saved_keys(content: bytes, place: str) -> dict[str, Any]:
    """Reads the recipe that a run folder keeps, unchecked; empty where there is nothing.

    Raises:
        UserError: It is not YAML, or no mapping of keys.
    """
    tree = read_yaml(content, place)
    if not isinstance(tree, dict | None):
        raise UserError(f"{place} is no recipe: accepted is a mapping of keys")
    return tree or {}


def read_models(content: bytes, place: str) -> RunModels:
    """Reads which models the recipe that a run folder keeps is about; looks at none of them.

    Raises:
        UserError: It is not YAML, or the recipe of another version.
    """
    tree = read_saved_keys(content, place)
    refuse_other_version(tree, place)
    try:
        return RunModels.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{place}, perhaps of another version: {_explain(error)}") from error


def refuse_other_version(tree: dict[str, Any], place: str) -> None:
    """Raises UserError where a run's recipe has keys that this version does not know."""
    unknown = [repr(excerpt(str(key))) for key in tree if key not in Recipe.model_fields]
    if unknown:
        raise UserError(
            f"{place} has the unknown key {' and '.join(unknown[:3])}, made by another version of"
            " Tokay: use that version, or run it again with this one"
        )


def read_keys(
    source: str | Path, settings: Sequence[str] | None = None, *, keep_unset: bool = False
) -> dict[str, Any]:
    """Reads a recipe's keys over those of its `base`, and the settings over both, unchecked."""
    tree = _read_file(source, (), keep_unset)
    for setting in settings or []:
        _set(tree, setting, keep_unset)
    return tree


def _read_file(source: str | Path, above: tuple[Path, ...], keep_unset: bool) -> dict[str, Any]:
    path = Path(source)
    if not _is_file(path) and "/" not in str(source) and not path.suffix:
        path = Path(str(files("pipelines") / "recipes" / f"{source}.yaml"))
    if path.resolve() in above:
        raise UserError(f"recipe {path} is its own base, by {' and '.join(map(str, above))}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if _is_file(path) or path.is_dir():
            raise UserError(f"recipe {path} cannot be read: {error}") from error
        raise UserError(
            f"recipe {excerpt(str(source))!r} does not exist: give a YAML file or one of"
            f" {', '.join(recipe_names())}"
        ) from error
    tree = read_yaml(content, f"recipe {path}")
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} is not a mapping of keys: see {', '.join(recipe_names())}")
    names = _variables(tree, f"recipe {path}")
    tree = fill_in(tree, f"recipe {path}", names=names, keep_unset=keep_unset)
    if tree.get("prompts"):
        tree["prompts"] = _beside(path, tree["prompts"])
    base = tree.pop("base", None)
    if base is None:
        return dict(tree)
    below = _read_file(_beside(path, base), (*above, path.resolve()), keep_unset)
    if (
        names and "variables" in below
    ):  # the recipe that is kept names what was read, of whichever file
        tree["variables"] = [*dict.fromkeys([*below["variables"], *names])]
    return _over(tree, below)


def _is_file(path: Path) -> bool:
    """Says whether there is such a file; a name that no file can have names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _variables(tree: dict[str, Any], place: str) -> list[str]:
    names = tree.get("variables") or []
    if not isinstance(names, list) or not all(is_name(name) for name in names):
        raise UserError(f"{place}: variables: accepted is a list of names, such as [DATA, HOME]")
    return names


def _beside(path: Path, name: str) -> str:
    """Returns a file that a recipe names: beside the recipe, or as it stands."""
    beside = path.parent / str(name)
    return str(beside) if _is_file(beside) else str(name)


def _over(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in tree.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _over(value, below)
        merged[key] = value
    return merged


def _set(tree: dict[str, Any], setting: str, keep_unset: bool) -> None:
    key, equals, text = setting.partition("=")
    place = f"--set {excerpt(setting)!r}"
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"{place}: write path.to.key=value")
    *parents, last = key.strip().split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list):
            node = node[_index(parent, node, place)]
        else:
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise UserError(f"{place}: {parent} is a value and holds no keys")
    names = _variables(tree, place)
    value = fill_in(read_value(text, place), place, names=names, keep_unset=keep_unset)
    if isinstance(node, list):
        node[_index(last, node, place)] = value
    else:
        node[last] = value


def _index(text: str, node: list[Any], place: str) -> int:
    if not text.isdecimal() or len(text) > 6 or int(text) >= len(node):
        raise UserError(f"{place}: {text!r} is no place in a list of {len(node)}")
    return int(text)


def _refuse_infinite(recipe: Recipe, place: str) -> None:
    """Raises UserError for a number without an end, which no key means."""
    for key, value in leaves(recipe.model_dump()):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{place}: {key}: {value} given; accepted are finite numbers")


def _explain(error: ValidationError) -> str:
    """Says of the first mistakes: the key, what was given, what is accepted."""
    lines = []
    for mistake in error.errors()[:3]:
        key = excerpt(".".join(str(part) for part in mistake["loc"]))
        said = excerpt(mistake["msg"].removeprefix("Value error, "), 400)
        if mistake["type"] == "extra_forbidden":
            accepted, last = _accepted_keys(mistake["loc"][:-1]), str(mistake["loc"][-1])
            near = difflib.get_close_matches(last, accepted, n=1)
            if last in DecontaminationConfig.model_fields:  # in recipes of before, keys of fret
                near = [f"decontamination.{last}"]
            hint = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(accepted)}"
            lines.append(f"unknown key {key}; {hint}")
        elif mistake["type"] == "missing":
            lines.append(f"key {key} is missing")
        elif mistake["type"] == "value_error" and isinstance(mistake["input"], dict):
            # A mistake of several keys, which names them.
            lines.append(f"{key}: {said}" if key else said)
        else:
            if mistake["type"] == "string_type" and isinstance(mistake["input"], int | float):
                said = "put it in quotes"
            elif mistake["input"] is None:
                said += "; leave the key out for its default"
            lines.append(f"{key}: {excerpt(repr(mistake['input']))} given; {said}")
    return "; ".join(lines)


def _accepted_keys(path: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in path:
        if part in model.model_fields:  # else a place in a list, or a name in a map
            model = model_in(model.model_fields[part].annotation)
    return sorted(model.model_fields)
