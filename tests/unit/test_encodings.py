"""Files are UTF-8 whatever the machine's locale says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    str(file.relative_to(ROOT))
    for folder in ("actors", "benchmarks", "cluster", "pipelines", "serving")
    for file in (ROOT / folder).rglob("*.py")
)
MODE = re.compile(r"[rwax][t+]*")


def lacks_encoding(call: ast.Call) -> bool:
    """Says whether a call reads or writes text in the locale's encoding."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    if name not in ("open", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"):
        return False
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    modes = [each.value for each in call.args if isinstance(each, ast.Constant)]
    modes += [k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)]
    if any(isinstance(mode, str) and MODE.fullmatch(mode) for mode in modes):
        return True
    return isinstance(call.func, ast.Name) and len(call.args) == 1 and not call.keywords


@pytest.mark.parametrize("file", FILES)
def test_text_files_are_opened_with_an_encoding(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if lacks_encoding(call)] == []


@pytest.mark.parametrize(
    ("code", "lacks"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("p.open('a')", True),
        ("p.open(mode='r')", True),
        ("p.read_text()", True),
        ("p.write_text(x)", True),
        ("open(p, 'rb')", False),
        ("p.read_text('utf-8')", False),
        ("p.open('w', encoding='utf-8')", False),
        ("Artifact.open(storage)", False),
    ],
)
def test_call_that_lacks_an_encoding_is_seen(code: str, lacks: bool) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call) and lacks_encoding(call) == lacks
