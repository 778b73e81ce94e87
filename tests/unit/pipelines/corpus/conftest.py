import pytest

from pipelines.corpus.passages import Passage
from pipelines.corpus.python_documentation import python_passages


@pytest.fixture(scope="session")
def documentation() -> list[Passage]:
    return python_passages()
