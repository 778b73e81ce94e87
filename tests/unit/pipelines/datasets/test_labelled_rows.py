import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.datasets.labelled_rows import read_rows, version
from pipelines.datasets.labelled_sets import LabelledSet


def pairs(path: str | Path, **keys: object) -> LabelledSet:
    return LabelledSet.model_validate({"name": "a", "path": str(path), **keys})


def rows(labelled: LabelledSet) -> list[dict[str, object]]:
    return [{k: v for k, v in row[1].items() if v is not None} for row in read_rows(labelled)]


PAIRS = [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}]


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data set"
    folder.mkdir()
    for split, part in (("train", PAIRS), ("test", PAIRS[:1])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_rows_are_read_from_parquet_and_jsonl(tmp_path: Path, parquet_folder: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, PAIRS)).encode() + b'\n{"query": "\xff"}'
    )
    assert rows(pairs(parquet_folder / "train-00000-of-00001.parquet")) == PAIRS
    *good, bad = read_rows(pairs(tmp_path / "pairs.jsonl"))
    assert [row[1]["query"] for row in good] == ["a", "c"]
    assert bad[:2] == ("pairs.jsonl:4", "not UTF-8")


def test_rows_are_read_from_packed_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, PAIRS)).encode()))
    assert rows(pairs(tmp_path / "a.jsonl.gz")) == PAIRS
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"query\tpositive\na\tb\nc\td\n"))
    assert rows(pairs(tmp_path / "a.tsv.gz")) == PAIRS
    (tmp_path / "a.tsv.gz").write_bytes(b"query\tpositive\na\tb\nc\td\n")
    with pytest.raises(UserError, match=r"a\.tsv\.gz cannot be unpacked"):
        rows(pairs(tmp_path / "a.tsv.gz"))


def test_rows_of_parquet_need_their_own_columns_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    beyond = pa.array([300_000_000_000, 1], pa.timestamp("s"))  # after the year 9999
    texts = pa.array([b"a", b"\xff"], pa.binary())
    pq.write_table(pa.table({"query": texts, "positive": ["b", "d"], "when": beyond}), file)
    good, bad = read_rows(pairs(file))
    assert (good[0], bad[:2]) == ("a.parquet:1", ("a.parquet:2", "not UTF-8"))
    assert (good[1]["query"], good[1]["positive"]) == ("a", "b")
    with pytest.raises(UserError, match=r"column 'when' of a\.parquet holds timestamp"):
        rows(pairs(file, fields={"query": "when"}))


def test_parquet_or_hub_data_set_that_could_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data")
    from ray.data._internal.tensor_extensions.arrow import ArrowPythonObjectArray

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    ran = tmp_path / "ran"

    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (ran,)

    folder = tmp_path / "set"
    folder.mkdir()
    table = pa.table({"query": ["a"], "positive": ["b"]})
    bad = table.append_column("other", ArrowPythonObjectArray.from_objects([Touch()]))
    pq.write_table(bad, folder / "train.parquet")
    for path in (folder / "train.parquet", f"hub:{folder}"):
        with pytest.raises(UserError, match="extension type"):
            rows(pairs(path))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.tar"], "format webdataset; accepted are"),
        (["train.h5"], "format hdf5; accepted are"),
        (["train.jsonl", "README.md: ../secret.jsonl"], "which is not its own"),
        (["train.jsonl", "README.md: ../*.jsonl"], "which is not its own"),
        (["train.jsonl", "README.md: [[["], "cannot be loaded"),
    ],
)
def test_hub_data_set_of_other_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], message: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "secret.jsonl").write_text(json.dumps(PAIRS[0]))
    folder = tmp_path / "set"
    folder.mkdir()
    for file in files:
        name, _, where = file.partition(": ")
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {where}\n---\n"
        (folder / name).write_text(card if where else json.dumps(PAIRS[0]))
    with pytest.raises(UserError, match=message) as caught:
        rows(pairs(f"hub:{folder}"))
    assert "\n" not in str(caught.value)


def test_hub_data_set_gives_the_columns_of_its_kind_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = pa.table({"query": ["a"], "positive": ["b"], "picture": [{"path": "/etc/passwd"}]})
    dataset = datasets.Dataset(table)
    (tmp_path / "set").mkdir()
    dataset.to_parquet(str(tmp_path / "set" / "train.parquet"))
    assert rows(pairs(f"hub:{tmp_path / 'set'}")) == PAIRS[:1]
    with pytest.raises(UserError, match="column 'picture' holds"):
        rows(pairs(f"hub:{tmp_path / 'set'}", fields={"query": "picture"}))


def test_rows_are_read_from_s3(bucket: str) -> None:
    open_storage(bucket).write_bytes("sets/pairs.jsonl", "\n".join(map(json.dumps, PAIRS)).encode())
    assert rows(pairs(f"{bucket}/sets/pairs.jsonl")) == PAIRS


def test_hub_data_set_is_read_by_its_split(
    parquet_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert rows(pairs(f"hub:{parquet_folder}")) == PAIRS
    assert rows(pairs(f"hub:{parquet_folder}::test")) == PAIRS[:1]
    assert rows(pairs(f"hub:{parquet_folder}::train[1:]")) == PAIRS[1:]
    with pytest.raises(UserError, match="cannot be loaded"):
        rows(pairs(f"hub:{parquet_folder}::dev"))
    with pytest.raises(ValueError, match="name the split in `split`, not in hub:a::train"):
        pairs("hub:a::train", kind="retrieval")


def test_hub_labels_are_read_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    labels = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = datasets.Features(
        {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string")}
        | {"label": labels}
    )
    table = {"premise": ["p"] * 3, "hypothesis": ["a", "b", "c"], "label": [2, 0, -1]}
    dataset = datasets.Dataset.from_dict(table, features=features)
    dataset.to_parquet(str(tmp_path / "nli" / "train.parquet"))
    found = [
        row["label"]
        for row in rows(pairs(f"hub:{tmp_path / 'nli'}", kind="nli"))
        if row.get("label")
    ]
    assert found == ["contradiction", "entailment"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "does not exist: correct its path"),
        ("folder", "write hub:"),
        ("a.csv", "is no .jsonl, .ndjson, .tsv, .jsonl.gz, .ndjson.gz, .tsv.gz, .parquet"),
    ],
)
def test_set_that_cannot_be_found_is_named(tmp_path: Path, path: str, message: str) -> None:
    labelled = pairs(tmp_path / path)
    with pytest.raises(UserError, match=message):
        version(labelled)
    with pytest.raises(UserError, match=message):
        rows(labelled)


def test_version_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(PAIRS[0]))
    before = version(pairs(tmp_path / "a.jsonl"))
    assert before == version(pairs(tmp_path / "b.jsonl"))
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIRS[1]))
    assert version(pairs(tmp_path / "a.jsonl")) != before


def test_run_passages_are_for_titles_and_bodies_only() -> None:
    assert pairs("run:passages", kind="title-body").query_task == "search result"
    with pytest.raises(ValueError, match="is for the kind title-body, not pairs"):
        pairs("run:passages")
