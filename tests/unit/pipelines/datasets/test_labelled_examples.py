import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.labelled_examples import Example, Reading, read_examples
from pipelines.datasets.labelled_sets import LabelledSet

Rows = list[Any]


def read(
    path: Path | str, kind: str, judged_by: Sequence[str] = (), **keys: Any
) -> tuple[list[Example], Reading]:
    labelled = LabelledSet.model_validate({"name": "a", "kind": kind, "path": str(path), **keys})
    judge = Decontamination(judged_by)
    reading = Reading(decontamination=judge)
    return list(read_examples(labelled, reading)), reading


def jsonl(tmp_path: Path, rows: Rows) -> Path:
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def triples(examples: list[Example]) -> list[tuple[str, str, list[str]]]:
    return [(e.query, e.positive.text, [text for text, _ in e.negatives]) for e in examples]


def test_pairs_have_none_one_or_several_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "a", "positive": "b"},
        {"query": "c", "positive": "d", "negative": "e"},
        {"query": "f", "positive": "g", "negatives": ["h", "g", "i", "j"]},
    ]
    found, reading = read(jsonl(tmp_path, rows), "pairs", max_negatives=2)
    assert triples(found) == [("a", "b", []), ("c", "d", ["e"]), ("f", "g", ["h", "i"])]
    assert {example.task for example in found} == {"search result"}
    assert reading.num_rows == 3 and not reading.rejects


def test_bitext_pairs_the_lines_of_two_texts(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("a house\nParis\n\nmany words\nx\n")
    (tmp_path / "de.txt").write_bytes("ein Haus\nParis\nnichts\nviele Wörter\n".encode() + b"\xff")
    names = {"sentence1": "en", "sentence2": "de"}
    found, reading = read(tmp_path, "bitext", fields=names)
    assert triples(found) == [("a house", "ein Haus", []), ("many words", "viele Wörter", [])]
    assert {example.task for example in found} == {"semantic similarity"}
    assert reading.left_out == {"equal in both languages": 1}
    assert [(where, why) for where, why, _ in reading.rejects] == [
        ("en.txt:3", "no text in field 'en'"),
        ("en.txt:5", "not UTF-8"),
    ]
    with pytest.raises(UserError, match=r"has no sentence2.txt: correct its path, or name"):
        read(tmp_path, "bitext", fields={"sentence1": "en"})
    (tmp_path / "de.txt").write_text("ein Haus\n")
    with pytest.raises(UserError, match=r"en.txt has 5 lines and de.txt 1: lines of one number"):
        read(tmp_path, "bitext", fields=names)


def test_rows_that_cannot_be_read_are_rejects_with_their_place_and_reason(tmp_path: Path) -> None:
    rows: Rows = [
        {"query": "a", "positive": "b"},
        "{not json",
        "[1]",
        {"query": "a"},
        {"query": " ", "positive": "b"},
        {"query": "a", "positive": "b", "negative": 3},
        '{"query": "a", "positive": "\\ud83d"}',
        '{"query": ' + "[" * 99999,
        '{"query": ' + "9" * 5000 + "}",
        '{"query": NaN, "positive": "b"}',
        '{"query": "a", "positive": "b", "negatives": [NaN]}',
    ]
    found, reading = read(jsonl(tmp_path, rows), "pairs")
    assert len(found) == 1 and reading.num_rows == 11
    assert [(where, why) for where, why, _ in reading.rejects] == [
        ("set.jsonl:2", "malformed JSON"),
        ("set.jsonl:3", "not a JSON object"),
        ("set.jsonl:4", "no text in field 'positive'"),
        ("set.jsonl:5", "no text in field 'query'"),
        ("set.jsonl:6", "negatives are neither a text nor a list of texts"),
        ("set.jsonl:7", "half of a surrogate pair, which is no character"),
        ("set.jsonl:8", "JSON nested too deeply"),
        ("set.jsonl:9", "a whole number of thousands of digits"),
        ("set.jsonl:10", "NaN is no number"),
        ("set.jsonl:11", "NaN is no number"),
    ]


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"question": "a", "answer": "b"}])
    found, _ = read(file, "pairs", fields={"query": "question", "positive": "answer"})
    assert triples(found) == [("a", "b", [])]
    with pytest.raises(ValueError, match="of kind pairs has query, positive, negative, negatives"):
        read(file, "pairs", fields={"questoin": "question"})


