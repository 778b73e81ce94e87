"""MiniLM on public test sets: the figures that others got with it."""

import os
from pathlib import Path

import pytest

from actors.embedded import embedded_model
from actors.encoder import Encoder
from pipelines.evaluation.dataset import read_beir
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.mteb_model import quiet_mteb
from pipelines.evaluation.retrieval_task import make_retrieval_task

MINILM = "embedded:all-MiniLM-L6-v2"
BESIDE = Path(__file__).parents[2] / "../shared/data"
DATA = Path(os.environ.get("TOKAY_DATA", BESIDE)) / "retrieval"


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (DATA / name).is_dir(), reason=f"{DATA / name} is absent; set TOKAY_DATA"
    )


@pytest.mark.slow
@needs("adi")
def test_evaluate_on_adi_equals_sentence_transformers_in_mteb() -> None:
    from sentence_transformers import SentenceTransformer

    dataset = read_beir(DATA / "adi")
    result = evaluate(Encoder.load(MINILM, device="cpu"), dataset)
    with quiet_mteb() as mteb:
        theirs = mteb.evaluate(
            SentenceTransformer(str(embedded_model(MINILM)), device="cpu"),
            make_retrieval_task(dataset),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        ).task_results[0]
    scores = theirs.scores["test"][0]
    assert (result.num_passages, result.num_queries) == (82, 35)
    # mteb rounds to five places.
    assert result.ndcg_at_10.mean == pytest.approx(scores["ndcg_at_10"], abs=1e-5)
    assert result.recall_at_10.mean == pytest.approx(scores["recall_at_10"], abs=1e-5)
    assert result.mrr_at_10.mean == pytest.approx(scores["mrr_at_10"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes where other work shares the cores
@needs("cranfield")
def test_evaluate_on_cranfield_gives_the_known_figure() -> None:
    encoder = Encoder.load(MINILM, device="cpu", max_tokens=192, dtype="auto")
    result = evaluate(encoder, read_beir(DATA / "cranfield"))
    assert result.ndcg_at_10.mean == pytest.approx(0.501, abs=0.001)
    assert result.ndcg_at_10.low > 0.45
    assert result.ndcg_at_10.high < 0.55
