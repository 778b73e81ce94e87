"""Rows of JSON, CSV, Parquet and Arrow, through the corpus that reads them."""

import bz2
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from cluster.errors import Reject, UserError
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document
from pipelines.datasets.sources import columns, csv_rows, json_rows, parquet, streams

ROWS = [{"id": "a", "text": 'one, "two"\n[three]'}, {"id": "b", "text": "four \\ }"}]
DOCUMENTS = [Document(name=row["id"], title="", text=row["text"]) for row in ROWS]


def documents(path: Path, **config: object) -> list[Document | Reject]:
    return list(Corpus(CorpusConfig(path=str(path), **config)).documents())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        "\ufeff " + json.dumps(ROWS, indent=2),
        "\n".join(json.dumps(row) for row in ROWS),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "".join(json.dumps(row) for row in ROWS),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_json_is_an_array_or_values_one_after_another(
    tmp_path: Path, content: str, chunk: int
) -> None:
    class Slow:
        def __init__(self, left: bytes) -> None:
            self.left = left

        def read(self, _: int) -> bytes:
            part, self.left = self.left[:chunk], self.left[chunk:]
            return part

    (tmp_path / "x.json").write_text(content)
    assert documents(tmp_path) == DOCUMENTS
    in_array = content.lstrip("\ufeff ").startswith("[")
    values = json_rows._values(Slow(content.encode()), in_array)  # type: ignore[arg-type]
    assert [json.loads(value) for value in values if value] == ROWS


def test_broken_value_of_an_array_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"text": 1x}, {"text": "two"}, [], {"text": "three"')
    broken, two, none, cut_short = documents(tmp_path)
    assert broken[:2] == ("x.json:1", "malformed JSON")  # type: ignore[index]
    assert two == Document(name="x.json:2", title="", text="two")
    assert none[:2] == ("x.json:3", "not a JSON object")  # type: ignore[index]
    assert cut_short[:2] == ("x.json:4", "malformed JSON")  # type: ignore[index]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv"])
def test_row_beyond_the_limit_is_a_reject_and_the_rest_goes_on(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (streams, json_rows, csv_rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 17)
    rows = [
        {"id": "a", "text": "x"},
        {"id": "l", "text": "y" * (1 << 18)},
        {"id": "b", "text": "z"},
    ]
    lines = [json.dumps(row) for row in rows]
    content = {
        "x.json": f"[{','.join(lines)}]",
        "x.jsonl": "\n".join(lines),
        "x.csv": "\n".join(["id,text", *(f"{row['id']},{row['text']}" for row in rows)]),
    }
    (tmp_path / name).write_text(content[name])
    first, long, last = documents(tmp_path)
    assert (first, last) == tuple(
        Document(name=row["id"], title="", text=row["text"]) for row in (rows[0], rows[2])
    )
    assert long[0] == ("x.csv:3" if name == "x.csv" else f"{name}:2")  # type: ignore[index]
    assert "of more than" in long[1]  # type: ignore[index]


def test_csv_has_quotes_and_tsv_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufeffid,text,url\n1,"a, ""b""\nc",http://x.org\n2,d\n\n')
    (tmp_path / "b.csv").write_text("id;text\n3;e, f\n")
    (tmp_path / "c.tsv.bz2").write_bytes(bz2.compress(b'id\ttext\n4\t"g\n5\tcaf\xe9\n6\th\n'))
    assert documents(tmp_path) == [
        Document(name="1", title="", text='a, "b"\nc', url="http://x.org"),
        ("a.csv:4", "not 3 columns", "['2', 'd']"),
        Document(name="3", title="", text="e, f"),
        Document(name="4", title="", text='"g'),
        ("c.tsv.bz2:3", "not UTF-8", "['5', 'caf\\udce9']"),
        Document(name="6", title="", text="h"),
    ]


def test_quote_that_is_never_closed_costs_no_more_than_a_row_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_rows, "MAX_ROW_BYTES", 1 << 10)
    lines = ["id,text", 'a,"never closed', *(f"{number},fine" for number in range(200))]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    broken, *rest = documents(tmp_path)
    assert broken[1] == "malformed CSV (a row of more than 16 MiB)"  # type: ignore[index]
    assert 50 < len(rest) < 199 and rest[-1] == Document(name="199", title="", text="fine")


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".parquet.zst"])
def test_nested_fields_are_named_with_dots(tmp_path: Path, ending: str) -> None:
    table = pa.table(
        {
            "meta": [{"url": "http://a", "page": {"t": "A"}}, None],
            "body": [{"text": "one"}, {"text": "two"}],
            "a.b": ["x", "y"],
        }
    )
    config = {"text_field": "body.text", "title_field": "meta.page.t", "url_field": "meta.url"}
    write(table, tmp_path / f"x{ending}")
    found = [
        Document(name="x", title="A", text="one", url="http://a"),
        Document(name="y", title="", text="two"),
    ]
    assert documents(tmp_path, id_field="a.b", **config) == found
    (tmp_path / f"x{ending}").unlink()
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))
    assert documents(tmp_path, id_field="a.b", **config) == found
    with pytest.raises(UserError, match=r"'body\.txt'"):
        documents(tmp_path, text_field="body.txt")


