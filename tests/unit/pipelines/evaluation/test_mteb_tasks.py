"""mteb's named tasks: its own small mock tasks stand in for data that only the hub has."""

from collections.abc import Sequence

import numpy as np
import pytest

from actors.encoder import Encoder
from cluster.errors import UserError
from pipelines.evaluation import mteb_tasks
from pipelines.evaluation.mteb_model import quiet_mteb
from pipelines.evaluation.mteb_tasks import evaluate_mteb, find_mteb_tasks

MINILM = "embedded:all-MiniLM-L6-v2"


class Listening:
    """Passes texts on to a real encoder and notes with which task and in which role they came."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.templates = encoder.templates
        self.heard: set[str] = set()

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        self.heard.add(task)
        return self.encoder.encode_queries(queries, task=task)

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        self.heard.add("passage")
        return self.encoder.encode_passages(texts, titles)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(MINILM, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "heard"),
    [
        ("sts", "MockSTSTask", {"semantic similarity"}),
        ("classification", "MockClassificationTask", {"classification"}),
        ("clustering", "MockClusteringTask", {"search result"}),
        ("pair_classification", "MockPairClassificationTask", {"semantic similarity"}),
        ("summarization", "MockSummarizationTask", {"search result"}),
        ("bitext_mining", "MockBitextMiningTask", {"semantic similarity"}),
        ("reranking", "MockRerankingTask", {"question answering", "passage"}),
        ("retrieval", "MockRetrievalTask", {"question answering", "passage"}),
    ],
)
def test_mteb_task_scores_as_with_sentence_transformers(
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    module: str,
    name: str,
    heard: set[str],
) -> None:
    from importlib import import_module

    from sentence_transformers import SentenceTransformer

    from actors.embedded import embedded_model

    with quiet_mteb() as mteb:
        make = getattr(import_module(f"mteb.mocks.mock_tasks.{module}"), name)
        theirs = mteb.evaluate(
            SentenceTransformer(str(embedded_model(MINILM)), device="cpu"),
            make(),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        ).task_results[0]
        monkeypatch.setattr(mteb_tasks, "find_mteb_tasks", lambda names: [make() for _ in names])
    listening = Listening(encoder)
    capfd.readouterr()
    (result,) = evaluate_mteb(listening, [name], model="minilm")
    assert capfd.readouterr() == ("", "")
    assert listening.heard == heard
    assert (result.model, result.dataset) == ("minilm", make.metadata.name)
    assert (result.task_type, result.metric) == (make.metadata.type, make.metadata.main_score)
    assert result.score == pytest.approx(theirs.get_score(), abs=1e-4)


def test_mteb_task_of_an_unknown_name_gets_names_like_it() -> None:
    with quiet_mteb():
        with pytest.raises(UserError, match=r"no task 'nfcorpu'; did you mean NFCorpus or "):
            find_mteb_tasks(["SciFact", "nfcorpu"])
        with pytest.raises(UserError, match="see mteb's list"):
            find_mteb_tasks(["%%%%"])
        assert find_mteb_tasks(["SciFact"])[0].metadata.main_score == "ndcg_at_10"


def test_mteb_task_of_images_is_refused() -> None:
    with quiet_mteb(), pytest.raises(UserError, match="text tasks only"):
        find_mteb_tasks(["CIFAR10"])


@pytest.mark.parametrize("name", ["NFCorpus", "STS12", "CQADupstackRetrieval"])
def test_mteb_task_without_a_hub_says_so_in_one_line(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from huggingface_hub import constants

    # Otherwise the hub's client tries again for 23 s.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be fetched .* --beir") as caught:
        evaluate_mteb(encoder, [name])
    assert "\n" not in str(caught.value)
