"""Files that people and attackers write, read by version 1.2's rules or refused with one line."""

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from pipelines.yaml_files import MAX_BYTES, read_value, read_yaml, write_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("On", "On"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("1e-4", 0.0001),
        ("1.5E3", 1500.0),
        (".5", 0.5),
        ("-.INF", float("-inf")),
        ("0o17", 15),
        ("0x1F", 31),
        ("+3", 3),
        ("TRUE", True),
        ("~", None),
        ("", None),
    ],
)
def test_yaml_scalars_are_those_of_version_1_2(text: str, value: Any) -> None:
    found = read_yaml(f"key: {text}", "r.yaml")["key"]
    assert (found, type(found)) == (value, type(value))
    assert (read_value(text, "--set"), type(read_value(text, "--set"))) == (value, type(value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a: 1\nb: 2\na: 3\nb: 4",
            "r.yaml: keys that occur twice: 'a' in lines 1 and 3, 'b' in lines 2 and 4; take",
        ),
        ("x:\n  c: 1\n  c: 1", "r.yaml: keys that occur twice: 'c' in lines 2 and 3; take one"),
        ("a: 0100", "r.yaml: line 1: 0100 is not a number: write 100, or quote it"),
        ("a: &a [*a]", "r.yaml: line 1: *a contains itself"),
        (BOMB, "r.yaml: line 5: more than 50,000 values"),
        ("[" * 1000, "r.yaml: line 1: more than 40 levels"),
        ("x: !!python/object/apply:os.system ['id']", "r.yaml: line 1: the tag '!!python/object"),
        ("x: !!binary aGk=", "r.yaml: line 1: the tag '!!binary' is not accepted"),
        ("a: 1\n---\nb: 2", "r.yaml is not YAML: line 2: a second document begins here"),
        ("name: [unclosed\n", "r.yaml is not YAML: line 2: expected ',' or ']'"),
        ("? [a]\n: b", "r.yaml: line 1: a key that is not text"),
        ("a: \x00", "r.yaml is not YAML: unacceptable character"),
        ("a: " + "9" * 5000, "r.yaml: line 1: a number of 5,000 digits"),
        ('a: "\\ud83d"', "r.yaml: line 1: a lone surrogate"),
        (b"a: \xff", "r.yaml is not UTF-8, at byte 3"),
        ("#" * (MAX_BYTES + 1), "r.yaml is larger than 500,000 bytes"),
    ],
)
def test_yaml_that_is_refused_is_told_in_one_short_line(content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        read_yaml(content, "r.yaml")
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_yaml_anchors_and_merges_are_read_within_bounds() -> None:
    text = "a: &t {e: 1, f: 2}\nb: {<<: *t, e: 3}\nc: *t\n"
    found = read_yaml(text, "r.yaml")
    assert found == {"a": {"e": 1, "f": 2}, "b": {"e": 3, "f": 2}, "c": {"e": 1, "f": 2}}


@pytest.mark.parametrize(
    "piece", ["[", "{a: ", "- ", "*a ", "&a ", "? ", "'", "a: b\n", "x,", "#\n"]
)
def test_yaml_of_any_shape_is_read_or_refused_soon(piece: str) -> None:
    begin = time.perf_counter()
    try:
        read_yaml(piece * (100_000 // len(piece)), "r.yaml")
    except UserError as error:
        assert len(str(error)) < 500
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("docs #1", "docs #1"),
        ("x#y", "x#y"),
        ("a: b", "a: b"),
        ("@x", "@x"),
        ("*", "*"),
        ("'x # y'", "x # y"),
        ('["x #1", b]', ["x #1", "b"]),
        ("{a: 1e-3}", {"a": 0.001}),
        ("[*.warc*,*.arc*]", ["*.warc*", "*.arc*"]),
        ("[news/*, * , 3]", ["news/*", "*", 3]),
        ('["a,*b", c]', ["a,*b", "c"]),
        ("[&x 1, *x]", [1, 1]),
    ],
)
def test_set_keeps_every_character_of_its_value(text: str, value: Any) -> None:
    assert read_value(text, "--set") == value


@pytest.mark.parametrize("text", ["[a, b] # c", "[a #b, c]", "'a' b", "0100", "[0100]", "'a"])
def test_set_refuses_a_value_of_which_a_part_would_be_lost(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        read_value(text, "--set")


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["yes", "1e-4", "12:30", "0100", "0o17", "null", " #", "a#b", "<<", ".inf"]),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_yaml_that_is_written_is_read_as_it_was(tree: Any) -> None:
    assert json.dumps(read_yaml(write_yaml(tree), "r.yaml")) == json.dumps(tree)
