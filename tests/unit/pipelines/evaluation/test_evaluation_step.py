"""The step `evaluation`: what it has measured is on the storage before it goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.text_encoder import TextEncoder
from cluster.artifacts import Artifact, Manifest
from cluster.steps import StepContext
from cluster.storage import Storage, join, open_storage
from pipelines.datasets.test_sets import TestSet
from pipelines.evaluation.evaluation import run_evaluation

MODELS = ("retriever", "student_before", "student_after")


class Lost(BaseException):
    """A process that ends where it stands."""


class Hashing(TextEncoder):
    """Vectors that depend on the text and the model; counts its texts; or does something else."""

    num_parameters = 0
    dimensions = 6

    def __init__(self, seed: int, instead: Callable[[], None] | None = None) -> None:
        self.seed, self.instead, self.num_texts = seed, instead, 0

    @property
    def fingerprint(self) -> str:
        return f"{self.seed:016d}"

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        if self.instead:
            self.instead()
        self.num_texts += len(queries)
        seeds = [[self.seed, *text.encode()] for text in queries]
        rows = np.stack([np.random.default_rng(seed).normal(size=6) for seed in seeds])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        return self.encode_queries(texts, task="")


class Heard:
    def __init__(self) -> None:
        self.updates: list[tuple[float, float | None, str]] = []

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        self.updates.append((done, total, note))


@pytest.fixture
def test_sets(tmp_path: Path) -> tuple[TestSet, ...]:
    for name in ("first", "second"):
        rows = [f"{number % 4}\t{name} {number}\tother {number}" for number in range(12)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.tsv").write_text("\n".join(rows))
    return tuple(
        TestSet(name=name, path=str(tmp_path / name), kind="sts", dimensions=(2,))
        for name in ("first", "second")
    )


def evaluated(
    storage: Storage,
    test_sets: tuple[TestSet, ...],
    last_instead: Callable[[], None] | None = None,
) -> tuple[dict[str, Any], list[int], Heard]:
    """Returns the step's metrics, the texts that each model encoded, and what was reported."""
    export = open_storage(join(storage.uri, "export"))
    export.write_bytes("model/README.md", b"---\ntags: [tokay]\n---\n# A model\n")
    manifest = Manifest(step="export", fingerprint="f", config={}, inputs={})
    heard = Heard()
    context = StepContext(
        storage=open_storage(join(storage.uri, "evaluation")),
        inputs={"export": Artifact(export, manifest)},
        progress=heard,
    )
    encoders: Any = {name: Hashing(number) for number, name in enumerate(MODELS)}
    encoders[MODELS[-1]].instead = last_instead
    metrics = run_evaluation(test_sets, encoders, context)
    return metrics, [encoder.num_texts for encoder in encoders.values()], heard


def num_results(storage: Storage) -> int:
    return len([name for name in storage.list("evaluation/mteb") if "/tokay/" in name])


@pytest.mark.parametrize("place", ["disk", "S3"])
def test_what_a_lost_process_has_measured_is_not_measured_again(
    place: str, test_sets: tuple[TestSet, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    where = tmp_path / "run" if place == "disk" else request.getfixturevalue("bucket") + "/run"
    storage = open_storage(where)
    expected, (all_texts, *_), heard = evaluated(open_storage(tmp_path / "whole"), test_sets)
    assert heard.updates[-1][:2] == (144, 144)  # two sets of 24 texts by three models
    assert {note for _, _, note in heard.updates} == {*MODELS}

    def lose() -> None:
        assert num_results(storage) == 2 * 2  # two models at two sizes
        raise Lost

    with pytest.raises(Lost):
        evaluated(storage, test_sets, lose)
    metrics, num_texts, _ = evaluated(storage, test_sets)
    # The two before the lost one had the first set behind them.
    assert num_texts[2] == all_texts > num_texts[0] == num_texts[1] > 0
    assert timeless(metrics) == timeless(expected)
    assert num_results(storage) == 2 * 2 * 3
    assert evaluated(storage, test_sets)[1] == [0, 0, 0]


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics | {"results": [{**row, "texts_per_s": None} for row in metrics["results"]]}
