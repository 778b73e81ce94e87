import random

import numpy as np
import pytest

from cluster import key_filter
from cluster.key_filter import KeyFilter, codes


@pytest.mark.parametrize("num_keys", [0, 1, 1000, 200_000])
def test_all_keys_pass_that_were_added_and_few_others(num_keys: int) -> None:
    drawn = random.Random(1)
    ids = [f"{drawn.getrandbits(128):032x}" for _ in range(num_keys + 100_000)]
    added, others = codes(ids[:num_keys]), codes(ids[num_keys:])
    found = KeyFilter.of(num_keys, np.array_split(added, 7))
    assert found.passes(added).all()
    assert found.passes(others).mean() <= 1 / 64
    assert found.share == pytest.approx(found.passes(others).mean(), abs=0.003)


def test_of_many_keys_more_pass_and_its_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_filter, "_MOST_BITS", 18)
    added, others = (
        np.random.default_rng(n).integers(2**32, size=10**5, dtype="<u4") for n in (0, 1)
    )
    found = KeyFilter.of(len(added), [added])
    assert found._bits.nbytes == 2**15
    assert found.passes(added).all()
    expected = 1 - np.exp(-len(added) / 2**18)
    assert found.passes(others).mean() == pytest.approx(expected, abs=0.01)
    assert found.share == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("num_bits", [3, 16, 28])
def test_the_highest_codes_have_their_bits(num_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_filter, "_FEWEST_BITS", num_bits)
    monkeypatch.setattr(key_filter, "_MOST_BITS", num_bits)
    edges = np.array([0, 2**32 - 1], np.uint32)
    found = KeyFilter.of(2, [edges[:1]])
    assert found.passes(edges).tolist() == [True, False]
    found = KeyFilter.of(2, [edges[1:]])
    assert found.passes(edges).tolist() == [False, True]
