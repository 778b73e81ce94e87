"""No text of anyone's takes more than time in proportion to its length."""

import re
from collections.abc import Callable
from types import ModuleType

import pytest

from actors import words
from pipelines.corpus import cutting
from pipelines.corpus.cutting import passages_of, reject_reason
from pipelines.datasets import decontamination
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.documents import Document
from pipelines.demo import python_documentation
from pipelines.fret import prompts
from pipelines.report import labels

MODULES = (words, cutting, python_documentation, decontamination, prompts, labels)
# What opens, parts and closes something, again and again.
UNITS = [
    *(" ", "\t", "\n", "\f", "`", "*", "_", "[", "]", "(", ")", "<", ">", "=", "-", "#", "|", ":"),
    *(
        ".",
        '"',
        "'",
        "~",
        "1",
        "a",
        "A",
        "\u2028",
        "\ufeff",
        " \n",
        "\n\n",
        " a",
        "a\n",
        "a.",
        '."',
    ),
    *(
        "``",
        "`a ",
        "a` ",
        "*a",
        " *a",
        ":a",
        ":a:`",
        ":a:`a ",
        "<a",
        "<a ",
        "[!",
        "[![a](",
        "![a](",
    ),
    *("[a](", "[a][", "\n[", "\n[a", "<!--", "\n```a", "\n~~~a", "<table ", "<details>", "</a"),
    *(
        "<http://a",
        "a(",
        "\na(",
        "a()\n",
        "class a\n",
        "(a)",
        "\n.. a",
        "\n a",
        "\n>>>",
        "\n>>> a",
        "= a",
    ),
    *("\n# a ", "# ", "## #", "a #", "[1]", " [1", "==\n", "a\n==", "\n|", "A\n---", "a = ", ") "),
]
HEADS = ("", "# ", "a(", "A\n", ":a:`", "``", "[![", "<!--", "\n```\n")


def patterns(module: ModuleType) -> list[re.Pattern[str]]:
    found: list[re.Pattern[str]] = []
    for value in vars(module).values():
        rows = value if isinstance(value, tuple) else (value,)
        cells = [cell for row in rows for cell in (row if isinstance(row, tuple) else (row,))]
        found += [cell for cell in cells if isinstance(cell, re.Pattern)]
    return found


ALL = {pattern.pattern: pattern for module in MODULES for pattern in patterns(module)}


def test_patterns_are_found_in_modules() -> None:
    assert len(ALL) > 35
    assert {"_DOCTEST", "_MARKUP", "_SPANS"} <= vars(python_documentation).keys()


@pytest.mark.parametrize("pattern", ALL.values(), ids=lambda pattern: pattern.pattern[:30])
def test_pattern_is_linear(pattern: re.Pattern[str], assert_linear: Callable[..., None]) -> None:
    for unit in UNITS:
        for head in HEADS:
            assert_linear(lambda text: pattern.sub("", text), unit, head=head, tail="\0", size=1500)


def prose(text: str) -> object:
    return python_documentation._prose(python_documentation._without_markup(text))


def docstring(text: str) -> object:
    return python_documentation._docstring_prose(type("Entry", (), {"__doc__": text}))


def passages_and_reasons(text: str) -> object:
    found = passages_of(Document(name="d", title=text, text=text))
    return [reject_reason(passage.text) for passage in found]


def query(text: str) -> object:
    return prompts.unfit(text[:300], text), decontamination.words(text)


def shared_run(text: str) -> object:
    return Decontamination([text]).shared_run(text)


@pytest.mark.parametrize("call", [prose, docstring, passages_and_reasons, query, shared_run])
def test_text_is_read_in_linear_time(
    call: Callable[[str], object], assert_linear: Callable[..., None]
) -> None:
    for unit in UNITS:
        assert_linear(call, unit, tail="\0", size=2000)


def test_pattern_that_is_quadratic_is_found(assert_linear: Callable[..., None]) -> None:
    pattern = re.compile(r"[ \t]*\[\d+\]_")  # as citations were found once
    with pytest.raises(AssertionError, match="times as long"):
        assert_linear(lambda text: pattern.sub("", text), " ", size=2000)
