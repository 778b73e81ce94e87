"""mteb's named tasks: its own small mock tasks stand in for data that only the hub has."""

from collections.abc import Sequence
from importlib import import_module

import numpy as np
import pytest

from actors.encoder import Encoder
from actors.text_encoder import TextEncoder
from cluster.errors import UserError
from pipelines.datasets.mteb_tasks import find_mteb_task, quiet_mteb
from pipelines.datasets.test_sets import TestSet, evaluation_queries, load_test_set
from pipelines.evaluation.evaluate import evaluate

MINILM = "embedded:all-MiniLM-L6-v2"


class Listening(TextEncoder):
    """Passes texts on to a real encoder and notes with which task and in which role they came."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
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
    ("module", "name", "heard", "has_items"),
    [
        ("sts", "MockSTSTask", {"semantic similarity"}, True),
        ("classification", "MockClassificationTask", {"classification"}, True),
        ("clustering", "MockClusteringTask", {"search result"}, True),
        ("pair_classification", "MockPairClassificationTask", {"semantic similarity"}, True),
        ("summarization", "MockSummarizationTask", {"search result"}, False),
        ("bitext_mining", "MockBitextMiningTask", {"semantic similarity"}, False),
        ("reranking", "MockRerankingTask", {"question answering", "passage"}, True),
        ("retrieval", "MockRetrievalTask", {"question answering", "passage"}, True),
    ],
)
def test_mteb_task_scores_as_with_sentence_transformers(
    encoder: Encoder,
    capfd: pytest.CaptureFixture[str],
    module: str,
    name: str,
    heard: set[str],
    has_items: bool,
) -> None:
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
        task = make()
        task.load_data()
    listening = Listening(encoder)
    capfd.readouterr()
    result = evaluate(listening, task, model="minilm")
    assert capfd.readouterr() == ("", "")
    assert listening.heard == heard
    assert (result.model, result.dataset) == ("minilm", make.metadata.name)
    assert (result.task_type, result.metric) == (make.metadata.type, make.metadata.main_score)
    assert result.mteb_score == pytest.approx(theirs.get_score(), abs=1e-4)
    assert result.score.mean == pytest.approx(theirs.get_score(), abs=1e-4)
    assert bool(result.samples) == has_items


SENTENCES = {"This is a test sentence", "This is another test sentence"}
OTHERS = {"dette er en test sætning", "denne her matche ikke den ovenstående"}


@pytest.mark.parametrize(
    ("module", "name", "texts"),
    [
        ("classification", "MockMultilingualClassificationTask", SENTENCES),
        ("pair_classification", "MockPairClassificationTask", SENTENCES | OTHERS),
        ("clustering", "MockClusteringTask", SENTENCES | {"This is a third test sentence"}),
        ("retrieval", "MockMultilingualRetrievalTask", SENTENCES),
        ("retrieval", "MockRetrievalDialogTask", {"What is the capital of France?"}),
        ("reranking", "MockAggregatedTask", SENTENCES),
    ],
)
def test_recipe_is_judged_by_the_texts_of_its_mteb_tasks(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, texts: set[str]
) -> None:
    with quiet_mteb():
        task = getattr(import_module(f"mteb.mocks.mock_tasks.{module}"), name)()
    monkeypatch.setattr("pipelines.datasets.mteb_tasks.find_mteb_task", {name: task}.__getitem__)
    found = evaluation_queries((TestSet(name="judged", path=name, kind="mteb"),))
    assert texts <= set(found) and found == sorted(set(found))
    # A conversation is judged by all that is said in it.
    assert texts == set(found) or name == "MockRetrievalDialogTask"


def test_mteb_task_of_an_unknown_name_gets_names_like_it() -> None:
    with quiet_mteb():
        with pytest.raises(UserError, match=r"no task 'nfcorpu'; did you mean NFCorpus or "):
            find_mteb_task("nfcorpu")
        with pytest.raises(UserError, match="see mteb's list"):
            find_mteb_task("%%%%")
        assert find_mteb_task("SciFact").metadata.main_score == "ndcg_at_10"


def test_mteb_task_of_images_is_refused() -> None:
    with quiet_mteb(), pytest.raises(UserError, match="text tasks only"):
        find_mteb_task("CIFAR10")


@pytest.mark.parametrize("name", ["NFCorpus", "STS12", "CQADupstackRetrieval"])
def test_mteb_task_without_a_hub_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from huggingface_hub import constants

    # Otherwise the hub's client tries again for 23 s.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be fetched .* --beir") as caught:
        load_test_set(TestSet(name=name, path=name, kind="mteb"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"cannot be fetched"):
        evaluation_queries((TestSet(name=name, path=name, kind="mteb"),))
