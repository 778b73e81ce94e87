"""Near-duplicates among texts: passages of a corpus, queries of an LLM.

The rule, of which the order of the texts is a part and nothing else is: texts with the same value
in one band of their MinHash sketches meet, and each is compared with the first of those that it
meets. One that is so like it that the exact Jaccard similarity of their word trigrams reaches the
threshold is dropped. So nothing below the threshold is dropped; a text is compared at most once a
band, however many are alike; and bands can be looked at one by one, in any order and anywhere. It
does not matter whether the first was dropped itself: of texts that drift step by step, one may be
dropped for its likeness to one that is dropped too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import blake2b

import numpy as np

from actors.words import word_spans

SCHEME = "affine32"  # of datasketch: how it permutes
NUM_PERM = 128
_SEED = 1
_ODD = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> set[int]:
    """Returns the numbers of the rows that nearly repeat an earlier one, by the rule above.

    Raises:
        ValueError: `threshold` is not above 0 and at most 1.
    """
    hashes = band_hashes(texts, *num_bands(threshold))
    pairs: set[tuple[int, int]] = set()
    for band in hashes.T:
        rows = np.argsort(band, kind="stable")
        firsts = first_places(rows, band[rows])
        met = firsts != rows
        pairs.update(zip(firsts[met].tolist(), rows[met].tolist(), strict=True))
    known = cache(lambda row: trigram_hashes(texts[row]))
    drop: set[int] = set()
    for first, row in sorted(pairs):
        if row not in drop and jaccard(known(first), known(row)) >= threshold:
            drop.add(row)
    return drop


@cache
def num_bands(threshold: float) -> tuple[int, int]:
    """Returns into how many bands a sketch is cut for a threshold, and the values in each.

    Raises:
        ValueError: `threshold` is not above 0 and at most 1.
    """
    from datasketch import MinHashLSH

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: give a number above 0 and at most 1")
    # Bands for a little less than the threshold, because they err to both sides.
    index = MinHashLSH(threshold=0.9 * threshold, num_perm=NUM_PERM)
    return index.b, index.r


def band_hashes(texts: Iterable[str], num_bands: int, values_per_band: int) -> np.ndarray:
    """Returns the bands of each text's sketch as numbers, uint64 [texts, bands].

    Texts of which a share s of the trigrams of both is common have the same number in a band with
    a probability of about s to the power of `values_per_band`.
    """
    from datasketch import MinHash

    sketches = MinHash.generator(
        (
            [trigram.encode("utf-8", "surrogatepass") for trigram in _trigrams(text)]
            for text in texts
        ),
        num_perm=NUM_PERM,
        seed=_SEED,
        scheme=SCHEME,
    )
    size = num_bands * values_per_band
    values = np.array([sketch.hashvalues[:size] for sketch in sketches], np.uint64)
    values = values.reshape(-1, num_bands, values_per_band)
    hashes: np.ndarray = np.arange(1, num_bands + 1, dtype=np.uint64) * _ODD
    for number in range(values_per_band):
        hashes = (hashes ^ values[:, :, number]) * _ODD
        hashes ^= hashes >> np.uint64(29)
    return hashes


def first_places(places: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Returns, for each row, the place of the first one with the same keys; rows are sorted."""
    if not len(places):
        return places
    is_first = np.ones(len(places), bool)
    is_first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(places)), 0))
    return np.take(places, starts)


def trigram_hashes(text: str) -> np.ndarray:
    """Returns the hashes of a text's word trigrams, sorted and each once: uint64 [trigrams]."""
    hashes = b"".join(
        blake2b(trigram.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for trigram in _trigrams(text)
    )
    return np.unique(np.frombuffer(hashes, "<u8"))


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sets that `trigram_hashes` gave."""
    both = len(np.intersect1d(left, right, assume_unique=True))
    return both / (len(left) + len(right) - both)


def _trigrams(text: str) -> set[str]:
    text = text.casefold()
    words = [text[start:end] for start, end in word_spans(text)]
    return {" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))}
