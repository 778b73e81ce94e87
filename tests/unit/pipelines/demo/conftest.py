from pathlib import Path

import pytest

from cluster.storage import open_storage
from pipelines.corpus.cutting import Passage
from pipelines.corpus.passages import cut_corpus
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.demo.data import write_documents


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's documents, written once."""
    folder = tmp_path_factory.mktemp("demo")
    write_documents(open_storage(folder))
    return folder / "documents.jsonl"


@pytest.fixture(scope="session")
def documentation(documents: Path) -> list[Passage]:
    """The demo's corpus, as the step `passages` makes it."""
    passages, _, _ = cut_corpus(Corpus(CorpusConfig(path=str(documents))))
    return passages
