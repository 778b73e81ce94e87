import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.errors import UserError
from cluster.storage import join, open_storage
from pipelines.corpus.cutting import Passage
from pipelines.datasets.beir import read_beir
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document
from pipelines.demo import command, data
from pipelines.demo.command import run_demo
from pipelines.demo.data import write_documents, write_test_set
from pipelines.demo.questions import load_questions
from pipelines.recipe.graph import build_run
from pipelines.recipe.recipe import Recipe


@pytest.fixture(autouse=True)
def already_read(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documentation, without reading it anew for each test; the environment is put back."""
    rows = [json.loads(line) for line in documents.read_text("utf-8").split("\n")[:-1]]
    found = [Document(name=row["_id"], title=row["title"], text=row["text"]) for row in rows]
    monkeypatch.setattr(data, "python_documentation", lambda: found)
    monkeypatch.setenv("TOKAY_DEMO", "")


def test_test_set_is_searched_in_the_passages_of_the_run(
    documents: Path, documentation: list[Passage], tmp_path: Path
) -> None:
    write_test_set(open_storage(tmp_path), CorpusConfig(path=str(documents)))
    sources = {passage.id: passage.source for passage in documentation}
    questions = load_questions()
    for split in ("dev", "test"):
        test_set = read_beir(tmp_path / "test_set", split)
        assert [(id_, *passage) for id_, passage in test_set.passages.items()] == [
            (passage.id, passage.title, passage.text) for passage in documentation
        ]
        assert {
            query: {sources[id_] for id_, score in judged.items() if score == 1}
            for query, judged in test_set.qrels.items()
        } == {each.id: set(each.answers) for each in questions if each.split == split}
        # Those of the other split are kept out of training too.
        assert test_set.judged_texts() == [each.question for each in questions]
        assert test_set.notes == ()


def test_question_that_nothing_answers_is_kept_out_of_training_and_not_judged(
    documents: Path, tmp_path: Path
) -> None:
    some = tmp_path / "some.jsonl"
    some.write_text("\n".join(documents.read_text("utf-8").split("\n")[:500]), "utf-8")
    write_test_set(open_storage(tmp_path), CorpusConfig(path=str(some)))
    test_set = read_beir(tmp_path / "test_set")
    num_questions = sum(each.split == "test" for each in load_questions())
    assert 0 < len(test_set.qrels) < num_questions
    assert len(test_set.judged_texts()) == len(load_questions())
    assert test_set.notes == ()  # no judgement of a passage that is not there


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_second_demo_in_a_folder_finds_its_steps(
    place: str, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []
    runs: list[str] = []

    def execute(recipe: Recipe, storage: str, *_: object, **__: Any) -> None:
        recipes.append(recipe)
        run = build_run(recipe, storage)
        run.check_folder()
        runs.append(run.fingerprint(run.steps[-1]))

    monkeypatch.setattr(command, "execute", execute)
    monkeypatch.setattr(command, "_ask_endpoint", lambda *_: None)
    uri = join(bucket, "demo") if place == "s3" else str(tmp_path / "demo")
    written: list[str] = []
    for _ in range(2):
        screen = Console(file=io.StringIO(), width=400)
        run_demo(uri, ["seeds.num_seeds=5"], False, False, screen)
        written.append(screen.file.getvalue())  # type: ignore[attr-defined]
        # From now on a file that is written again would be another.
        monkeypatch.setattr(type(open_storage(uri)), "write_bytes", None)
    assert runs[0] == runs[1] and recipes[0] == recipes[1]
    (test_set,) = recipes[0].evaluation
    assert f" documents in {recipes[0].corpus.path}; " in written[0]
    assert f" questions in {test_set.path}, a BEIR folder" in written[0]
    assert len(list(Corpus(recipes[0].corpus).documents())) > 2000
    assert recipes[0].seeds.num_seeds == 5


def test_folder_of_somebody_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(UserError, match="is no run of Tokay, and holds files"):
        run_demo(str(tmp_path), [], False, False, Console(file=io.StringIO()))
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_mistake_in_a_setting_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key seds"):
        run_demo(str(tmp_path / "x"), ["seds.num=1"], False, False, Console(file=io.StringIO()))
    assert not (tmp_path / "x").exists()


def test_documents_are_read_as_they_were_written(documents: Path, tmp_path: Path) -> None:
    write_documents(open_storage(tmp_path))
    found = list(Corpus(CorpusConfig(path=str(tmp_path))).documents())
    assert found == data.python_documentation()
    assert (tmp_path / "documents.jsonl").read_bytes() == documents.read_bytes()
