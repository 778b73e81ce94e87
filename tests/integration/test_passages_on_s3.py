"""The step `passages` with its corpus and its run folder on S3, by real Ray tasks."""

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from cluster.session import connect
from cluster.steps import Run, Step
from cluster.storage import open_storage
from pipelines.corpus import units
from pipelines.corpus.passages import cut_corpus, make_passages
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.run.console import JsonLines

pytestmark = pytest.mark.slow
TEXT = "The harbour office opens at seven in the morning and closes after the last ferry"


@pytest.fixture
def ray_with_bucket(bucket: str) -> Iterator[str]:
    """Ray whose workers have the bucket's credentials."""
    import ray

    connect()
    yield bucket
    ray.shutdown()


def test_corpus_on_s3_becomes_passages_on_s3(
    ray_with_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"{TEXT} number {n}, {n * 7} and {n * 9}."}) for n in range(60)]
    lines[7], lines[9] = "{broken", lines[8]
    storage = open_storage(f"{ray_with_bucket}/corpus")
    storage.write_bytes("a.jsonl", "\n".join(lines).encode())
    storage.write_bytes("b.csv", ("text\n" + "\n".join(f"{TEXT} of {n}" for n in "abc")).encode())
    monkeypatch.setattr(units, "_FEWEST_BYTES", 1500)
    corpus = Corpus(CorpusConfig(path=f"{ray_with_bucket}/corpus", near_duplicate_threshold=None))
    step = Step(
        name="passages",
        config={},
        inputs=(),
        work=lambda context: make_passages(corpus, context),
        max_reject_share=0.5,
    )
    found = Run(f"{ray_with_bucket}/run", [step]).execute(JsonLines())["passages"]
    expected, rejects, _ = cut_corpus(corpus)
    assert found.read()["source"].to_pylist() == [each.source for each in expected]
    assert expected[0].source == "a.jsonl:1#1" and len(expected) == 61
    told = Counter(tuple(row.values()) for row in found.rejects().to_pylist())
    assert told == Counter(rejects)
    found.verify()
