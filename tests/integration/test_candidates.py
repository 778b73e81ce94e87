"""Each query's neighbours through real encoder and index actors."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.index_actor import IndexActor
from actors.lexical_index import LexicalIndex
from actors.passage_index import ApproximateIndex
from cluster.artifacts import Artifact, Json, write_shards
from cluster.errors import TokayError
from cluster.stages import StageResources
from cluster.steps import Run, Step, StepContext
from cluster.storage import LocalStorage
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.ids import passage_id
from pipelines.mining import candidates as mining
from pipelines.mining.candidates import CandidatesConfig, find_candidates
from pipelines.mining.embeddings import embed_passages
from pipelines.mining.hybrid import LexicalConfig
from pipelines.records import PASSAGE, QUERY
from pipelines.run.console import JsonLines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TEXTS = [f"{animal} {verb}" for animal in ("Cats", "Owls", "Bees") for verb in ("sleep", "eat")]
IDS = [passage_id("", text) for text in TEXTS]
RETRIEVER = EncoderConfig(model="embedded:all-MiniLM-L6-v2", max_tokens=16)


def written(rows: list[dict[str, Any]], schema: pa.Schema) -> Any:
    def work(context: StepContext) -> dict[str, Json]:
        write_shards(context.storage, pa.Table.from_pylist(rows, schema=schema), 2)
        return {}

    return work


def candidates(
    folder: Path, lexical: LexicalConfig | None = None, num_indexes: int = 3, kind: Any = "auto"
) -> Artifact:
    passages = [
        {"id": id_, "title": "", "text": text, "source": "a#1"}
        for id_, text in zip(IDS, TEXTS, strict=True)
    ]
    queries = [
        {"id": f"q{n}", "seed_id": IDS[n], "task": "search result", "query": TEXTS[n].lower()}
        for n in range(4)
    ]
    one, index = (
        StageResources(shards_in_flight=1),
        StageResources(num_actors=num_indexes, num_cpus=0),
    )
    steps = [
        Step(name="passages", config={}, inputs=(), work=written(passages, PASSAGE)),
        Step(name="queries", config={}, inputs=(), work=written(queries, QUERY)),
        Step(
            name="embeddings",
            config={},
            inputs=("passages",),
            work=lambda context: embed_passages(RETRIEVER, one, context),
        ),
        Step(
            name="candidates",
            config={},
            inputs=("queries", "embeddings", "passages"),
            work=lambda context: find_candidates(
                CandidatesConfig(num_candidates=3, lexical=lexical, index=kind),
                RETRIEVER,
                one,
                index,
                context,
            ),
        ),
    ]
    return Run(str(folder), steps).execute(JsonLines())["candidates"]


class DyingIndex(IndexActor):
    """Runs out of memory over every search, as its process sees it."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        os._exit(1)


class IndexThatDiesOnce(IndexActor):
    """Loses its process over the first search; notes each building in the run's folder."""

    def build(self) -> ApproximateIndex:
        with (self._folder / "built").open("a") as file:
            file.write("x")
        return super().build()

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            (self._folder / "died").touch(exist_ok=False)
        except FileExistsError:
            return super().search(queries, k)
        os._exit(1)

    @property
    def _folder(self) -> Path:
        assert isinstance(self._step, LocalStorage)
        return self._step.folder.parent


def test_index_whose_actor_starts_anew_is_loaded(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "IndexActor", IndexThatDiesOnce)
    found = candidates(tmp_path, num_indexes=1, kind="ivf")
    assert (tmp_path / "died").exists()
    assert (tmp_path / "built").read_text() == "x"
    assert found.manifest.metrics["index"] == ["ivf"]
    assert {row["seed_rank"] for row in found.read().to_pylist()} == {1}
    assert not (tmp_path / "candidates" / "work").exists()


@pytest.mark.chaos
def test_index_that_dies_again_and_again_ends_the_step(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "IndexActor", DyingIndex)
    told = "^step 'candidates': an actor died 4 times on nodes that are still alive"
    with pytest.raises(TokayError, match=told):
        candidates(tmp_path)


def test_candidates_of_three_indexes_are_those_of_one(ray_session: None, tmp_path: Path) -> None:
    found = candidates(tmp_path / "run")
    encoder = load_encoder(RETRIEVER)
    passages = encoder.encode_passages(TEXTS, [""] * len(TEXTS))
    for number, row in enumerate(found.read().to_pylist()):
        text = encoder.templates.format_query(TEXTS[number].lower(), task="search result")
        scores = passages @ encoder.encode([text])[0]
        assert row["candidate_ids"] == [IDS[place] for place in np.argsort(-scores)[:3]]
        assert row["seed_rank"] == 1
    metrics = found.manifest.metrics
    assert (metrics["index"], metrics["index_num_on_gpu"]) == (["flat"], 0)
    assert not any(row["lexical"] or row["hybrid"] for row in found.read().to_pylist())

    bm25 = LexicalConfig(weight=2, stemmer="english")
    of_both = []
    for number in (1, 3):  # over the same embeddings
        shutil.rmtree(tmp_path / "run" / "candidates")
        of_both.append(candidates(tmp_path / "run", bm25, number).read().to_pylist())
    assert of_both[0] == of_both[1]
    index = LexicalIndex(TEXTS, stemmer="english")
    for number, row in enumerate(of_both[0]):
        text = encoder.templates.format_query(TEXTS[number].lower(), task="search result")
        near, words = passages @ encoder.encode([text])[0], index.scores(TEXTS[number])
        sums = (near - near.mean()) / near.std() + 2 * (words - words.mean()) / words.std()
        best = np.argsort(-sums)[:3]
        assert row["candidate_ids"] == [IDS[place] for place in best]
        np.testing.assert_allclose(row["lexical"], words[best], rtol=1e-6)
        np.testing.assert_allclose(row["hybrid"], sums[best], rtol=1e-4)
        np.testing.assert_allclose(row["similarities"], near[best], rtol=1e-5)
