"""Which keys of a recipe are in the fingerprint of a step: all but those that are marked.

What changes speed, place or tolerance and no number is marked where it is declared::

    num_workers: Annotated[int, NotFingerprinted] = 1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

if TYPE_CHECKING:
    from cluster.artifacts import Json


class NotFingerprinted:
    """Marks a key that changes nothing of what a step makes."""


def fingerprinted(config: BaseModel) -> dict[str, Json]:
    """Returns the keys that change what a step makes, those of nested models too, as JSON."""
    return {
        name: _json(getattr(config, name))
        for name, field in type(config).model_fields.items()
        if is_fingerprinted(field)
    }


def is_fingerprinted(field: FieldInfo) -> bool:
    """Says whether a key is in the fingerprint of the step that it belongs to."""
    return NotFingerprinted not in field.metadata


def _json(value: Any) -> Json:
    if isinstance(value, BaseModel):
        return fingerprinted(value)
    if isinstance(value, tuple | list):
        return [_json(each) for each in value]
    if isinstance(value, dict):
        return {key: _json(each) for key, each in value.items()}
    return to_jsonable_python(value)
