"""The languages of a run's examples, counted."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import Json
from cluster.storage import open_storage
from pipelines.records import FRET
from pipelines.report import languages
from pipelines.report.languages import collect_languages

GERMAN = "Bienen zeigen einander durch einen Tanz, wo die Blumen stehen."
CHINESE = "蜜蜂通过跳舞告诉同伴哪里有花。"
ENGLISH = "how do bees tell each other where the flowers are"
PAIRS = [
    *[("wie finden Bienen die Blumen", GERMAN)] * 3,
    *[("谁是多瑙河伯爵？", CHINESE)] * 2,  # to py3langid Wu Chinese
    (ENGLISH, GERMAN),
]


def fret(pairs: list[tuple[str, str]]) -> Any:
    rows: list[dict[str, Any]] = [
        {"id": f"q{number}", "query": query, "positive": positive}
        for number, (query, positive) in enumerate(pairs)
    ]
    rows.append({"id": "dropped", "query": ENGLISH, "dropped_by": "too long"})
    table = pa.Table.from_pylist(rows, FRET)
    return SimpleNamespace(tables=lambda columns: [table.select(columns)])


def test_languages_of_kept_queries_and_their_positives_are_counted() -> None:
    assert collect_languages(fret(PAIRS)) == {
        "num_examples": 6,
        "rows": [
            {"query": "German", "passage": "German", "count": 3},
            {"query": "Chinese", "passage": "Chinese", "count": 2},
            {"query": "English", "passage": "German", "count": 1},
        ],
        "other": 0,
    }


def test_many_examples_are_sampled_and_rare_languages_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(languages, "NUM_SAMPLED", 10)
    monkeypatch.setattr(languages, "MIN_SHARE", 0.45)
    found = collect_languages(fret(PAIRS * 2))
    assert found is not None and found["num_examples"] == 10
    assert [row["query"] for row in found["rows"]] == ["German"]
    assert found["other"] == 10 - found["rows"][0]["count"]
    assert found == collect_languages(fret(PAIRS * 2))


def test_run_without_kept_queries_has_no_languages() -> None:
    assert collect_languages(fret([])) is None
    assert collect_languages(None) is None


def test_page_shows_the_languages(finished_run: str, report: dict[str, Json]) -> None:
    page = open_storage(finished_run).read_bytes("report.html").decode()
    assert report["languages"]["num_examples"] == 2
    assert "<h3>Languages</h3>" in page
