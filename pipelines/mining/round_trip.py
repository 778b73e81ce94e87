"""The round trip: a query has to bring its seed passage back, or it is dropped unscored."""

from collections.abc import Sequence


def seed_rank(seed_id: str, nearest: Sequence[str]) -> int:
    """Returns the seed's rank among the nearest passages, from 1; 0 where it is not among them."""
    return nearest.index(seed_id) + 1 if seed_id in nearest else 0


def failed_round_trip(rank: int, max_seed_rank: int | None) -> str | None:
    """Returns the reason to drop a query whose seed has this rank, if there is one.

    >>> failed_round_trip(3, 3), failed_round_trip(4, 3), failed_round_trip(0, None)
    (None, 'round trip failed', None)
    """
    passed = max_seed_rank is None or 0 < rank <= max_seed_rank
    return None if passed else "round trip failed"
