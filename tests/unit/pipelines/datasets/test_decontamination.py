import random

import numpy as np
import pytest

from pipelines.datasets import decontamination
from pipelines.datasets.decontamination import Decontamination, DecontaminationConfig, words

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
    found = Decontamination(QUERIES).repeated(text)
    assert (found and found[0]) == reason


def test_overlap_is_found_as_by_comparing_with_every_query() -> None:
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices("abcdefgh", k=draw.randrange(1, 9)))

    queries, found = [text() for _ in range(60)], 0
    index = Decontamination(queries, DecontaminationConfig(max_overlap=0.6, max_shared_words=100))
    for _ in range(300):
        given = text()
        overlaps = [
            len(words(given) & words(query)) / len(words(given) | words(query)) for query in queries
        ]
        assert (index.repeated(given) is not None) == (max(overlaps) > 0.6)
        found += max(overlaps) > 0.6
    assert 0 < found < 300


@pytest.mark.parametrize(
    ("text", "overlap"),
    [
        ("How do I copy a file?", 1.0),
        ("how do I copy a folder", 5 / 7),
        ("completely different words", 0.0),
    ],
)
def test_overlap_is_jaccard_over_words(text: str, overlap: float) -> None:
    index = Decontamination(["how do i copy a FILE", "weather in Rome"])
    assert index.most_similar(text)[0] == pytest.approx(overlap)


def test_highest_overlap_equals_the_plain_computation() -> None:
    draw = np.random.default_rng(0)
    # Few words, so that many texts are equally similar and many repeat a word.
    texts, queries = (
        [" ".join(f"w{n}" for n in draw.integers(0, 9, size)) for size in draw.integers(0, 7, 300)]
        for _ in range(2)
    )
    index = Decontamination(texts)

    def plain(query: str) -> tuple[float, str]:
        given = words(query)
        shared = [(len(given & words(t)) / (len(given | words(t)) or 1), t) for t in texts]
        return max((each for each in shared if each[0] > 0), default=(0.0, ""))

    found = [index.most_similar(query) for query in queries]
    assert found == [plain(query) for query in queries]
    assert {0.0, 1.0} < {overlap for overlap, _ in found}
    assert Decontamination([]).most_similar("w1") == (0.0, "")


def test_shared_run_of_words_is_found_whatever_surrounds_it() -> None:
    index = Decontamination(
        ["How do I copy, quickly, a large file?"], DecontaminationConfig(max_shared_words=4)
    )
    assert index.shared_run("please copy quickly a LARGE one") is not None
    assert index.shared_run("copy a large file quickly") is None
    assert index.shared_run("copy") is None


def test_runs_are_told_apart_where_their_hashes_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontamination, "hash", lambda run: 0, raising=False)
    index = Decontamination(
        ["a b c d", "b c d e", "x y z"], DecontaminationConfig(max_shared_words=3)
    )
    assert index.shared_run("it is a b c") == "a b c d"
    assert index.shared_run("it is b c d") == "b c d e"  # of two the last
    assert index.shared_run("c b a") is None


def test_run_of_a_word_that_no_query_has_is_none() -> None:
    index = Decontamination(["a b c d"], DecontaminationConfig(max_shared_words=3))
    assert index.shared_run("a b unknown c d") is None


def test_texts_are_judged_alike_when_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontamination, "_MAX_REMEMBERED", 2)
    index = Decontamination(QUERIES)
    texts = [QUERIES[0], "how do wasps talk", "why is the sky blue", QUERIES[1]]
    first, again = ([index.repeated(text) for text in texts] for _ in range(2))
    assert first == again
    assert [found is not None for found in first] == [True, False, False, True]
    assert len(index._judged) <= 2


def test_index_holds_numbers_of_few_bytes_a_word() -> None:
    draw = random.Random(2)
    vocabulary = [f"w{number}" for number in range(2000)]
    queries = [" ".join(draw.choices(vocabulary, k=40)) for _ in range(500)]
    index = Decontamination(queries)
    num_bytes = sum(held.nbytes for held in vars(index).values() if isinstance(held, np.ndarray))
    num_words, num_runs = sum(len(words(query)) for query in queries), 500 * 33
    # Of each query and each word of the vocabulary a few more.
    assert num_bytes <= 8 * num_words + 12 * num_runs + 12 * 500 + 8 * 2001


def test_highest_overlap_is_that_of_any_text() -> None:
    draw = random.Random(1)
    queries, texts = (
        [" ".join(draw.choices("abcdefghijkl", k=draw.randrange(0, 9))) for _ in range(50)]
        for _ in range(2)
    )
    index = Decontamination(queries)
    for few in (texts[:1], texts[:10], texts):
        assert index.highest_overlap(few) == max(index.most_similar(text)[0] for text in few)
    assert index.highest_overlap([]) == 0.0


def test_equal_words_are_refused_at_any_threshold() -> None:
    index = Decontamination(["bees talk loudly"], DecontaminationConfig(max_overlap=1))
    assert index.repeated("Talk loudly, bees!") == (
        "repeats an evaluation query",
        "bees talk loudly",
    )
    assert index.repeated("bees talk very loudly") is None
