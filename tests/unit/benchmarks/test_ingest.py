"""What the benchmark of web pages makes up, how it counts, and what its lines say."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import ingest
from benchmarks.ingest import MeasuredPages, quality, token_f1, write_warcs
from benchmarks.scale import Meter
from cluster.steps import Run
from cluster.storage import open_storage
from pipelines.datasets.documents import Page
from pipelines.datasets.sources.streams import Source
from pipelines.datasets.sources.warc import warc_pages
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe

LONG = "The harbour office of {} opens at seven in the morning, and closes after the last ferry."
PAGES = [
    {
        "url": f"http://{town}",
        "content": (
            f"<html><head><meta charset={charset}>"
            "<script>a < b; // which is a text of more than forty characters</script>"
            f"</head><body><ul><li>Menu</li></ul><!-- {LONG} --><article><p>"
            f"{LONG.format(town)} {LONG.format(town)} <a href='x'>{LONG.format(town)}</a></p>"
            f"<p>At <b>H\u00fcll</b> {LONG.format(town)}</p></article></body></html>"
        ).encode(charset),
    }
    for town, charset in [("Leith", "latin1"), ("Whitby", "utf-8"), ("Rye", "utf-8")]
]
SHORT = {"url": "http://short", "content": b"<html><body><p>Short.</p></body></html>"}


def written(folder: Path, num: int, pages: list[dict] = PAGES) -> tuple[list[Page], int]:
    folder.mkdir()
    num_distinct = write_warcs(folder, pages, num)
    sources = [
        Source(storage=open_storage(folder), path=name)
        for name in sorted(file.name for file in folder.iterdir())
    ]
    return [page for source in sources for page in warc_pages(source)], num_distinct  # type: ignore[misc]


def test_responses_differ_in_long_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ingest, "RESPONSES_PER_FILE", 4)
    found, num_distinct = written(tmp_path / "warc", 10)
    assert len(list((tmp_path / "warc").iterdir())) == 3
    assert [page.url for page in found] == [
        f"{PAGES[number % 3]['url']}#{number}" for number in range(10)
    ]
    assert len({page.content for page in found}) == num_distinct == 10
    for number, page in enumerate(found):
        assert page.charset == "utf-8"
        html = PAGES[number % 3]["content"].decode("latin1" if number % 3 == 0 else "utf-8")
        assert len(page.content.decode()) == len(html)
        for kept in (r"<[^>]*>", r"<script>.*?</script>", r"<!--.*?-->", r"(?<=>)[^<]{1,39}(?=<)"):
            assert re.findall(kept, page.content.decode()) == re.findall(kept, html)
    again, _ = written(tmp_path / "again", 10)
    assert again == found


def test_copies_are_told(tmp_path: Path):
    assert written(tmp_path / "warc", 6, [*PAGES[:2], SHORT])[1] == 5


def test_f1_is_of_tokens_with_their_numbers():
    assert token_f1("One, two two", "one two three three") == pytest.approx(2 * 2 / (3 + 4))
    assert token_f1("", "one") == 0


def test_quality_counts_what_a_text_must_have_and_must_not():
    article = {"name": "a", "text": "one two"}
    mixed = {"name": "b", "with": ["x", "y", "z"], "without": ["u", "v"]}
    pages = {"article-extraction": [article], "trafilatura-eval": [mixed]}
    found = quality({"a": "one two", "b": "x y u"}, pages)
    assert found == pytest.approx(
        {"f1": 1, "f": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "accuracy": 3 / 5, "empty": 0}
    )


def test_a_line_has_the_pages_and_what_became_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "warc"
    written(folder, 8, [*PAGES, SHORT])
    settings = [f"corpus.path={folder}", "corpus.main_text=resiliparse", "corpus.max_words=40"]
    uri = str(tmp_path / "run")
    product = build_run(load_recipe("laptop", settings), uri)
    Run(uri, product.steps[:1]).execute(MeasuredPages(Meter(), 0, None, workers=1))
    line = json.loads(capsys.readouterr().out)
    assert (line["workers"], line["step"], line["num_pages"]) == (1, "passages", 8)
    assert line["pages_per_s"] > 0
    assert line["num_passages"] >= 6
    assert line["rejects"].pop("too short") == 2
    assert sum(line["rejects"].values()) == line["num_duplicates"]