def test_nli_triples_are_entailment_and_contradiction_of_one_premise(tmp_path: Path) -> None:
    def row(premise: str, hypothesis: str, label: object) -> dict[str, object]:
        return {"premise": premise, "hypothesis": hypothesis, "label": label}

    rows = [
        row("p", "yes", "entailment"),
        row("q", "of q", "entailment"),
        row("p", "no", "contradiction"),
        row("p", "perhaps", "neutral"),
        row("p", "also", "entailment"),
        row("p", "never", "contradiction"),
        row("p", "also", "entailment"),
        row("r", "no", "contradiction"),
        row("r", "?", "-"),
        row("r", "?", "maybe"),
    ]
    found, reading = read(jsonl(tmp_path, rows), "nli")
    assert triples(found) == [
        ("p", "yes", ["no"]),
        ("p", "also", ["never"]),
        ("q", "of q", []),
    ]
    assert {example.task for example in found} == {"semantic similarity"}
    assert reading.left_out == {
        "label neutral": 1,
        "label -": 1,
        "repeats another row": 1,
        "contradiction of a premise without entailment": 1,
    }
    assert [why for _, why, _ in reading.rejects] == [
        "label is none of entailment, neutral, contradiction, not_entailment, -"
    ]


@pytest.mark.parametrize("kind", ["classification", "clustering"])
def test_classes_give_a_text_of_its_label_and_texts_of_others(tmp_path: Path, kind: str) -> None:
    labels = {f"{label}{n}": label for label in "abc" for n in range(5)} | {"lone": "d"}
    rows = [{"text": text, "label": label} for text, label in labels.items()]
    rows += [{"text": "a0", "label": "a"}, {"text": "no label"}]
    found, reading = read(jsonl(tmp_path, rows), kind, max_negatives=3)
    assert [example.query for example in found] == [text for text in labels if text != "lone"]
    for query, positive, negatives in triples(found):
        assert labels[positive] == labels[query] and positive != query
        assert len(set(negatives)) == 3
        assert all(labels[negative] != labels[query] for negative in negatives)
    assert len({example.unique_id for example in found}) == len(found) and found[0].unique_id
    assert {labels[text] for _, _, texts in triples(found) for text in texts} == set("abcd")
    assert reading.left_out == {
        "no other text of its label": 1,
        "repeats another text of its label": 1,
    }
    assert [why for _, why, _ in reading.rejects] == ["label is neither a text nor a whole number"]
    assert found == read(tmp_path / "set.jsonl", kind, max_negatives=3)[0]


def test_contaminated_text_is_taken_out_before_it_is_anybodys_negative(tmp_path: Path) -> None:
    rows = [{"text": f"{label} {n}", "label": label} for label in "ab" for n in range(4)]
    found, reading = read(jsonl(tmp_path, rows), "classification", ["a 2?", "B 0"])
    assert [example.query for example in found] == ["a 0", "a 1", "a 3", "b 1", "b 2", "b 3"]
    assert not {"a 2", "b 0"} & {text for row in triples(found) for text in (row[1], *row[2])}
    assert reading.decontaminated == {"repeats an evaluation query": 2}
    assert reading.contaminated == [("a 2", "a 2?"), ("b 0", "B 0")]


def test_classes_of_one_label_are_a_mistake(tmp_path: Path) -> None:
    rows = [{"text": text, "label": 1} for text in "abc"]
    with pytest.raises(UserError, match="label '1' alone"):
        read(jsonl(tmp_path, rows), "classification")


def test_sts_pairs_of_a_high_score_are_positive(tmp_path: Path) -> None:
    lines = [
        "score\tsentence1\tsentence2",
        '4.5\tsay "so\tit is so',
        "3.9\tc\td",
        "x\te\tf",
        "5\tg",
        "4,5\te\tf",
        "nan\te\tf",
        "1e999\te\tf",
        '5\t"one\u2028line"\t\x0cand its end',
    ]
    (tmp_path / "set.tsv").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    found, reading = read(tmp_path / "set.tsv", "sts")
    # Lines end at \\n alone, and quotes are characters like others.
    assert triples(found) == [
        ('say "so', "it is so", []),
        ('"one\u2028line"', "and its end", []),
    ]
    assert reading.left_out == {"score below 4": 1}
    none = "score is no number"
    assert [why for _, why, _ in reading.rejects] == [none, "not 3 columns", none, none, none]
    assert len(read(tmp_path / "set.tsv", "sts", min_score=3)[0]) == 3


