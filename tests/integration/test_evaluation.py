"""MiniLM on public test sets: the figures that plain mteb, and others, got with it."""

from dataclasses import replace
from pathlib import Path

import pytest

from actors.embedded import embedded_model
from actors.encoder import Encoder
from pipelines.datasets.folders import TestData, read_folder
from pipelines.datasets.mteb_tasks import make_task, quiet_mteb
from pipelines.datasets.retrieval import RetrievalDataset
from pipelines.evaluation.evaluate import Result, evaluate

MINILM = "embedded:all-MiniLM-L6-v2"


def in_both(folder: Path, kind: str) -> tuple[Result, dict[str, float]]:
    """Returns our result, and the scores of SentenceTransformer in plain mteb."""
    from sentence_transformers import SentenceTransformer

    data = without_ties(read_folder(kind, folder))
    result = evaluate(Encoder.load(MINILM, device="cpu"), data)
    with quiet_mteb() as mteb:
        theirs = mteb.evaluate(
            SentenceTransformer(str(embedded_model(MINILM)), device="cpu"),
            make_task(data),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        ).task_results[0]
    scores: dict[str, float] = theirs.scores["test"][0]
    return result, scores


def without_ties(data: TestData) -> TestData:
    """Takes 25 queries, but for those with one text among their positives and their negatives.

    Its vector is the same for us, and nearly the same, in another batch, for the other.
    """
    if not isinstance(data, RetrievalDataset) or not data.candidates:
        return data
    candidates = {
        query: ids
        for query, ids in list(data.candidates.items())[:25]
        if len({data.passages[id_].text for id_ in ids}) == len(ids)
    }
    return replace(
        data,
        candidates=candidates,
        qrels={query: data.qrels[query] for query in candidates},
        queries={query: data.queries[query] for query in candidates},
    )


@pytest.mark.slow
def test_evaluate_on_adi_equals_sentence_transformers_in_mteb(data_folder: Path) -> None:
    result, scores = in_both(data_folder / "retrieval" / "adi", "retrieval")
    assert result.counts == {"num_passages": 82, "num_queries": 35}
    for metric in ("ndcg_at_10", "recall_at_10", "mrr_at_10"):
        # mteb rounds to five places.
        assert result.estimates[metric].mean == pytest.approx(scores[metric], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes where other work shares the cores
@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        ("sts", "sts/stsb"),
        ("classification", "classification/emotion"),
        ("rerank", "rerank/semeval15-cqa"),
    ],
)
def test_evaluate_on_folders_equals_sentence_transformers_in_mteb(
    data_folder: Path, kind: str, folder: str
) -> None:
    result, scores = in_both(data_folder / folder, kind)
    assert result.score.mean == pytest.approx(scores["main_score"], abs=1e-4)
    assert result.score.low < result.score.mean < result.score.high


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes where other work shares the cores
def test_evaluate_on_cranfield_gives_the_known_figure(data_folder: Path) -> None:
    encoder = Encoder.load(MINILM, device="cpu", max_tokens=192)
    result = evaluate(encoder, read_folder("retrieval", data_folder / "retrieval" / "cranfield"))
    assert result.score.mean == pytest.approx(0.501, abs=0.001)
    assert result.score.low > 0.45
    assert result.score.high < 0.55
