"""Near-duplicates among texts: passages of a corpus, queries of an LLM."""

from collections.abc import Sequence

from actors.words import word_spans


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> set[int]:
    """Returns the numbers of the rows that repeat an earlier, kept row.

    Candidates come from MinHash-LSH over word trigrams and are confirmed by the exact Jaccard
    similarity of the trigram sets, so nothing below the threshold is dropped.

    Raises:
        ValueError: `threshold` is not above 0 and at most 1.
    """
    from datasketch import MinHash, MinHashLSH

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: give a number above 0 and at most 1")
    # The index is asked for a little less than the threshold, because it errs to both sides.
    index = MinHashLSH(threshold=0.9 * threshold, num_perm=128)
    sketches = MinHash.generator(
        (
            [trigram.encode("utf-8", "surrogatepass") for trigram in _trigrams(text)]
            for text in texts
        ),
        num_perm=128,
        seed=1,
        scheme="affine32",
    )
    drop: set[int] = set()
    for row, sketch in enumerate(sketches):
        trigrams = _trigrams(texts[row])
        if any(
            _jaccard(trigrams, _trigrams(texts[kept])) >= threshold for kept in index.query(sketch)
        ):
            drop.add(row)
        else:
            index.insert(row, sketch)
    return drop


def _trigrams(text: str) -> set[str]:
    text = text.casefold()
    words = [text[start:end] for start, end in word_spans(text)]
    return {" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def _jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)
