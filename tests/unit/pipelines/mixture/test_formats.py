import pyarrow as pa

from pipelines.datasets.labelled_examples import Example, Target
from pipelines.mixture.formats import Formatter
from pipelines.records import EXAMPLE


def example(query: str, positive: Target, *negatives: Target, task: str = "qa") -> Example:
    return Example(
        task=task,
        query=query,
        positive=positive,
        negatives=negatives,
        query_id=query,
        positive_id=positive.text,
        teacher_scores=tuple(2.0 / (n + 1) for n in range(1 + len(negatives))),
    )


def made(formatter: Formatter, examples: list[Example], symmetric: bool = False) -> pa.Table:
    (texts,) = formatter.texts(examples, dataset="a", symmetric=symmetric)
    table = formatter.with_tokens(texts, symmetric=symmetric)
    return table.add_column(0, "batch", pa.array([0] * table.num_rows, pa.int32())).cast(EXAMPLE)


def test_asymmetric_example_reads_as_in_the_paper(formatter: Formatter) -> None:
    given = example("how do bees talk", Target("By dance.", "Bees"), Target("Not at all."))
    (row,) = made(formatter, [given]).to_pylist()
    assert row["query"] == "task: qa | query: how do bees talk"
    assert row["positive"] == "title: Bees | text: By dance."
    assert row["negatives"] == ["title: none | text: Not at all."]
    assert row["query_tokens"] == [1, 5, 2, 1, 6, 3, 2, 4, 4, 2]
    assert row["positive_tokens"] == [1, 6, 4, 1, 5, 2, 6, 2]
    assert row["negative_tokens"] == [[1, 6, 4, 1, 5, 3, 2, 4, 2]]
    assert row["teacher_scores"] == [2, 1]
    assert not row["symmetric"]


def test_symmetric_targets_read_like_queries_and_are_cut_like_them(formatter: Formatter) -> None:
    long = " ".join(["word"] * 20)
    given = example("a", Target(long), Target("b"), task="semantic similarity")
    (row,) = made(formatter, [given], symmetric=True).to_pylist()
    assert row["positive"] == f"task: semantic similarity | query: {long}"
    assert row["negatives"] == ["task: semantic similarity | query: b"]
    assert len(row["positive_tokens"]) == formatter.max_query_tokens
    (other,) = made(formatter, [given]).to_pylist()
    assert len(other["positive_tokens"]) == formatter.max_passage_tokens


def test_tokens_stay_with_their_rows_whatever_the_number_of_negatives(formatter: Formatter) -> None:
    words = ["a", "bb", "ccc", "dddd"]
    given = [
        example(word, Target(word), *[Target(word * n) for n in range(1, count + 1)])
        for word, count in zip(words, [2, 0, 3, 1], strict=True)
    ]
    for word, count, row in zip(
        words, [2, 0, 3, 1], made(formatter, given).to_pylist(), strict=True
    ):
        assert row["query_tokens"][-2] == row["positive_tokens"][-2] == len(word)
        assert [tokens[-2] for tokens in row["negative_tokens"]] == [
            len(word) * n for n in range(1, count + 1)
        ]


def test_equal_texts_are_tokenised_once(formatter: Formatter) -> None:
    made(formatter, [example("a", Target("b"), Target("b")) for _ in range(3)])
    assert len(formatter.encoder.texts) == 3  # a query, a positive, a negative
