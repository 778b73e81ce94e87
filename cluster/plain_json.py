"""JSON that every program reads: it has no NaN and no infinity, though Python writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 100


def dump_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON, in which NaN and the infinities are null.

    Args:
        value: What `json.dumps` takes.
        **options: Of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(with_nulls(value), allow_nan=False, **options)


def with_nulls(value: Any, depth: int = 0) -> Any:
    """Returns what JSON holds with None for NaN and the infinities.

    Raises:
        ValueError: It is nested more than MAX_DEPTH deep.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {key: with_nulls(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(each, depth + 1) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
