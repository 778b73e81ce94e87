"""Figures against hand-worked ones and against pytrec_eval, over vectors that the tests choose."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch

from actors.encoder_templates import PromptTemplates
from actors.text_encoder import TextEncoder
from actors.vectors import BrokenVectors
from cluster.errors import UserError
from cluster.plain_json import dump_json
from pipelines.datasets.folders import LabelledDataset
from pipelines.datasets.retrieval import RetrievalDataset, TitledText
from pipelines.evaluation.evaluate import Result, difference, evaluate, evaluate_at


class ChosenVectors(TextEncoder):
    """An encoder of given vectors, so that every rank is known; it notes what it is asked."""

    def __init__(
        self, vectors: Mapping[str, Sequence[float]], templates: PromptTemplates | None = None
    ) -> None:
        self.vectors = {text: np.asarray(row, np.float32) for text, row in vectors.items()}
        self.asked: list[tuple[str, list[str]]] = []
        self.templates = templates or PromptTemplates()

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        self.asked.append((task, list(queries)))
        return np.stack([self.vectors[query] for query in queries])

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        pairs = zip(texts, titles or [None] * len(texts), strict=True)
        read = [self.templates.format_passage(text, title) for text, title in pairs]
        self.asked.append(("passages", read))
        return np.stack([self.vectors[text] for text in read])


class TwoDimensions(ChosenVectors):
    dimensions = 2


VECTORS = {
    "a": [1.0, 0.0],
    "b": [0.8, 0.6],
    "c": [0.0, 1.0],
    "like a": [1.0, 0.0],
    "like c": [0.0, 1.0],
    "unjudged": [0.6, 0.8],
}
TINY = RetrievalDataset(
    name="tiny",
    passages={name: TitledText("", name) for name in "abc"},
    queries={"q1": "like a", "q2": "like c", "q3": "unjudged"},
    # q1 ranks a, b, c; q2 ranks c, b, a.
    qrels={"q1": {"b": 1}, "q2": {"c": 2, "a": 1}},
)


def test_query_that_is_its_own_passage_is_not_found_by_itself() -> None:
    # As mteb measures ArguAna: the copy at the first rank is not there, and b is first.
    vectors = {"one": [1.0, 0.0], "two": [0.8, 0.6], "three": [0.0, 1.0]}
    passages = {name: TitledText("", text) for name, text in zip("abc", vectors, strict=True)}
    copies = RetrievalDataset(
        name="copies", passages=passages, queries={"a": "one"}, qrels={"a": {"b": 1}}
    )
    found = evaluate(ChosenVectors(vectors), copies)
    assert found.score.mean == 1.0
    assert [passage for passage, _ in found.top_results["a"]] == ["b", "c"]
    # Under another id it is a passage like any other.
    other = replace(copies, queries={"q": "one"}, qrels={"q": {"b": 1}})
    assert evaluate(ChosenVectors(vectors), other).score.mean == pytest.approx(1 / math.log2(3))


def test_evaluate_of_vectors_that_are_no_numbers_is_refused() -> None:
    broken = {**VECTORS, "b": [math.nan, 0.0]}
    with pytest.raises(BrokenVectors, match="tokay/chosen gives vectors that are no numbers"):
        evaluate(ChosenVectors(broken), TINY, model="chosen")


def test_evaluate_at_more_dimensions_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="3 dimensions are asked for: the model has 2 dimensions"):
        evaluate_at(ChosenVectors(VECTORS), TINY, dimensions=(3,))
    known = TwoDimensions(VECTORS)
    with pytest.raises(UserError, match="the model has 2 dimensions"):
        evaluate_at(known, TINY, dimensions=(1, 3))
    assert known.asked == []
    assert [each.dimensions for each in evaluate_at(known, TINY, dimensions=(None, 2, 1))] == [2, 1]


def test_result_of_pairs_that_are_all_alike_says_why_it_has_no_score() -> None:
    pairs = LabelledDataset(
        name="alike",
        kind="sts",
        columns={"test": {"score": [4.0, 1.0], "sentence1": ["a", "b"], "sentence2": ["a", "b"]}},
    )
    found = evaluate(ChosenVectors({"a": [1.0, 0.0], "b": [0.0, 1.0]}), pairs, model="chosen")
    why = "the model finds all pairs equally alike, which has no correlation"
    for result in (found, Result.from_json(json.loads(dump_json(found.to_json())))):
        row = result.to_json()
        assert (row["score"], row["mteb_score"], row["cosine_spearman"]) == (None, None, None)
        assert (row["cosine_spearman_interval"], row["reason"]) == (None, why)
        assert math.isnan(result.mteb_score)


def test_evaluate_equals_figures_worked_by_hand() -> None:
    encoder = ChosenVectors(VECTORS)
    result = evaluate(encoder, TINY, task="search result", model="chosen")
    assert result.counts == {"num_passages": 3, "num_queries": 2}
    # q1: its one relevant passage at rank 2. q2: gains 2 at rank 1 and 1 at rank 3.
    ideal = 2 + 1 / math.log2(3)
    expected = {"q1": 1 / math.log2(3), "q2": (2 + 1 / math.log2(4)) / ideal}
    assert result.per_query["ndcg_at_10"] == pytest.approx(expected)
    assert result.estimates["ndcg_at_10"].mean == pytest.approx(sum(expected.values()) / 2)
    assert result.per_query["mrr_at_10"] == {"q1": 0.5, "q2": 1.0}
    assert result.estimates["mrr_at_10"].mean == 0.75
    assert result.per_query["recall_at_10"] == {"q1": 1.0, "q2": 1.0}
    assert [passage for passage, _ in result.top_results["q1"]] == ["a", "b", "c"]
    assert [cosine for _, cosine in result.top_results["q2"]] == pytest.approx([1.0, 0.6, 0.0])
    assert [(role, set(texts)) for role, texts in encoder.asked] == [
        ("search result", {"like a", "like c"}),
        ("passages", {"a", "b", "c"}),
    ]
    assert result.texts_per_s > 0


def random_dataset() -> tuple[RetrievalDataset, ChosenVectors]:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(160, 8))
    vectors[20:40] = vectors[:20]  # ties
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [f"text {i}" for i in range(160)]
    dataset = RetrievalDataset(
        name="random",
        passages={f"p{i}": TitledText("", texts[i]) for i in range(120)},
        queries={f"q{i}": texts[120 + i] for i in range(40)},
        qrels={
            f"q{i}": {f"p{p}": int(rng.integers(0, 4)) for p in rng.choice(120, 30, False)}
            for i in range(40)
        },
    )
    return dataset, ChosenVectors(dict(zip(texts, vectors.tolist(), strict=True)))


def test_evaluate_equals_pytrec_eval_on_the_same_vectors() -> None:
    dataset, encoder = random_dataset()
    result = evaluate(encoder, dataset)
    passages = np.stack([encoder.vectors[p.text] for p in dataset.passages.values()])
    rankings = {
        query: dict(zip(dataset.passages, (passages @ encoder.vectors[text]).tolist(), strict=True))
        for query, text in dataset.queries.items()
    }
    judge = pytrec_eval.RelevanceEvaluator(
        {query: dict(relevant) for query, relevant in dataset.qrels.items()},
        {"ndcg_cut.10", "recall.10"},
    )
    direct = judge.evaluate(rankings)
    for metric, spelled in (("ndcg_at_10", "ndcg_cut_10"), ("recall_at_10", "recall_10")):
        expected = {query: scores[spelled] for query, scores in direct.items()}
        assert result.per_query[metric] == pytest.approx(expected)
    assert 0.1 < result.estimates["ndcg_at_10"].mean < 0.9
    assert (
        result.estimates["ndcg_at_10"].low
        < result.estimates["ndcg_at_10"].mean
        < result.estimates["ndcg_at_10"].high
    )


def test_evaluate_leaves_the_random_generators_alone() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    evaluate(ChosenVectors(VECTORS), TINY)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_evaluate_reports_progress_to_the_last_text() -> None:
    dataset, encoder = random_dataset()
    counts: list[int] = []
    evaluate(encoder, dataset, on_progress=counts.append)
    assert sum(counts) == len(dataset.passages) + len(dataset.qrels)


def test_evaluate_takes_geckos_prompt_for_a_known_test_set() -> None:
    encoder = ChosenVectors(VECTORS)
    named = RetrievalDataset(
        name="scifact", passages=TINY.passages, queries=TINY.queries, qrels=TINY.qrels
    )
    assert evaluate(encoder, named).task == "fact checking"
    assert encoder.asked[0][0] == "fact checking"


@pytest.mark.parametrize(
    ("template", "read"),
    [
        ("title: {title} | text: {text}", ["title: Head | text: x", "title: none | text: y"]),
        ("{text}", ["Head x", "y"]),
    ],
)
def test_evaluate_gives_titles_to_templates_and_else_puts_them_in_front(
    template: str, read: list[str]
) -> None:
    encoder = ChosenVectors(
        {text: [1.0] for text in (*read, "query")}, PromptTemplates(passage=template)
    )
    dataset = RetrievalDataset(
        name="titled",
        passages={"1": TitledText("Head", "x"), "2": TitledText("", "y")},
        queries={"q": "query"},
        qrels={"q": {"1": 1}},
    )
    evaluate(encoder, dataset)
    assert encoder.asked[1] == ("passages", read)


def shifted(result: Result, by: float, model: str) -> Result:
    row = result.to_json()
    row["per_query"]["ndcg_at_10"] = {
        query: score + by for query, score in row["per_query"]["ndcg_at_10"].items()
    }
    return Result.from_json(row | {"model": model})


def test_difference_is_paired_by_query() -> None:
    dataset, encoder = random_dataset()
    before = evaluate(encoder, dataset, model="before")
    assert before.estimates["ndcg_at_10"].high - before.estimates["ndcg_at_10"].low > 0.04
    # The same gain on every query: no draw of queries gives another mean.
    gain = difference(before, shifted(before, 0.25, "after"))
    assert gain == pytest.approx((0.25, 0.25, 0.25))
    assert difference(before, before) == (0.0, 0.0, 0.0)


def test_difference_on_other_queries_or_metrics_is_refused() -> None:
    dataset, encoder = random_dataset()
    result, other = evaluate(encoder, dataset), evaluate(ChosenVectors(VECTORS), TINY)
    with pytest.raises(ValueError, match="compare results on the same ones"):
        difference(result, other)
    with pytest.raises(ValueError, match="accepted are ndcg_at_10"):
        difference(result, result, metric="map")


def test_result_survives_json() -> None:
    result = evaluate(ChosenVectors(VECTORS), TINY, model="chosen")
    again = Result.from_json(json.loads(json.dumps(result.to_json())))
    assert again == result
    assert again.to_json() == result.to_json()
    row = result.to_json(items=False)
    assert "per_query" not in row
    assert row["ndcg_at_10_interval"] == [
        result.estimates["ndcg_at_10"].low,
        result.estimates["ndcg_at_10"].high,
    ]


def test_importing_evaluation_imports_neither_mteb_nor_torch() -> None:
    code = (
        "import sys, pipelines.evaluation.command;"
        "print([m for m in ('mteb', 'torch', 'datasets', 'openai') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_evaluate_says_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "from pipelines.datasets.retrieval import TitledText, RetrievalDataset\n"
        "from pipelines.evaluation.evaluate import evaluate\n"
        "from actors.text_encoder import TextEncoder\n"
        "class Ones(TextEncoder):\n"
        "    def encode_queries(self, queries, *, task): return np.ones((len(queries), 1))\n"
        "    def encode_passages(self, texts, titles=None): return np.ones((len(texts), 1))\n"
        "evaluate(Ones(), RetrievalDataset(name='d', passages={'a': TitledText('', 'x')},\n"
        "    queries={'q': 'x'}, qrels={'q': {'a': 1}}))\n"
    )
    hidden = ("HF_", "XDG_", "MTEB_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=env | {"HOME": str(tmp_path)},
    )
    assert (run.stdout, run.stderr) == ("", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file() or "mteb" in path.name] == []
