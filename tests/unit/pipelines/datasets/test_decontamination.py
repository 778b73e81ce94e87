import random

import pytest

from pipelines.datasets.decontamination import Decontamination
from pipelines.fret.overlap import words

QUERIES = ["How do bees talk to each other?", "the quick brown fox jumps over the lazy dog today"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("how do bees talk to each other", "repeats an evaluation query"),
        ("how do bees really talk to each other", "nearly repeats an evaluation query"),
        (
            "he says that the quick brown fox jumps over the lazy cat and that nobody minds it",
            "shares words with an evaluation query",
        ),
        ("how do wasps talk to their queen", None),
        ("the quick brown fox jumps over nothing", None),
        ("", None),
    ],
)
def test_text_that_repeats_an_evaluation_query_is_found(text: str, reason: str | None) -> None:
    found = Decontamination(QUERIES, max_overlap=0.8, max_shared_words=8).repeated(text)
    assert (found and found[0]) == reason


def test_overlap_is_found_as_by_comparing_with_every_query() -> None:
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices("abcdefgh", k=draw.randrange(1, 9)))

    queries, found = [text() for _ in range(60)], 0
    index = Decontamination(queries, max_overlap=0.6, max_shared_words=100)
    for _ in range(300):
        given = text()
        overlaps = [
            len(words(given) & words(query)) / len(words(given) | words(query)) for query in queries
        ]
        assert (index.repeated(given) is not None) == (max(overlaps) > 0.6)
        found += max(overlaps) > 0.6
    assert 0 < found < 300
