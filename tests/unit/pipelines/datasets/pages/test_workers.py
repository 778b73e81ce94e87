"""Pages through the processes that read them, those that end a process among them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import Reject
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document, Page
from pipelines.datasets.pages.workers import PageWorkers

PARAGRAPH = (
    "The harbour office opens at seven in the morning and closes after the last ferry has left"
    " for the islands, which in winter is earlier than the timetable says. "
)
ARTICLE = f"""<!doctype html><html lang="en-GB"><head><title>The harbour - Coast Weekly</title>
<meta property="og:title" content="The harbour"><link rel="canonical" href="http://coast.org/h">
<meta property="article:published_time" content="2019-05-06T10:00:00Z"></head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/a">About us</a></li></ul></nav>
<article><h1>The harbour</h1><p>{PARAGRAPH * 2}</p>
<h2>In winter</h2><p>{PARAGRAPH * 3}</p></article>
<footer>All rights reserved by the Coast Weekly publishing house</footer></body></html>"""


def page(name: str, html: str = ARTICLE) -> Page:
    return Page(
        name=name, content=html.encode(), url=f"http://x.org/{name}", crawl_date="2020-01-02"
    )


class _Kills(Page):
    """Stands for one that overflows the stack of a library."""

    def __getattribute__(self, name: str) -> object:
        return os.abort() if name == "codings" else super().__getattribute__(name)


class _Fills(Page):
    def __getattribute__(self, name: str) -> object:
        return bytes(3 << 30) if name == "codings" else super().__getattribute__(name)


def read(items: list[Page | Document | Reject], main_text: str = "trafilatura") -> list[object]:
    with PageWorkers(main_text) as pages:  # type: ignore[arg-type]
        return list(pages.documents(items))


@pytest.mark.parametrize("main_text", ["trafilatura", "resiliparse"])
def test_main_text_comes_with_what_is_known_of_its_page(main_text: str) -> None:
    (found,) = read([page("a")], main_text)
    assert isinstance(found, Document)
    assert "harbour office opens" in found.text and "rights reserved" not in found.text
    assert "About us" not in found.text and found.text.count("\n\n") >= 2
    assert (found.name, found.url, found.language) == ("a", "http://x.org/a", "en")
    assert found.headings[-1] == "In winter"
    if main_text == "trafilatura":
        assert (found.title, found.date) == ("The harbour", "2019-05-06")


def test_items_keep_their_order_and_what_is_no_page_passes() -> None:
    text, reject = Document(name="t", title="", text="x"), ("r", "why", "")
    empty = page("e", "<html><body></body></html>")
    items = [reject, page("a"), text, empty, *(page(str(number)) for number in range(5)), reject]
    found = read(items)
    names = [each.name if isinstance(each, Document) else each[0] for each in found]  # type: ignore[index]
    assert names == ["r", "a", "t", "e", *"01234", "r"]
    assert found[3][1] == "no main text"  # type: ignore[index]


def test_page_that_never_ends_costs_itself_alone() -> None:
    """20,000 elements within one another: resiliparse works on them for minutes."""
    deep = page("deep", "<div>" * 20_000 + "x" + "</div>" * 20_000)
    with PageWorkers("resiliparse", max_page_s=1) as pages:
        first, found, last = pages.documents([page("a"), deep, page("b")])
    assert found == ("deep", "took longer than 1 s", "")
    assert [each.name for each in (first, last)] == ["a", "b"]  # type: ignore[union-attr]


def test_process_that_was_killed_is_replaced_and_costs_no_page() -> None:
    with PageWorkers("resiliparse") as pages:

        def items() -> Iterator[Page]:
            yield page("a")
            for worker in pages._workers:
                worker._process.kill()
            yield from map(page, "bcd")

        found = list(pages.documents(items()))
    assert [each.name for each in found] == list("abcd")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("page_of", "reason"),
    [(_Kills, "ended the process that read it (SIGABRT)"), (_Fills, "took more memory than 2 GiB")],
)
def test_page_that_ends_its_process_or_fills_the_memory_is_a_reject(
    page_of: type[Page], reason: str
) -> None:
    bad = page_of(name="bad", content=b"")
    with PageWorkers("resiliparse") as pages:
        found, fine = pages.documents([bad, page("a")])
    assert found == ("bad", reason, "") and fine.name == "a"  # type: ignore[union-attr]


def test_html_in_files_and_in_fields_is_read(tmp_path: Path) -> None:
    import json

    (tmp_path / "page.HTM").write_text(ARTICLE)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(
            json.dumps(row)
            for row in ({"id": "r", "raw": {"html": ARTICLE}, "title": "Mine"}, {"id": "n"})
        )
    )
    config = CorpusConfig(path=str(tmp_path), html_field="raw.html", main_text="resiliparse")
    file, row, none = Corpus(config).documents()
    assert isinstance(file, Document) and isinstance(row, Document)
    assert (file.name, file.url, row.name, row.title) == ("page.HTM", None, "r", "Mine")
    assert file.text == row.text
    assert none[:2] == ("n", "no text in field 'raw.html'")  # type: ignore[index]


def test_processes_end_with_an_iterator_that_is_left(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.html").write_text(ARTICLE)
    from multiprocessing import active_children

    documents = Corpus(CorpusConfig(path=str(tmp_path), main_text="resiliparse")).documents()
    next(documents)
    assert active_children()
    documents.close()  # type: ignore[attr-defined]
    assert not active_children()
