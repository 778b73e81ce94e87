"""JSON without NaN, which is not JSON."""

import json
import math

import numpy as np
import pytest

from cluster.plain_json import dump_json


@pytest.mark.parametrize("none", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_plain_json_has_null_for_what_is_no_number(none: float) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    rows = {"a": [1.5, none, {"b": (none, "NaN")}], "c": True}
    text = dump_json(rows, indent=1)
    assert json.loads(text, parse_constant=refuse) == {
        "a": [1.5, None, {"b": [None, "NaN"]}],
        "c": True,
    }
    assert dump_json(rows["c"]) == "true"
