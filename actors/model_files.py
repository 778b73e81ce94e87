"""Files of a model that somebody made: read whole and in bounds, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from actors.encoder_settings import File, Index
from cluster.errors import UserError, excerpt

_MAX_FILE_BYTES = 2**24  # of a configuration
_LFS = b"version https://git-lfs.github.com/spec/"
_JSON_WORDS = {"True": "true", "False": "false", "None": "null"}
Model = TypeVar("Model", bound=File)
Checked = TypeVar("Checked")


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, in UTF-8 whatever the locale; None where it is missing.

    Raises:
        UserError: It is no JSON, or no file of a sensible size and depth.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise UserError(f"{path}: {path.stat().st_size} bytes; accepted are {_MAX_FILE_BYTES}")
    check_no_pointer(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({brief(error)}): fetch the model again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file, empty where it is missing; see :func:`read_json`."""
    found = read_json(path)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{path} holds {brief(found)}: accepted is a JSON object")
    return found or {}


def check_no_pointer(path: Path) -> None:
    """Raises UserError where Git left the address of a large file instead of the file."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(
                    f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`"
                )


def check_weights(folder: Path) -> None:
    """Checks that a transformer's safetensors files are there and whole.

    Raises:
        UserError: There are none, one is missing or broken, or the index names files elsewhere.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        names = sorted({*read_checked(index, Index).weight_map.values()})
        files = [folder / name for name in names]
    else:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        todo = (
            f"weights in a pickle ({pickled[0]}) can run code and are not read; where you trust"
            " them, load them with transformers and call save_pretrained, which writes safetensors"
            if pickled
            else "fetch the model again"
        )
        raise UserError(f"{folder} has no model.safetensors: {todo}")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Raises UserError unless a file of weights is whole."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file} is missing: fetch the model again")
    check_no_pointer(file)
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is broken or not whole ({brief(error)}): fetch the model again"
        ) from error


def brief(given: object, max_chars: int = 300) -> str:
    """Returns an error's text, or a value as JSON writes it, on one short line."""
    if isinstance(given, BaseException):
        text = f"{type(given).__name__}: {given}"
    else:
        try:
            text = json.dumps(given, ensure_ascii=False)
        except (RecursionError, TypeError):
            text = type(given).__name__
    return excerpt(text, max_chars)


def read_checked(path: Path, kind: type[Model]) -> Model:
    """Returns what a JSON file says, the defaults where it is missing.

    Raises:
        UserError: A key or a value is none of ``kind``.
    """
    keys = [field.alias or name for name, field in kind.model_fields.items()]
    return checked(path, read_object(path), TypeAdapter(kind), keys)


def checked(
    path: Path, given: Any, kind: TypeAdapter[Checked], keys: Sequence[str] = ()
) -> Checked:
    """Returns what was read of a file as the kind it must be; see :func:`read_checked`."""
    try:
        return kind.validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = excerpt(".".join(map(str, first["loc"])) or "it")
        value = "" if first["type"] == "missing" else f" {brief(first['input'], 60)}"
        raise UserError(f"{path}: {where}{value}: {_accepted(first, keys)}") from error


def _accepted(mistake: Any, keys: Sequence[str]) -> str:
    kind = mistake["type"]
    if kind == "literal_error":
        expected = mistake["ctx"]["expected"]
        return f"accepted is {_JSON_WORDS.get(expected, expected)}"
    if kind == "extra_forbidden":
        known = f"; accepted keys are {', '.join(keys)}" if len(mistake["loc"]) == 1 else ""
        return f"a key that means nothing here, and may mean much{known}"
    if kind == "none_required":
        return "accepted is null"
    if kind == "missing":
        return "it is missing"
    message = str(mistake["msg"])
    return message[0].lower() + message[1:]
