"""JSON that every program reads: it has no NaN and no infinity, though Python writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dump_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON, in which NaN and the infinities are null.

    Args:
        value: What `json.dumps` takes.
        **options: Of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_with_nulls(value), allow_nan=False, **options)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(each) for each in value]
    return value
