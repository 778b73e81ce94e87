"""mteb's named tasks: its own small mock tasks stand in for data that only the hub has."""

from collections.abc import Sequence
from importlib import import_module

import numpy as np
import pytest

from actors.encoder import Encoder
from actors.text_encoder import TextEncoder
from cluster.errors import UserError
from pipelines.datasets.mteb_tasks import find_mteb_task, find_mteb_tasks, quiet_mteb
from pipelines.datasets.test_sets import TestSet, evaluation_queries, load_test_sets
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
    with quiet_mteb():
        with pytest.raises(UserError, match="text tasks only"):
            find_mteb_task("CIFAR10")
        with pytest.raises(UserError, match="text tasks only"):
            find_mteb_tasks("MIEB(lite)")


def test_benchmark_stands_for_its_tasks_in_its_own_splits_and_languages() -> None:
    with quiet_mteb():
        tasks = {task.metadata.name: task for task in find_mteb_tasks("MTEB(eng, v1)")}
        again = find_mteb_tasks("MTEB(eng, v1)")
        assert [task.metadata.name for task in find_mteb_tasks("SciFact")] == ["SciFact"]
    assert len(tasks) == 56
    assert tasks["MSMARCO"].eval_splits == ["dev"]
    assert tasks["MassiveIntentClassification"].hf_subsets == ["en"]
    # What is loaded into one is not kept for the process's life.
    assert not {*map(id, tasks.values())} & {*map(id, again)}


def test_recipe_is_judged_by_all_tasks_of_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    import mteb
    from mteb.benchmarks import Benchmark

    with quiet_mteb():
        mocks = (
            import_module("mteb.mocks.mock_tasks.clustering"),
            import_module("mteb.mocks.mock_tasks.pair_classification"),
        )
        tasks = [mocks[0].MockClusteringTask(), mocks[1].MockPairClassificationTask()]
    monkeypatch.setattr(mteb, "get_benchmark", {"both": Benchmark(name="both", tasks=tasks)}.get)
    both = TestSet(name="both", path="both", kind="mteb")
    loaded = list(load_test_sets([both]))
    assert [(each.name, task.metadata.name) for each, task in loaded] == [
        ("both", task.metadata.name) for task in tasks
    ]
    assert not any(task.data_loaded for task in tasks)
    assert set(evaluation_queries((both,))) > SENTENCES | {"This is a third test sentence"}


@pytest.mark.parametrize("name", ["NFCorpus", "STS12", "CQADupstackRetrieval"])
def test_mteb_task_without_a_hub_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from huggingface_hub import constants

    # Otherwise the hub's client tries again for 23 s.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be fetched .* --beir") as caught:
        list(load_test_sets([TestSet(name=name, path=name, kind="mteb")]))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"cannot be fetched"):
        evaluation_queries((TestSet(name=name, path=name, kind="mteb"),))