@pytest.mark.parametrize("score", [10**400, "1_0", None, [1], float("nan"), float("inf")])
def test_sts_score_that_is_no_number_is_a_reject(tmp_path: Path, score: object) -> None:
    rows: Rows = [{"sentence1": "a", "sentence2": "b", "score": score}]
    found, reading = read(jsonl(tmp_path, rows), "sts")
    assert found == []
    assert [why.partition(" is ")[2] for _, why, _ in reading.rejects] == ["no number"]


def test_title_that_is_no_text_is_a_reject(tmp_path: Path) -> None:
    rows: Rows = [{"title": {"a": 1}, "text": "b"}, {"title": None, "text": "b"}]
    found, reading = read(jsonl(tmp_path, rows), "title-body")
    assert found == [] and reading.left_out == {"no title": 1}
    assert [why for _, why, _ in reading.rejects] == ["title is no text"]


def test_retrieval_gives_a_row_for_each_relevant_passage(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    corpus = [
        {"_id": "1", "title": "T", "text": "one"},
        {"_id": "2", "text": "two"},
        {"_id": "3", "text": ""},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "of test"}))
    (tmp_path / "queries_train.jsonl").write_text(json.dumps({"_id": "q", "text": "ask"}))
    lines = ["query-id\tcorpus-id\tscore", "q\t1\t1", "q\t2\t2", "q\t3\t1", "q\t4\t1", "z\t1\t1"]
    lines += ["q\t5\t0", "broken", "q\t2\t2.0", "q\t6\t-1", "q\t7\t1", "q\t7\t2"]
    (tmp_path / "qrels" / "train.tsv").write_text("\n".join(lines))
    found, reading = read(tmp_path, "retrieval")
    assert triples(found) == [("ask", "one", []), ("ask", "two", [])]
    assert found[0].positive.title == "T" and found[0].query_id == found[1].query_id
    assert reading.left_out == {"judged not relevant": 2, "repeats another judgement": 1}
    assert reading.num_rows == 11
    assert Counter(why for _, why, _ in reading.rejects) == {
        "no query, passage and whole-number score": 1,
        "judged twice with different scores": 2,
        "the passage is missing or empty": 2,
        "the query is missing or empty": 1,
    }
    with pytest.raises(UserError, match=r"has no qrels/dev\.tsv"):
        read(tmp_path, "retrieval", split="dev")


def test_rerank_gives_each_positive_another_negative(tmp_path: Path) -> None:
    rows = [
        {"query": "a", "positive": ["b", "c", "d"], "negative": ["x", "y"]},
        {"query": "e", "positive": [], "negative": ["x"]},
        {"query": "f", "positive": ["g"], "negative": []},
    ]
    found, reading = read(jsonl(tmp_path, rows), "rerank")
    assert triples(found) == [
        ("a", "b", ["x"]),
        ("a", "c", ["y"]),
        ("a", "d", ["x"]),
        ("f", "g", []),
    ]
    assert reading.left_out == {"no positive": 1}


def test_multiple_choice_has_the_answer_and_in_turn_each_other_choice(tmp_path: Path) -> None:
    choices = {"a": "one", "b": "two", "c": "three", "d": "four"}
    rows: Rows = [{"query": f"q{n}", "label": "b", **choices} for n in range(3)]
    rows += [
        {"query": "two choices", "label": "b", "a": "no", "b": "yes"},
        {"query": "no such choice", "label": "c", "a": "no", "b": "yes"},
        {"query": "no label", "a": "no", "b": "yes"},
        {"query": "empty choice", "label": "b", "a": " ", "b": "yes"},
    ]
    found, reading = read(jsonl(tmp_path, rows), "multiple-choice")
    assert [(query, positive) for query, positive, _ in triples(found)] == [
        *((f"q{n}", "two") for n in range(3)),
        ("two choices", "yes"),
    ]
    assert {negatives[0] for _, _, negatives in triples(found)[:3]} == {"one", "three", "four"}
    assert {example.task for example in found} == {"question answering"}
    assert [why for _, why, _ in reading.rejects] == [
        "label is none of a, b, c, d",
        "no text in field 'label'",
        "a choice is no text",
    ]


