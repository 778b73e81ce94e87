"""Reading folders of every kind, and what is said when something is wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from pipelines.datasets.folders import read_folder


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path.parent


PAIRS = ("score\tsentence1\tsentence2", '4.5\tA "cat".\tKitten', "0\tü\tfar")


def test_folder_of_pairs_is_read(tmp_path: Path) -> None:
    for kind, lines in (("sts", PAIRS), ("sts", PAIRS[1:])):
        data = read_folder(kind, write(tmp_path / "test.tsv", *lines))
        assert (data.name, data.kind, data.split) == (tmp_path.name, "sts", "test")
        assert data.columns["test"] == {  # type: ignore[union-attr]
            "score": [4.5, 0.0],
            "sentence1": ['A "cat".', "ü"],
            "sentence2": ["Kitten", "far"],
        }
        assert data.counts == {"num_pairs": 2}
        assert set(data.judged_texts()) == {'A "cat".', "ü", "Kitten", "far"}


def test_folder_of_labels_is_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 2})
    write(tmp_path / "dev.jsonl", {"text": "c", "label": 2})
    data = read_folder("classification", tmp_path, "dev")
    assert data.columns == {  # type: ignore[union-attr]
        "train": {"text": ["a", "b"], "label": ["1", "2"]},
        "dev": {"text": ["c"], "label": ["2"]},
    }
    assert data.judged_texts() == ["c"]
    write(tmp_path / "all.jsonl", *[{"text": text, "label": text in "cd"} for text in "acd"])
    assert read_folder("clustering", tmp_path, "all").columns == {  # type: ignore[union-attr]
        "all": {"text": ["a", "c", "d"], "label": ["False", "True", "True"]}
    }


def test_folder_that_is_packed_is_read(tmp_path: Path) -> None:
    packed = gzip.compress("\n".join(PAIRS).encode())
    (tmp_path / "test.tsv.gz").write_bytes(packed)
    assert read_folder("sts", tmp_path).counts == {"num_pairs": 2}
    (tmp_path / "test.tsv.gz").write_bytes(packed[:-9])
    with pytest.raises(UserError, match=r"test\.tsv\.gz cannot be unpacked"):
        read_folder("sts", tmp_path)
    with pytest.raises(UserError, match="it has the splits test"):
        read_folder("sts", tmp_path, "dev")


def test_classifier_is_not_asked_for_a_label_that_training_lacks(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 2})
    write(tmp_path / "test.jsonl", {"text": "c", "label": 2}, {"text": "d", "label": "zzz"})
    with pytest.raises(UserError, match="label 'zzz' of split 'test' is not in split 'train'"):
        read_folder("classification", tmp_path)


def test_classifier_needs_two_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 1})
    with pytest.raises(UserError, match="split 'train' has one label alone; give at least two"):
        read_folder("classification", tmp_path)


def test_folder_of_candidates_is_read_without_queries_that_rank_nothing(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "test.jsonl",
        {"query": "q", "positive": ["good", "fine"], "negative": ["bad"]},
        {"query": "all good", "positive": ["good"], "negative": []},
    )
    data = read_folder("rerank", folder)
    assert data.kind == "rerank"
    assert list(data.queries.values()) == ["q"]  # type: ignore[union-attr]
    (rated,) = data.qrels.values()  # type: ignore[union-attr]
    passages = data.passages  # type: ignore[union-attr]
    assert {passages[id_].text: relevance for id_, relevance in rated.items()} == {
        "good": 1,
        "fine": 1,
        "bad": 0,
    }
    assert list(data.candidates.values()) == [list(rated)]  # type: ignore[union-attr]
    assert data.notes == ("1 queries without a positive or a negative are left out",)


@pytest.mark.parametrize(
    ("kind", "file", "rows", "expected"),
    [
        ("sts", "test.tsv", [PAIRS[0], "1 a b"], "test.tsv:2: '1 a b' is not score"),
        ("sts", "test.tsv", [PAIRS[0], "high\ta\tb"], "test.tsv:2: 'high"),
        ("sts", "test.tsv", [PAIRS[0]], "split 'test' is empty"),
        ("sts", "test.tsv", ["4,5\ta\tb", *PAIRS[1:]], "test.tsv:1: '4,5\\ta\\tb' is not score"),
        ("sts", "test.tsv", ["nan\ta\tb", *PAIRS[1:]], "test.tsv:1: 'nan\\ta\\tb' is not score"),
        ("sts", "test.tsv", ["1e999\ta\tb", *PAIRS[1:]], "test.tsv:1: '1e999"),
        ("pairs", "test.tsv", [PAIRS[2]], "give at least one pair of score 1"),
        ("pairs", "test.tsv", ["1\ta\tb"], "give at least one pair of score 0"),
        (
            "clustering",
            "test.jsonl",
            [{"text": "a", "label": 1}, {"text": "b", "label": 1}],
            "split 'test' has one label alone; give at least two",
        ),
        (
            "clustering",
            "test.jsonl",
            [{"text": "a", "label": 1}, {"text": "b", "label": 2}],
            "each text of split 'test' has a label of its own",
        ),
        ("sts", "test.tsv", [PAIRS[1], PAIRS[1]], "split 'test' has one score alone"),
        (
            "clustering",
            "test.jsonl",
            ['{"text": "\\ud83d"}'],
            "test.jsonl:1: half of a surrogate pair",
        ),
        ("pairs", "test.tsv", [PAIRS[1]], "test.tsv:1: score 4.5: a pair's is 0 or 1"),
        ("clustering", "test.jsonl", ["{"], "test.jsonl:1: malformed JSON"),
        ("clustering", "test.jsonl", [{"text": "a"}], 'test.jsonl:1: write {"text"'),
        ("classification", "test.jsonl", [{"text": "a", "label": "b"}], "no train.jsonl"),
        ("rerank", "test.jsonl", [{"query": "a", "positive": "b"}], 'test.jsonl:1: write {"query"'),
        ("rerank", "test.jsonl", [], "has no passages"),
        ("sts", "dev.tsv", [PAIRS[1]], "no test.tsv: it has the splits dev"),
        ("pictures", "test.tsv", [], "accepted are retrieval, sts, pairs"),
    ],
)
def test_folder_with_a_mistake_names_file_line_and_what_to_do(
    tmp_path: Path, kind: str, file: str, rows: list[Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_folder(kind, write(tmp_path / file, *rows))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sts folder .*nowhere does not exist"):
        read_folder("sts", tmp_path / "nowhere")
