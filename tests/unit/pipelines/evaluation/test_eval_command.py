"""`tokay eval` over a tiny BEIR folder with the real MiniLM."""

import json
from pathlib import Path

import pytest

from actors.encoder import Encoder
from cluster.errors import UserError
from pipelines.datasets.test_sets import TestSet
from pipelines.evaluation.command import (
    EvalOptions,
    folder_test_set,
    name_models,
    read_dimensions,
    run_eval,
)
from pipelines.training.layers import cut_layers

MINILM = "embedded:all-MiniLM-L6-v2"
ENTRIES = {
    "sorted": "Return a new list containing all items from the iterable in ascending order.",
    "len": "Return the number of items in a container.",
    "open": "Open file and return a stream. Raise OSError upon failure.",
    "max": "With a single iterable argument, return its biggest item.",
    "hash": "Return the hash value for the given object.",
}
QUESTIONS = {
    "q1": ("put a list in order", "sorted"),
    "q2": ("how many elements are there", "len"),
    "q3": ("read from a file on disk", "open"),
    "q4": ("largest element", "max"),
}


def beir(folder: Path) -> TestSet:
    return folder_test_set("retrieval", str(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "builtins"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": name, "title": name, "text": text} for name, text in ENTRIES.items()]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    rows = [{"_id": name, "text": text} for name, (text, _) in QUESTIONS.items()]
    (folder / "queries.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    lines = [f"{name}\t{answer}\t1" for name, (_, answer) in QUESTIONS.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["q\tc\ts", *lines]) + "\n")
    return folder


def test_eval_of_a_run_prints_results_and_differences_as_json(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "student"
    cut_layers(Encoder.load(MINILM, device="cpu"), [0]).save(student, model_card="cut")
    run_models = {"student_before": str(student), "student_after": MINILM}
    rows = run_eval(run_models, [beir(folder)], EvalOptions(as_json=True))
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["results"] == rows
    assert [row["model"] for row in rows] == ["student_before", "student_after"]
    assert {row["dataset"] for row in rows} == {"builtins"}
    before, after = (row["ndcg_at_10"] for row in rows)
    assert after > 0.8
    low, high = rows[1]["ndcg_at_10_interval"]
    assert low <= after <= high
    (gain,) = document["differences"]
    assert (gain["before"], gain["after"]) == ("student_before", "student_after")
    assert gain["difference"] == pytest.approx(after - before)


def test_eval_of_one_model_prints_a_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (row,) = run_eval({MINILM: MINILM}, [beir(folder)])
    out = capsys.readouterr().out
    low, high = row["ndcg_at_10_interval"]
    assert f"{row['ndcg_at_10']:.3f} [{low:.3f}, {high:.3f}]" in out
    assert "builtins" in out
    assert len(out.splitlines()) < 10


def test_eval_cuts_texts_at_max_tokens(folder: Path) -> None:
    cut, whole = (
        run_eval({MINILM: MINILM}, [beir(folder)], EvalOptions(max_tokens=tokens, as_json=True))[0]
        for tokens in (3, 256)
    )
    assert cut["ndcg_at_10"] < whole["ndcg_at_10"]


@pytest.mark.parametrize(
    ("model", "mteb", "folders", "message"),
    [
        (MINILM, [], [], "give a folder (--beir, --sts"),
        (MINILM, ["NFCorpusss"], [], "did you mean NFCorpus"),
        (MINILM, [], ["nowhere"], "nowhere does not exist"),
        ("http://127.0.0.1:9/v1", [], None, "no endpoint answers at http://127.0.0.1:9/v1"),
    ],
)
def test_eval_of_nothing_or_nowhere_is_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    mteb: list[str],
    folders: list[str] | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    test_sets = [beir(folder)] if folders is None else [beir(Path(name)) for name in folders]
    test_sets += [folder_test_set("mteb", name) for name in mteb]
    with pytest.raises(UserError) as caught:
        run_eval({model: model}, test_sets)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_eval_at_two_dimensions_prints_both_and_means(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sts = tmp_path / "pairs of words"
    sts.mkdir()
    pairs = [(5, "a cat", "a kitten"), (3, "a cat", "an animal"), (0, "a cat", "income tax")]
    (sts / "test.tsv").write_text("".join(f"{s}\t{a}\t{b}\n" for s, a, b in pairs))
    rows = run_eval(
        {MINILM: MINILM},
        [beir(folder), folder_test_set("sts", str(sts))],
        EvalOptions(dimensions=(384, 16)),
    )
    out = capsys.readouterr().out
    assert [(row["dataset"], row["dimensions"]) for row in rows] == [
        ("builtins", 384),
        ("builtins", 16),
        ("pairs of words", 384),
        ("pairs of words", 16),
    ]
    assert rows[2]["score"] == rows[2]["cosine_spearman"] == pytest.approx(1.0)
    assert "mean (types)" in out
    mean = (rows[0]["score"] + rows[2]["score"]) / 2
    assert f"{mean:.3f}" in out


def test_eval_names_the_models_of_two_runs_apart() -> None:
    one = {"retriever": "r", "student_after": "a"}
    named = name_models({"runs/x": one, "runs/y": one, MINILM: {MINILM: MINILM}})
    assert list(named) == [
        "x/retriever",
        "x/student_after",
        "y/retriever",
        "y/student_after",
        MINILM,
    ]
    assert list(name_models({"runs/x": one})) == ["retriever", "student_after"]
    named = name_models({"one/run": one, "other/run": one})
    assert list(named) == [
        "one/run/retriever",
        "one/run/student_after",
        "other/run/retriever",
        "other/run/student_after",
    ]


def test_eval_of_two_folders_of_one_name_is_refused(folder: Path) -> None:
    sets = [beir(folder), beir(folder.parent / "other" / folder.name)]
    with pytest.raises(UserError, match="two test sets are called 'builtins': give each once"):
        run_eval({MINILM: MINILM}, sets)


def test_eval_reads_dimensions() -> None:
    assert read_dimensions("768, 256") == (768, 256)
    assert read_dimensions(None) == ()
    for wrong in ("big", "768,", "0"):
        with pytest.raises(UserError, match="whole numbers with commas"):
            read_dimensions(wrong)


def test_eval_of_pairs_that_are_all_alike_prints_null_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sts = tmp_path / "alike"
    sts.mkdir()
    (sts / "test.tsv").write_text("".join(f"{score}\tsame\tsame\n" for score in (4, 1, 5)))
    test_set = folder_test_set("sts", str(sts))
    why = "the model finds all pairs equally alike, which has no correlation"
    run_eval({MINILM: MINILM}, [test_set], EvalOptions(as_json=True))
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (document["results"][0]["score"], document["results"][0]["reason"]) == (None, why)
    run_eval({MINILM: MINILM}, [test_set])
    out = capsys.readouterr().out
    assert f"{MINILM} (384) has no score: {why}\n" in out
    assert "nan" not in out.lower().replace("finance", "")


def test_eval_tells_what_the_scores_do_not_count(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "qrels" / "test.tsv").open("a") as qrels:
        qrels.write("q1\tlen\t-1\nq4\tmax\t1\n")
    told = [
        "1 judgements below zero count as not relevant",
        "1 judgements are there more than once and count once",
    ]
    run_eval({MINILM: MINILM}, [beir(folder)])
    assert capsys.readouterr().out.endswith(f"builtins: {'; '.join(told)}\n")
    run_eval({MINILM: MINILM}, [beir(folder)], EvalOptions(as_json=True))
    assert json.loads(capsys.readouterr().out)["notes"] == {"builtins": told}


def test_eval_into_a_file_is_refused_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluation.command._load", pytest.fail)
    file = folder / "corpus.jsonl"
    for results in (file, file / "below"):
        with pytest.raises(UserError, match=r"--results .* can be no folder") as caught:
            run_eval({MINILM: MINILM}, [beir(folder)], EvalOptions(results=results))
        assert "\n" not in str(caught.value)


def test_eval_shows_names_as_they_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "[red]a[bold]"
    Encoder.load(MINILM, device="cpu").save(named, model_card="x")
    run_eval({str(named): str(named)}, [beir(folder)])
    assert "[red]a[bold]" in capsys.readouterr().out
