"""Results in mteb's layout: its tools read them, and the same content is not measured again."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.text_encoder import TextEncoder
from pipelines.datasets.folders import LabelledDataset
from pipelines.datasets.mteb_tasks import quiet_mteb
from pipelines.evaluation.evaluate import Result, evaluate_at
from pipelines.evaluation.mteb_model import ModelIdentity

MODEL = ModelIdentity(name="student", revision="0123456789abcdef", training_sets=("sts-of-old",))
COLUMNS = {
    "score": [5.0, 1.0, 2.0, 3.0],
    "sentence1": ["one", "two", "three", "four"],
    "sentence2": ["one!", "seven", "ten", "fourth"],
}


class Hashing(TextEncoder):
    """An encoder of vectors that depend on the text alone; it counts what it is asked."""

    def __init__(self) -> None:
        self.num_texts = 0

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        self.num_texts += len(queries)
        rows = [np.random.default_rng(list(text.encode())).normal(size=6) for text in queries]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        return self.encode_queries(texts, task="")


def data(split: str = "test", **changed: list[object]) -> LabelledDataset:
    return LabelledDataset(name="tiny", kind="sts", split=split, columns={split: COLUMNS | changed})


def measure(
    folder: Path, dataset: LabelledDataset | None = None, model: ModelIdentity = MODEL
) -> tuple[list[Result], int]:
    encoder = Hashing()
    found = evaluate_at(
        encoder, dataset or data(), model=model, dimensions=(None, 2), results=folder
    )
    return found, encoder.num_texts


def test_results_of_the_same_content_are_not_measured_again(tmp_path: Path) -> None:
    first, asked = measure(tmp_path)
    assert asked == 8
    again, asked = measure(tmp_path)
    assert asked == 0
    assert again == first
    assert [each.to_json() for each in again] == [each.to_json() for each in first]


def test_results_of_other_content_are_measured(tmp_path: Path) -> None:
    measure(tmp_path)
    other_model = ModelIdentity(name="student", revision="fedcba9876543210")
    assert measure(tmp_path, model=other_model)[1] == 8
    changed = data(sentence2=["one!", "seven", "ten", "fifth"])
    found, asked = measure(tmp_path, changed)
    assert asked == 8
    # What stands there now is of the changed data.
    assert measure(tmp_path, changed) == (found, 0)
    assert measure(tmp_path)[1] == 8
    unknown = ModelIdentity(name="student")
    assert measure(tmp_path, model=unknown)[1] == measure(tmp_path, model=unknown)[1] == 8


def test_results_that_were_half_written_are_measured_again(tmp_path: Path) -> None:
    first, _ = measure(tmp_path)
    files = sorted(tmp_path.rglob("tiny-sts.json"))
    assert len(files) == 4  # mteb's and ours, at two sizes
    for path in files:
        path.write_text(path.read_text()[:40])
        found, asked = measure(tmp_path)
        assert asked == 8
        assert [each.mteb_score for each in found] == [each.mteb_score for each in first]
        assert measure(tmp_path)[1] == 0


def test_results_of_two_splits_stand_side_by_side(tmp_path: Path) -> None:
    test, _ = measure(tmp_path)
    dev, asked = measure(tmp_path, data("dev", score=[1.0, 3.0, 2.0, 5.0]))
    assert asked == 8
    assert dev[0].mteb_score != test[0].mteb_score
    assert measure(tmp_path) == (test, 0)


def test_results_are_read_by_mtebs_own_tools(tmp_path: Path) -> None:
    (full, cut), _ = measure(tmp_path)
    with quiet_mteb() as mteb:
        cache = mteb.ResultCache(tmp_path)
        plain = cache.load_results()
        everything = cache.load_results(load_experiments="match_name")
    (model,) = plain.model_results
    assert (model.model_name, model.model_revision) == ("tokay/student", MODEL.revision)
    (task,) = model.task_results
    assert task.task_name == "tiny-sts"
    assert task.get_score() == pytest.approx(full.mteb_score, abs=1e-6)
    assert plain.to_dataframe()["tokay/student"].tolist() == [task.get_score()]
    by_experiment = {each.experiment_name: each for each in everything.model_results}
    assert by_experiment.keys() == {None, "embed_dim_2"}
    assert by_experiment["embed_dim_2"].task_results[0].get_score() == pytest.approx(
        cut.mteb_score, abs=1e-6
    )
    assert set(model.model_meta.training_datasets) == {"sts-of-old"}
