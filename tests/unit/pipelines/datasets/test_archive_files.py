"""Web archives that others have made, some broken on purpose: each gives what is known of it."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from cluster.errors import Reject
from cluster.storage import open_storage
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document, Page
from pipelines.datasets.pages.main_text import document_of
from pipelines.datasets.sources.arc import arc_pages
from pipelines.datasets.sources.streams import Source
from pipelines.datasets.sources.warc import warc_pages

WARCS = Path(os.environ.get("TOKAY_DATA", "nowhere"), "web", "warc")
pytestmark = pytest.mark.skipif(not WARCS.is_dir(), reason="TOKAY_DATA names no public data")

# What may hold a page. Of all other kinds as many are passed over as there are.
PAGES = ("response", "resource", "conversion")
# Files whose records the list does not count: ARC, and one that is packed as a whole.
UNLISTED = {
    "warcio__bad.arc": {"arc_header": 1, "response": 3},
    "warcio__example-bad.warc.gz.bad": {"warcinfo": 1, "request": 2, "response": 2, "revisit": 1},
    "warcio__example-space-in-url.arc": {"arc_header": 1, "response": 1},
    "warcio__example.arc": {"arc_header": 1, "response": 1},
    "warcio__example.arc.gz": {"arc_header": 1, "response": 1},
}
# Between two records of this file there are bytes that belong to none.
BETWEEN = {"warcio__example-trunc.warc": ["broken record of an archive: Invalid WARC header"]}
REJECTS = BETWEEN | {
    "warcio__bad.arc": [
        "a record that ends early (response)",  # of -1 bytes
        "no status line in an answer of a web server",
        "a record that ends early (response)",  # of abc bytes
    ],
    "warcio__example-space-in-url.arc": ["a record that ends early (response)"],
    "aut__example.warc.gz": ["no main text"],
}
# One, but of these: nothing but requests, metadata, an image or JSON, or what is refused above.
NUM_DOCUMENTS = {
    "aut__example.warc.gz": 93,
    "warcio__bad.arc": 0,
    "warcio__example-digest.warc": 0,
    "warcio__example-space-in-target-uri.warc.gz": 0,
    "warcio__example-space-in-url.arc": 0,
    "warcio__post-test.warc.gz": 0,
    "whirlwind-python__whirlwind.warc.wat.gz": 0,
}


def listed() -> list[dict]:
    lines = (WARCS / "files.jsonl").read_text().splitlines() if WARCS.is_dir() else []
    return [json.loads(line) for line in lines]


def documents(file: str, folder: Path) -> tuple[list[Document | Reject], Counter[str]]:
    """Returns what a file gives, under a name that is read, and what was passed over."""
    is_arc, is_packed = ".arc" in file, ".gz" in file
    name = f"x{'.arc' if is_arc else '.warc'}{'.gz' * is_packed}"
    (folder / name).symlink_to(WARCS / file)
    source = Source(storage=open_storage(folder), path=name)
    items = arc_pages(source) if is_arc else warc_pages(source)
    return [
        document_of(item, "resiliparse") if isinstance(item, Page) else item for item in items
    ], source.passed_over


@pytest.mark.parametrize("facts", listed(), ids=lambda facts: facts["file"])
def test_each_record_is_a_text_a_reject_or_passed_over(facts: dict, tmp_path: Path) -> None:
    file = facts["file"]
    kinds = Counter(facts["types"] or UNLISTED[file])
    found, passed_over = documents(file, tmp_path)
    texts = [each for each in found if isinstance(each, Document)]
    assert [each[1] for each in found if isinstance(each, tuple)] == REJECTS.get(file, [])
    assert len(texts) == NUM_DOCUMENTS.get(file, 1)
    assert all(text.text.strip() and text.url for text in texts)
    num_pages = sum(kinds.pop(kind, 0) for kind in PAGES)
    assert {kind: passed_over.pop(kind) for kind in kinds} == kinds
    assert all("/" in kind or kind.startswith("HTTP status") for kind in passed_over)
    assert len(found) - len(BETWEEN.get(file, [])) + passed_over.total() == num_pages


def test_what_is_read_of_the_folder_goes_by_the_names() -> None:
    include = ("*.warc*", "*.arc*")
    corpus = Corpus(CorpusConfig(path=str(WARCS), include=include))
    assert set(corpus.files) | {
        "warcio__example-bad.warc.gz.bad",
        "whirlwind-python__whirlwind.warc.wat.gz",
        "warcio__example.arc.gz",  # beside the plain file
        "warcio__example.warc.gz",
    } == {facts["file"] for facts in listed()}
    assert corpus.passed_over == {".bad": 1, ".wat": 1, ".arc": 1, ".warc": 1}
