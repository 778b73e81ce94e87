import pytest

from pipelines.corpus.cutting import Passage, near_duplicates, passages_of, reject_reason
from pipelines.demo.python_documentation import python_documentation


@pytest.fixture(scope="session")
def documentation() -> list[Passage]:
    """The demo's corpus, as the step `passages` makes it."""
    passages = [
        passage
        for document in python_documentation()
        for passage in passages_of(document, max_words=160, min_words=20)
        if reject_reason(passage.text) is None
    ]
    drop = near_duplicates([passage.text for passage in passages], 0.8)
    return [passage for row, passage in enumerate(passages) if row not in drop]