@pytest.mark.parametrize(
    ("config", "names", "id_"),
    [
        ("", ("default/train", "queries/queries", "corpus/corpus"), "_id"),
        (":de", ("de-qrels/train", "de-queries/train", "de-corpus/train"), "id"),
    ],
)
def test_retrieval_set_of_the_hub_is_read_as_a_folder_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    names: tuple[str, ...],
    id_: str,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    qrels: Rows = [
        {"query-id": "q", "corpus-id": "1", "score": 1},
        {"query-id": "q", "corpus-id": "2", "score": 0},
        {"query-id": "q", "corpus-id": "3", "score": 1},
    ]
    queries: Rows = [{id_: "q", "text": "ask"}, {id_: "z", "text": "of another split"}]
    corpus: Rows = [{id_: "1", "title": "T", "text": "one"}, {id_: "2", "title": "", "text": "two"}]
    card = ["---", "configs:"]
    for name, rows in zip(names, (qrels, queries, corpus), strict=True):
        each, split = name.split("/")
        file = tmp_path / "set" / each / f"{split}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(map(json.dumps, rows)))
        card += [f"- config_name: {each}", "  data_files:"]
        card += [f"  - split: {split}", f"    path: {each}/{split}.jsonl"]
        if each == names[0].split("/")[0]:
            card += ["  - split: test", f"    path: {each}/test.jsonl"]
            (file.parent / "test.jsonl").write_text(json.dumps({**qrels[0], "query-id": "z"}))
    (tmp_path / "set" / "README.md").write_text("\n".join([*card, "---", ""]))
    found, reading = read(f"hub:{tmp_path / 'set'}{config}", "retrieval")
    assert triples(found) == [("ask", "one", [])]
    assert found[0].positive.title == "T"
    assert reading.left_out == {"judged not relevant": 1}
    assert [why for _, why, _ in reading.rejects] == ["the passage is missing or empty"]
    found, _ = read(f"hub:{tmp_path / 'set'}{config}", "retrieval", split="test")
    assert triples(found) == [("of another split", "one", [])]


def test_title_finds_its_body_without_being_repeated_in_it(tmp_path: Path) -> None:
    rows = [
        {"title": "Bees", "text": "Bees. They dance."},
        {"title": "", "text": "They dance."},
        {"title": "Bees", "text": "Bees."},
    ]
    found, reading = read(jsonl(tmp_path, rows), "title-body")
    assert triples(found) == [("Bees", "They dance.", [])]
    assert found[0].positive.title == ""
    assert reading.left_out == {"no title": 1, "nothing behind its title": 1}


def test_query_and_target_of_one_text_share_an_id_in_a_symmetric_set(tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"query": "a", "positive": "b"}, {"query": "b", "positive": "a"}])
    one, other = read(file, "pairs", symmetric=True)[0]
    assert (one.query_id, one.positive_id) == (other.positive_id, other.query_id)
    one, other = read(file, "pairs")[0]
    assert len({one.query_id, one.positive_id, other.query_id, other.positive_id}) == 4


@pytest.mark.parametrize(
    ("kind", "path", "num_rows", "num_examples", "with_negative"),
    [
        ("pairs", "pairs/medquad/train.jsonl", 5996, 5996, 0),
        ("nli", "nli/cad-nli/train.jsonl", 8330, 2770, 1676),
        ("classification", "classification/banking77/train.jsonl", 10003, 9999, 9999),
        ("clustering", "clustering/agnews/test.jsonl", 4000, 4000, 4000),
        ("sts", "sts/stsb/train.tsv", 5749, 1406, 0),
        ("retrieval", "retrieval/scifact", 919, 919, 0),
        ("rerank", "rerank/semeval15-cqa/train.jsonl", 191, 656, 652),
        ("title-body", "retrieval/scifact/corpus.jsonl", 5183, 5183, 0),
    ],
)
def test_real_sets_are_read_whole(
    data_folder: Path, kind: str, path: str, num_rows: int, num_examples: int, with_negative: int
) -> None:
    found, reading = read(data_folder / path, kind)
    assert (reading.num_rows, len(found)) == (num_rows, num_examples)
    assert sum(bool(example.negatives) for example in found) == with_negative
    assert not reading.rejects
