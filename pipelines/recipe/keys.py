"""Every key that a recipe may hold, with what it accepts, its default and what it means."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from cluster.errors import UserError
from pipelines.fingerprints import is_fingerprinted
from pipelines.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a recipe.

    Attributes:
        key: Path from the top, such as ``training.loss.temperature``; in a list's members
            ``evaluation[].name``.
        accepts: Its type, in words, or the values that it may have.
        default: As YAML writes it; ``required`` where there is none.
        description: What it means; empty where its name says it.
        fingerprinted: Whether another value makes another artifact.
    """

    key: str
    accepts: str
    default: str
    description: str
    fingerprinted: bool = True


def recipe_keys(below: str = "") -> list[Key]:
    """Returns the keys of a recipe in its order; with `below`, that key and those under it.

    Raises:
        UserError: There is no such key.
    """
    keys = [
        each
        for each in _keys(Recipe, "")
        if not below or each.key == below or each.key.startswith((f"{below}.", f"{below}[]."))
    ]
    if not keys:
        parts = ", ".join(Recipe.model_fields)
        raise UserError(f"no key {below!r} in a recipe; its parts are {parts}")
    return keys


def print_keys(keys: list[Key], console: Console) -> None:
    """Prints each key with its default and what it accepts, and below it what it means."""
    for each in keys:
        line = Text(each.key, style="bold")
        line.append(f" = {each.default}" if each.default else "", style="not bold")
        line.append(f"  ({each.accepts})", style="not bold dim")
        console.print(line)
        if each.description:
            console.print(Padding(Text(each.description), (0, 0, 0, 4)))


def _keys(model: type[BaseModel], above: str, counts: bool = True) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        key, fingerprinted = f"{above}{name}", counts and is_fingerprinted(field)
        inner, origin = model_in(field.annotation), get_origin(field.annotation)
        if field.description or not isinstance(field.get_default(), BaseModel):
            below = "list" if origin is tuple else "the keys below"
            yield Key(
                key=key,
                accepts=below if inner else _words(field.annotation),
                default=_default(field),
                description=field.description or "",
                fingerprinted=fingerprinted,
            )
        if inner:
            member = "[]" if origin is tuple else ".NAME" if origin is dict else ""
            yield from _keys(inner, f"{key}{member}.", fingerprinted)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model in ``Model``, ``Model | None`` or ``tuple[Model, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = [model_in(each) for each in get_args(annotation)]
    return next((each for each in models if each), None)


def _words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else _words(each) for each in inner)
    if origin is tuple:
        return f"list of {_words(inner[0])}"
    if origin is dict:
        return "map"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or "''"
