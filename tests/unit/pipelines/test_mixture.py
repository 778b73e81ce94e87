from collections import Counter

from pipelines.mixture import Source, batches


def source(name: str, num_rows: int, weight: float) -> Source:
    rows = [{"dataset": name, "query_id": f"{name}{n}"} for n in range(num_rows)]
    return Source(name=name, weight=weight, rows=rows)


def test_batch_is_of_one_set_and_sets_follow_their_weights() -> None:
    made = list(batches([source("a", 50, 3.0), source("b", 50, 1.0)], 5, 400, seed=1))
    assert all(len({row["dataset"] for row in batch}) == 1 for batch in made)
    counts = Counter(batch[0]["dataset"] for batch in made)
    assert 0.68 < counts["a"] / 400 < 0.82


def test_every_row_comes_once_before_any_comes_twice() -> None:
    made = list(batches([source("a", 12, 1.0)], 4, 6, seed=0))
    ids = [row["query_id"] for batch in made for row in batch]
    assert len(set(ids[:12])) == 12 and set(ids[12:]) == set(ids[:12])
    assert ids[:12] != ids[12:]


def test_batches_are_the_same_for_the_same_seed() -> None:
    def ids(seed: int) -> list[str]:
        made = batches([source("a", 9, 1.0), source("b", 7, 1.0)], 3, 10, seed)
        return [row["query_id"] for batch in made for row in batch]

    assert ids(4) == ids(4) != ids(5)
