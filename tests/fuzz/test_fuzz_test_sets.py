"""Test sets and labelled sets that hold anything at all: a reader reads them, or says why not.

How many examples are tried is the profile's to say: see `conftest.py`.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from pipelines.datasets.beir import read_beir
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.folders import KINDS, read_folder
from pipelines.datasets.labelled_examples import Reading, read_examples
from pipelines.datasets.labelled_sets import FIELDS, LabelledSet
from pipelines.datasets.qrels import MAX_SCORE, read_qrels

WORDS = st.sampled_from(
    ["q1", "p1", "0", "Q0", "1", "-1", "1.0", "1,0", "nan", "9" * 30, "x\0", ""]
)
CELLS = WORDS | st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)
BLANKS = st.sampled_from(["\t", " ", "  ", "\t\t", "\u2028", "\x0c"])
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", ""])


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """Draws lines of cells, as people and programs write them and as they do not."""
    lines = draw(st.lists(st.lists(CELLS, max_size=5), max_size=4))
    blank, end = draw(BLANKS), draw(ENDS)
    text = end.join(blank.join(line) for line in lines)
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode("utf-8", "surrogatepass")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = ("_id", "title", *sorted({name for names in FIELDS.values() for name in names}))
ROWS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=len(NAMES))
GOOD = st.builds(lambda word: dict.fromkeys(NAMES, word), WORDS)


@st.composite
def lines_of_json(draw: st.DrawFn) -> bytes:
    """Draws lines of JSON, some of them broken."""
    values = draw(st.lists(GOOD | ROWS | VALUES, max_size=3))
    ascii_only = draw(st.booleans())
    text = draw(ENDS).join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
    cut = draw(st.integers(0, 2 * len(text)))
    return text[:cut].encode("utf-8", "surrogatepass")


def refused(error: UserError) -> bool:
    return error.exit_code == 2 and "\n" not in str(error)


@given(st.binary(max_size=200) | tables())
def test_fuzz_qrels_give_scores_in_range_or_rejects(content: bytes) -> None:
    found = read_qrels(content.splitlines(keepends=True), "q.tsv")
    for (query, passage), (score, where) in found.judgements.items():
        assert 0 <= score <= MAX_SCORE
        assert query and passage and where.startswith("q.tsv:")
    for where, reason, _ in found.rejects:
        assert where.startswith("q.tsv:") and reason
    num_lines = sum(1 for line in content.splitlines() if line.strip())
    assert len(found.judgements) + len(found.rejects) + found.num_repeated <= num_lines + 1


FILES = {
    "retrieval": ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"),
    "sts": ("test.tsv",),
    "pairs": ("test.tsv",),
    "classification": ("train.jsonl", "test.jsonl"),
    "clustering": ("test.jsonl",),
    "rerank": ("test.jsonl",),
}


@given(st.data(), st.sampled_from(sorted(KINDS)))
def test_fuzz_test_set_is_read_or_refused_in_one_line(data: st.DataObject, kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "qrels").mkdir()
        for file in FILES[kind]:
            (folder / file).write_bytes(
                data.draw(tables() if file.endswith(".tsv") else lines_of_json())
            )
        try:
            found = read_folder(kind, folder)
        except UserError as error:
            assert refused(error)
        else:
            assert found.counts and all(size > 0 for size in found.counts.values())
            assert found.revision() and found.num_texts


IDS = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.tuples(IDS, IDS, st.integers(-3, 3)), max_size=8))
def test_fuzz_judgements_are_each_counted_once(rows: list[tuple[str, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "qrels").mkdir()
        texts = "".join(json.dumps({"_id": id_, "text": f"of {id_}"}) + "\n" for id_ in "abc")
        for file in ("corpus.jsonl", "queries.jsonl"):
            (folder / file).write_text(texts)
        (folder / "qrels/test.tsv").write_text("".join(f"{q}\t{p}\t{s}\n" for q, p, s in rows))
        wanted: dict[tuple[str, str], set[int]] = {}
        for query, passage, score in rows:
            wanted.setdefault((query, passage), set()).add(max(0, score))
        try:
            found = read_beir(folder).qrels
        except UserError as error:
            disputed = any(len(scores) > 1 for scores in wanted.values())
            assert refused(error)
            assert disputed or not any(max(scores) for scores in wanted.values())
        else:
            relevant = {query for (query, _), scores in wanted.items() if max(scores)}
            assert found.keys() == relevant
            assert {
                (query, passage): {score}
                for query, judged in found.items()
                for passage, score in judged.items()
            } == {pair: scores for pair, scores in wanted.items() if pair[0] in relevant}


def examples_of(kind: str, path: Path) -> None:
    reading = Reading(decontamination=NOTHING)
    labelled = LabelledSet.model_validate({"name": "a", "path": str(path), "kind": kind})
    try:
        for example in read_examples(labelled, reading):
            assert example.query.strip() and example.positive.text.strip()
    except UserError as error:
        assert refused(error)
    for where, reason, text in reading.rejects:
        assert where and reason and isinstance(text, str)
    assert len(reading.rejects) <= reading.num_rows


NOTHING = Decontamination([])
KINDS_OF_ROWS = st.sampled_from(sorted(FIELDS.keys() - {"retrieval", "bitext"}))


@given(st.binary(max_size=200) | lines_of_json() | tables(), KINDS_OF_ROWS, st.booleans())
def test_fuzz_labelled_file_gives_examples_or_rejects(
    content: bytes, kind: str, is_tsv: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / ("set.tsv" if is_tsv else "set.jsonl")
        header = "\t".join(FIELDS[kind]).encode() + b"\n" if is_tsv else b""
        path.write_bytes(header + content)
        examples_of(kind, path)


@given(tables(), lines_of_json(), lines_of_json())
def test_fuzz_labelled_beir_folder_gives_examples_or_rejects(
    qrels: bytes, queries: bytes, corpus: bytes
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "qrels").mkdir()
        (folder / "qrels/train.tsv").write_bytes(qrels)
        (folder / "queries.jsonl").write_bytes(queries)
        (folder / "corpus.jsonl").write_bytes(corpus)
        examples_of("retrieval", folder)


COLUMNS: st.SearchStrategy[Any] = st.one_of(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=2, max_size=2),
    st.lists(st.binary(max_size=6), min_size=2, max_size=2),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2),
    st.lists(st.floats(allow_nan=False) | st.just(math.nan), min_size=2, max_size=2),
    st.lists(st.datetimes(), min_size=2, max_size=2),
    st.lists(st.lists(st.binary(max_size=3), max_size=2), min_size=2, max_size=2),
    st.lists(st.none(), min_size=2, max_size=2),
    st.lists(st.fixed_dictionaries({"a": st.booleans()}), min_size=2, max_size=2),
)


@given(st.data(), KINDS_OF_ROWS)
def test_fuzz_labelled_parquet_gives_examples_or_rejects(data: st.DataObject, kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "set.parquet"
        pq.write_table(pa.table({field: data.draw(COLUMNS) for field in FIELDS[kind]}), path)
        content = path.read_bytes()
        broken = data.draw(st.integers(0, 3)) == 0
        place = data.draw(st.integers(0, len(content) - 1)) if broken else 0
        if broken:
            path.write_bytes(
                content[:place] + data.draw(st.binary(max_size=4)) + content[place + 1 :]
            )
        examples_of(kind, path)