def write(table: pa.Table, path: Path) -> None:
    if path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        return
    pq.write_table(table, path)
    if path.suffix == ".zst":
        path.write_bytes(zstd.compress(path.read_bytes()))


def test_folders_of_hugging_face_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"id": str(n), "text": f"row {n}"} for n in range(5)])
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(rows.data.table, tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: mit\n---")
    for folder in ("saved", "hub"):
        found = documents(tmp_path / folder)
        assert found == [Document(name=str(n), title="", text=f"row {n}") for n in range(5)]
    with pa.ipc.new_file(tmp_path / "f.arrow", rows.data.table.schema) as writer:
        writer.write_table(rows.data.table)
    assert len(documents(tmp_path / "f.arrow")) == 5


def test_text_of_a_parquet_bomb_is_never_written_out(tmp_path: Path) -> None:
    text = "a" * (1 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), [text])
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 5000
    before = pa.default_memory_pool()
    *rows, bomb = documents(tmp_path)
    assert bomb == ("x.parquet:49", "unpacks to more than 200 times its size", "")
    assert len(rows) == 64 - 16 and before.max_memory() < 256 << 20


def test_parquet_chunk_that_unpacks_to_a_thousand_times_its_size_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "FREE_BYTES", 1 << 16)
    table = pa.table({"text": ["a" * (1 << 20)] * 4})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    assert documents(tmp_path) == [("x.parquet:1", "unpacks to more than 200 times its size", "")]


def test_parquet_row_beyond_the_limit_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "MAX_ROW_BYTES", 1 << 10)
    table = pa.table({"text": ["a", "b" * 2000, None, "c" * 600, "d" * 600]})
    pq.write_table(table, tmp_path / "x.parquet")
    found = documents(tmp_path)
    assert [d.text[0] for d in found if isinstance(d, Document)] == ["a", "c", "d"]
    assert [d[:2] for d in found if isinstance(d, tuple)] == [
        ("x.parquet:2", "a row of more than 16 MiB"),
        ("x.parquet:3", "no text in field 'text'"),
    ]


class _Code(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.code")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: object, serialized: bytes) -> "_Code":
        raise AssertionError("code ran")


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_extension_types_are_refused_before_their_code_runs(tmp_path: Path, ending: str) -> None:
    column = pa.ExtensionArray.from_storage(_Code(), pa.array(["x"]))
    write(pa.table({"text": column}), tmp_path / f"x{ending}")
    (tmp_path / "y.jsonl").write_text('{"text": "goes on"}')
    pa.register_extension_type(_Code())
    try:
        refused, fine = documents(tmp_path)
    finally:
        pa.unregister_extension_type("tests.code")
    assert "extension type" in refused[1] and isinstance(fine, Document)  # type: ignore[index]


@pytest.mark.parametrize(
    ("ending", "spoil"),
    [
        (".parquet", lambda content: content[:-5]),
        (".parquet", lambda content: b"PAR0"),
        (".parquet", lambda content: b""),
        (".arrow", lambda content: content[: len(content) // 2]),
        (".arrow", lambda content: b"ARROW1"),
        (".arrow", lambda content: b""),
    ],
)
def test_broken_files_are_rejects_and_the_rest_goes_on(
    tmp_path: Path, ending: str, spoil: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"x{ending}"
    write(pa.table({"text": ["one", "two"]}), path)
    path.write_bytes(spoil(path.read_bytes()))
    (tmp_path / "y.jsonl").write_text('{"text": "goes on"}')
    *_, broken, fine = documents(tmp_path)
    assert broken[0] == f"x{ending}" and "not a readable" in broken[1]  # type: ignore[index]
    assert isinstance(fine, Document)


def test_arrow_text_that_is_not_utf8_is_a_reject(tmp_path: Path) -> None:
    text = pa.array([b"caf\xe9", b"b"]).view(pa.string())
    for name, column in (("a", text), ("b", text.dictionary_encode())):
        write(pa.table({"text": column}), tmp_path / f"{name}.arrow")
    bad, good, bad_too, good_too = documents(tmp_path)
    assert bad[1] == bad_too[1] == "not UTF-8"  # type: ignore[index]
    assert good.text == good_too.text == "b"  # type: ignore[union-attr]


def test_long_text_is_cut_into_documents_where_lines_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.datasets.sources import text

    for module in (text, streams):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 10)
    (tmp_path / "x.txt").write_text("one\ntwo\nthree\n" + "l" * 20 + "\nfour\n")
    assert documents(tmp_path) == [
        Document(name="x.txt", title="x", text="one\ntwo\n"),
        ("x.txt:4", "a line of more than 0 MiB", ""),
        Document(name="x.txt:3", title="x", text="three\n"),
        Document(name="x.txt:5", title="x", text="four\n"),
    ]
