import logging
import sys
from collections import Counter

import pytest

from actors.words import num_words
from pipelines.corpus.cutting import Passage, reject_reason
from pipelines.demo.python_documentation import (
    _documents,
    _plain,
    _Shelf,
    python_documentation,
)


def test_doctests_rules_and_rest_markup_are_removed() -> None:
    text = """Title
    =====

    See :func:`~os.path.join`, :ref:`the guide <guide>` and ``a * b`` or `x` [1]_ with *great* care.

    >>> join("a", "b")
    'a/b'

    Multiply a * b * c.
    """
    assert _plain(text) == (
        "Title\n\nSee os.path.join, the guide and a * b or x with great care.\n\n"
        "Multiply a * b * c."
    )


def test_python_passages_are_fit_and_cover_every_area(documentation: list[Passage]) -> None:
    def area(source: str) -> str:
        start = source.split(":")[0].split(".")[0].split("#")[0]
        return start if start in {"python", "dist", "numpy", "scipy", "pandas", "sklearn"} else ""

    areas = Counter(area(passage.source) for passage in documentation)
    assert 2000 < len(documentation) < 3500
    assert min(areas[name] for name in ("python", "dist", "", "numpy", "scipy", "pandas")) > 100
    assert all(reject_reason(passage.text) is None for passage in documentation)
    mean = sum(num_words(passage.text) for passage in documentation) / len(documentation)
    assert 70 < mean < 120
    assert max(num_words(passage.text) for passage in documentation) <= 160


def test_python_passages_have_unique_ids_and_sources(documentation: list[Passage]) -> None:
    assert len({passage.id for passage in documentation}) == len(documentation)
    assert len({passage.source for passage in documentation}) == len(documentation)


def test_python_documentation_does_not_depend_on_what_this_process_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.print", lambda *_: None)  # Ray does this
    text = {document.name: document.text for document in python_documentation()}
    assert text["print"].startswith("Prints the values to a stream")
    # A member that the module has only once something has used it.
    assert not [name for name in text if name.startswith("concurrent.futures.ThreadPool")]


def test_python_passages_hold_prose_of_known_entries(documentation: list[Passage]) -> None:
    text = {passage.source: passage.text for passage in documentation}
    assert text["statistics.median_low#1"].startswith("Return the low median of numeric data.")
    assert "a mutable object" in text["python:topic/function#3"]
    assert text["dist:numpy#1"].startswith("Fundamental package for array computing in Python")
    assert "full_matrices" in text["numpy.linalg.svd#1"]


def test_python_passages_leave_out_examples_and_signatures(documentation: list[Passage]) -> None:
    for passage in documentation:
        assert ">>>" not in passage.text, passage.source
        assert "::=" not in passage.text, passage.source


def test_python_documentation_takes_an_object_once_under_its_first_name(
    documentation: list[Passage],
) -> None:
    names = {passage.source.partition("#")[0] for passage in documentation}
    assert "numpy.abs" in names and "numpy.absolute" not in names
    assert "threading.Semaphore.acquire" in names
    assert "threading.BoundedSemaphore.acquire" not in names


def test_python_documentation_goes_without_a_missing_module(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = _Shelf(modules="sqlite3 json", min_words=0, max_words=100, methods=False)
    monkeypatch.setattr("pipelines.demo.python_documentation._SHELVES", (shelf,))
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with caplog.at_level(logging.WARNING):
        names = {document.name for document in _documents()}
    assert "json.loads" in names
    assert not {name for name in names if name.startswith("sqlite3")}
    assert "sqlite3 is left out of the corpus" in caplog.text
