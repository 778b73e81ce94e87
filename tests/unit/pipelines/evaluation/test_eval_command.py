"""`tokay eval` over a tiny BEIR folder with the real MiniLM."""

import json
from pathlib import Path

import pytest

from actors.encoder import Encoder, cut_layers
from cluster.errors import UserError
from pipelines.evaluation.command import run_eval

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
    rows = run_eval(run_models, beir=[folder], as_json=True)
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
    (row,) = run_eval({MINILM: MINILM}, beir=[folder])
    out = capsys.readouterr().out
    low, high = row["ndcg_at_10_interval"]
    assert f"{row['ndcg_at_10']:.3f} [{low:.3f}, {high:.3f}]" in out
    assert "builtins" in out
    assert len(out.splitlines()) < 10


def test_eval_cuts_texts_at_max_tokens(folder: Path) -> None:
    cut, whole = (
        run_eval({MINILM: MINILM}, beir=[folder], max_tokens=tokens, as_json=True)[0]
        for tokens in (3, 256)
    )
    assert cut["ndcg_at_10"] < whole["ndcg_at_10"]


@pytest.mark.parametrize(
    ("model", "mteb", "beir", "message"),
    [
        (MINILM, [], [], "give --beir FOLDER or --mteb NAME"),
        (MINILM, ["NFCorpusss"], [], "did you mean NFCorpus"),
        (MINILM, [], ["nowhere"], "BEIR folder nowhere does not exist"),
        ("http://127.0.0.1:9/v1", [], None, "no endpoint answers at http://127.0.0.1:9/v1"),
    ],
)
def test_eval_of_nothing_or_nowhere_is_refused(
    folder: Path, model: str, mteb: list[str], beir: list[str] | None, message: str
) -> None:
    folders = [folder] if beir is None else [Path(name) for name in beir]
    with pytest.raises(UserError) as caught:
        run_eval({model: model}, beir=folders, mteb=mteb)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
