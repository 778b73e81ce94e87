"""Every kind of test set against figures worked by hand, over vectors that the tests choose."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, v_measure_score

from actors.text_encoder import TextEncoder
from pipelines.datasets.folders import LabelledDataset
from pipelines.datasets.retrieval import RetrievalDataset, TitledText
from pipelines.evaluation.evaluate import Result, evaluate, evaluate_at
from pipelines.evaluation.items import average_precision


class Chosen(TextEncoder):
    """An encoder of given vectors, the same in both roles; it notes what it is asked."""

    def __init__(self, vectors: Mapping[str, Sequence[float]]) -> None:
        self.vectors = {
            text: np.asarray(row, np.float32) / np.linalg.norm(row) for text, row in vectors.items()
        }
        self.tasks: set[str] = set()
        self.num_texts = 0

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        self.tasks.add(task)
        return self._encode(queries)

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        self.tasks.add("passage")
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        self.num_texts += len(texts)
        return np.stack([self.vectors[text] for text in texts])


class TwoDimensions(Chosen):
    dimensions = 2


def at(degrees: float) -> list[float]:
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]


def measured(encoder: Chosen, data: Any) -> Result:
    result = evaluate(encoder, data)
    assert result.score.mean == pytest.approx(result.mteb_score, abs=1e-5)
    return result


PAIRS = {
    "score": [5.0, 4.0, 2.0, 1.0],
    "sentence1": ["a", "a", "a", "a"],
    "sentence2": ["b", "c", "d", "e"],
}
ANGLES = {"a": at(0), "b": at(10), "c": at(40), "d": at(20), "e": at(80)}


def test_sts_is_the_rank_correlation_of_scores_and_cosines() -> None:
    encoder = Chosen(ANGLES)
    result = measured(encoder, LabelledDataset(name="s", kind="sts", columns={"test": PAIRS}))
    # Ranks of the gold scores 4 3 2 1, of the cosines 4 2 3 1: 1 - 6 (0+1+1+0) / (4 * 15).
    assert result.score.mean == pytest.approx(0.8)
    assert (result.task_type, result.metric) == ("STS", "cosine_spearman")
    assert result.counts == {"num_pairs": 4}
    assert encoder.tasks == {"semantic similarity"}
    # Each text once: "a" stands in all four pairs.
    assert encoder.num_texts == 5


def test_pairs_are_scored_by_average_precision() -> None:
    columns = {**PAIRS, "score": [1.0, 1.0, 0.0, 0.0]}
    encoder = Chosen(ANGLES)
    result = measured(encoder, LabelledDataset(name="p", kind="pairs", columns={"test": columns}))
    # Ranked b d c e: the pairs of the same meaning stand at 1 and 3.
    assert result.score.mean == pytest.approx((1 + 2 / 3) / 2)
    assert (result.task_type, result.metric) == ("PairClassification", "max_ap")
    assert encoder.tasks == {"semantic similarity"}


def test_reranking_orders_each_querys_own_candidates() -> None:
    passages = {f"p{i}": TitledText("", text) for i, text in enumerate("bcde")}
    data = RetrievalDataset(
        name="r",
        passages=passages,
        queries={"q1": "a", "q2": "far"},
        # q1 ranks b d c; p3, which is no candidate of q1, would be nearest to q2 and is one there.
        qrels={"q1": {"p0": 0, "p1": 1, "p2": 1}, "q2": {"p3": 1, "p1": 0}},
        candidates={"q1": ["p0", "p1", "p2"], "q2": ["p3", "p1"]},
    )
    encoder = Chosen({**ANGLES, "far": at(85)})
    result = measured(encoder, data)
    assert (result.task_type, result.metric) == ("Reranking", "map_at_1000")
    assert result.per_query["map_at_1000"] == pytest.approx({"q1": (1 / 2 + 2 / 3) / 2, "q2": 1})
    assert {len(hits) for hits in result.top_results.values()} == {3, 2}
    assert encoder.tasks == {"question answering", "passage"}


def clouds() -> tuple[Chosen, LabelledDataset, LabelledDataset]:
    """Three clouds of points that overlap, as classification and as clustering."""
    rng = np.random.default_rng(0)
    texts = [f"text {i}" for i in range(150)]
    labels = [f"label {i % 3}" for i in range(150)]
    points = rng.normal(size=(150, 4)) + 1.2 * np.eye(4)[np.arange(150) % 3]
    splits = {"train": slice(0, 90), "test": slice(90, 150)}
    columns = {name: {"text": texts[part], "label": labels[part]} for name, part in splits.items()}
    return (
        Chosen(dict(zip(texts, points.tolist(), strict=True))),
        LabelledDataset(name="c", kind="classification", columns=columns),
        LabelledDataset(name="k", kind="clustering", columns={"test": columns["test"]}),
    )


def test_classification_is_the_accuracy_of_ten_classifiers_of_eight_texts_a_label() -> None:
    encoder, data, _ = clouds()
    result = measured(encoder, data)
    train, test = data.columns["train"], data.columns["test"]
    vectors = {
        name: np.stack([encoder.vectors[t] for t in data.columns[name]["text"]])
        for name in ("train", "test")
    }
    order = list(range(90))
    right = []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        chosen = [
            row
            for label in sorted(set(train["label"]))
            for row in [row for row in order if train["label"][row] == label][:8]
        ]
        classifier = LogisticRegression(max_iter=100, random_state=42)
        classifier.fit(vectors["train"][chosen], [train["label"][row] for row in chosen])
        right.append(classifier.predict(vectors["test"]) == np.array(test["label"]))
    assert result.score.mean == pytest.approx(np.mean(right), abs=0.005)
    assert result.score.low < result.score.mean < result.score.high
    assert encoder.tasks == {"classification"}
    # An item is a text of the test split: the share of classifiers that were right about it.
    (sample,) = result.samples["accuracy"]
    assert sample.rows.shape == (1, 60)


def test_clustering_is_the_v_measure_of_ten_draws_of_texts() -> None:
    encoder, _, data = clouds()
    result = measured(encoder, data)
    columns = data.columns["test"]
    vectors = np.stack([encoder.vectors[text] for text in columns["text"]])
    labels = np.array(columns["label"])
    draws = random.Random(42)
    scores = []
    for _ in range(10):
        drawn = draws.choices(range(60), k=16_384)
        means = MiniBatchKMeans(3, batch_size=512, n_init=1, random_state=42)
        scores.append(v_measure_score(labels[drawn], means.fit_predict(vectors[drawn])))
    (sample,) = result.samples["v_measure"]
    assert sample.rows[0] == pytest.approx(scores, abs=1e-6)
    assert result.score.mean == pytest.approx(np.mean(scores), abs=1e-6)
    assert encoder.tasks == {"search result"}
    # A second model is given the same draws.
    assert measured(encoder, data).mteb_score == result.mteb_score


def test_average_precision_equals_scikit_learns_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = np.append(rng.integers(0, 2, 30), 1)
        scores = rng.integers(0, 8, 31).astype(float)
        expected = average_precision_score(labels, scores)
        assert average_precision(labels, scores) == pytest.approx(expected)
    assert np.isnan(average_precision(np.zeros(3), np.arange(3.0)))


def test_dimensions_are_cut_and_made_of_unit_length_again() -> None:
    # The first two dimensions alone say the opposite of all three.
    vectors = {"a": [1, 0, 1], "b": [1, 0.1, -1], "c": [0.3, 1, 1], "d": [0.1, 1, 1]}
    columns = {"score": [1, 2, 3], "sentence1": ["a"] * 3, "sentence2": ["b", "c", "d"]}
    data = LabelledDataset(name="s", kind="sts", columns={"test": columns})
    encoder = Chosen(vectors)
    full, cut = evaluate_at(encoder, data, dimensions=(None, 2))
    assert (full.dimensions, cut.dimensions) == (3, 2)
    assert encoder.num_texts == 4  # once for both
    for result, size in ((full, 3), (cut, 2)):
        rows = {text: np.array(row[:size]) for text, row in encoder.vectors.items()}
        rows = {text: row / np.linalg.norm(row) for text, row in rows.items()}
        cosines = [rows["a"] @ rows[text] for text in "bcd"]
        (sample,) = result.samples["cosine_spearman"]
        assert sample.rows[1] == pytest.approx(cosines, abs=1e-6)
    assert cut.mteb_score != full.mteb_score


def test_dimensions_of_a_model_are_measured_once() -> None:
    encoder = TwoDimensions(ANGLES)
    data = LabelledDataset(name="s", kind="sts", columns={"test": PAIRS})
    results = evaluate_at(encoder, data, dimensions=(None, 2, 1))
    assert [result.dimensions for result in results] == [2, 1]
