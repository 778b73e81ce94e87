import numpy as np
import pytest

from pipelines.corpus.near_duplicates import first_places, near_duplicates

WORDS = [f"word{number}" for number in range(1000)]


def words(start: int, end: int) -> str:
    return " ".join(WORDS[start:end])


def test_near_duplicates_drop_later_copies_only() -> None:
    original = words(0, 100)
    edited = original.replace("word50", "changed")
    assert near_duplicates([original, words(200, 300), edited, original.upper()]) == {2, 3}


def test_near_duplicates_respect_the_threshold_exactly() -> None:
    # 98 trigrams each, 95 of them shared: Jaccard 95 / 101.
    pair = [words(0, 100), words(3, 103)]
    assert near_duplicates(pair, threshold=95 / 101) == {1}
    assert near_duplicates(pair, threshold=95 / 101 + 1e-9) == set()


def test_near_duplicate_of_a_dropped_row_is_dropped_too() -> None:
    # Each is like its neighbour; the last is unlike the first, which is the only one kept.
    drift = [words(start, start + 100) for start in (0, 8, 16)]
    assert near_duplicates(drift[::2], threshold=0.8) == set()
    assert near_duplicates(drift, threshold=0.8) == {1, 2}


def test_row_is_compared_once_a_band_however_many_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    def jaccard_noted(left: np.ndarray, right: np.ndarray) -> float:
        compared.append(None)
        return 0.0

    monkeypatch.setattr("pipelines.corpus.near_duplicates.jaccard", jaccard_noted)
    assert near_duplicates([words(0, 50)] * 300) == set()
    assert len(compared) == 299


def test_first_of_equal_keys_is_found_in_sorted_rows() -> None:
    places = np.array([3, 9, 1, 4, 2])
    keys = np.array([5, 5, 6, 6, 6]), np.array([0, 0, 1, 1, 2])
    assert first_places(places, *keys).tolist() == [3, 3, 1, 1, 2]
    assert first_places(places[:0], keys[0][:0]).tolist() == []


def test_near_duplicates_refuse_an_impossible_threshold() -> None:
    for threshold in (0, 1.01, -1):
        with pytest.raises(ValueError, match=f"threshold={threshold}"):
            near_duplicates(["a"], threshold=threshold)
    assert near_duplicates(["a b", "a b", "a c"], threshold=1) == {1}


def test_near_duplicates_are_the_same_in_every_run() -> None:
    # Pairs just alike enough, 58 trigrams of 70: the sketches miss some, and always the same.
    texts = [
        " ".join(f"w{pair}x{place}" for place in range(start, start + 66))
        for pair in range(80)
        for start in (0, 6)
    ]
    missed = [5, 15, 19, 45, 77, 85, 95, 107, 115, 117, 125, 129, 143, 153]
    assert sorted({*range(1, 160, 2)} - near_duplicates(texts)) == missed
