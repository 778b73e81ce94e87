from collections import Counter

import numpy as np

from pipelines.mixture.sampling import Rows, draw_batches


def rows(name: str, num_rows: int, weight: float = 1.0, groups: list[int] | None = None) -> Rows:
    keys = np.arange(2 * num_rows).reshape(num_rows, 2)
    return Rows(
        name=name, weight=weight, keys=keys, groups=None if groups is None else np.array(groups)
    )


def test_sets_follow_their_weights() -> None:
    weights = np.array([3.0, 1.0, 0.5])
    sets = [rows(name, 50, weight) for name, weight in zip("abc", weights, strict=True)]
    counts = Counter(place for place, _ in draw_batches(sets, 5, 9000, seed=1))
    expected = 9000 * weights / weights.sum()
    observed = np.array([counts[place] for place in range(3)])
    assert ((observed - expected) ** 2 / expected).sum() < 13.8  # chi-square, p = 0.001


def test_every_row_comes_once_before_any_comes_twice() -> None:
    made = np.concatenate([batch for _, batch in draw_batches([rows("a", 12)], 4, 6, seed=0)])
    assert sorted(made[:12]) == sorted(made[12:]) == list(range(12))
    assert list(made[:12]) != list(made[12:])


def test_batches_are_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[list[int]]:
        made = draw_batches([rows("a", 9), rows("b", 7)], 3, 10, seed)
        return [[place, *batch.tolist()] for place, batch in made]

    assert drawn(4) == drawn(4) != drawn(5)


def test_order_of_a_set_does_not_depend_on_the_others() -> None:
    def order(sets: list[Rows]) -> list[int]:
        made = draw_batches(sets, 3, 40, seed=0)
        return np.concatenate([batch for place, batch in made if place == 0]).tolist()

    alone, together = order([rows("a", 30)]), order([rows("a", 30), rows("b", 30)])
    assert 0 < len(together) < len(alone) and alone[: len(together)] == together


def test_batch_does_not_repeat_a_query_or_a_positive() -> None:
    # Ten queries with four positives each: 40 rows, so that a plain shuffle repeats queries.
    keys = np.array([[query, 100 + 4 * query + n] for query in range(10) for n in range(4)])
    (source,) = [Rows(name="a", weight=1.0, keys=keys)]
    made = [batch for _, batch in draw_batches([source], 5, 80, seed=0)]
    for batch in made:
        assert len({query for query, _ in keys[batch]}) == 5
    counts = Counter(np.concatenate(made).tolist())
    assert len(counts) == 40 and max(counts.values()) - min(counts.values()) <= 2


def test_batch_is_full_where_repeats_cannot_be_avoided() -> None:
    keys = np.array([[0, n] for n in range(1, 9)])
    made = [batch for _, batch in draw_batches([Rows(name="a", weight=1, keys=keys)], 4, 4, seed=0)]
    assert [len(set(batch.tolist())) for batch in made] == [4, 4, 4, 4]
    assert sorted(np.concatenate(made[:2])) == list(range(8))


def test_batch_is_no_larger_than_its_set() -> None:
    assert [len(batch) for _, batch in draw_batches([rows("a", 3)], 8, 2, seed=0)] == [3, 3]


def test_groups_are_drawn_equally_often_whatever_their_size() -> None:
    groups = np.repeat([0, 1, 2], [900, 90, 10])
    made = draw_batches([rows("a", 1000, groups=groups.tolist())], 10, 600, seed=0)
    counts = Counter(groups[np.concatenate([batch for _, batch in made])].tolist())
    assert sum((counts[group] - 2000) ** 2 / 2000 for group in range(3)) < 13.8


def test_four_batches_of_rows_are_looked_at_for_one_that_repeats_nothing() -> None:
    # The set's order is known, so the one row that shares no key can be put just within or beyond.
    order = np.random.default_rng([0, *b"a"]).permutation(10).tolist()

    def first_batch(other: int) -> list[int]:
        keys = np.zeros((10, 1), np.int64)
        keys[other] = 1
        ((_, batch),) = draw_batches([Rows(name="a", weight=1, keys=keys)], 2, 1, seed=0)
        return batch.tolist()

    assert first_batch(order[8]) == [order[0], order[8]]  # the eighth that is looked at
    assert first_batch(order[9]) == [order[0], order[1]]
