import subprocess
import sys

import pytest

from pipelines.corpus.cutting import (
    Document,
    clean,
    cut,
    passage_id,
    passages_of,
    reject_reason,
)
from pipelines.words import num_words

WORDS = [f"word{number}" for number in range(1000)]


def words(start: int, end: int) -> str:
    return " ".join(WORDS[start:end])


def test_clean_joins_lines_and_keeps_paragraphs() -> None:
    assert clean("one\r\n  two\t three\n\n\n \nfour\n") == "one two three\n\nfour"


def test_clean_normalises_unicode_and_drops_invisible_characters() -> None:
    assert clean("cafe\u0301 a\u2060b\x00c\ufeff\xa0d \ud800 har\u00adbour") == (
        "caf\u00e9 abc d harbour"
    )
    kept = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u06dd \U00031350"
    assert clean(kept) == kept  # a joiner, a visible format character, a letter of Unicode 15


@pytest.mark.parametrize("space", "\v\f\x1c\x1f\x85\u00a0\u2028\u200b\u3000\r")
def test_clean_parts_words_at_every_space(space: str) -> None:
    assert clean(f"one{space}two") == "one two"


def test_clean_keeps_quotations_and_marks_of_plain_text() -> None:
    text = "Dear list,\n\n>>> The *night* ferry was cancelled [1]_.\n>>> They say `so`.\nI agree."
    assert clean(text) == (
        "Dear list,\n\n>>> The *night* ferry was cancelled [1]_. >>> They say `so`. I agree."
    )


def test_clean_parts_paragraphs_at_the_paragraph_separator() -> None:
    assert clean("one\u2029two\r\rthree") == "one\n\ntwo\n\nthree"


def test_cut_keeps_short_text_whole() -> None:
    assert cut("a b\n\nc d") == ["a b\nc d"]
    assert cut("") == []


def test_cut_never_exceeds_the_limit_and_loses_no_word() -> None:
    long_paragraph = " ".join(f"{words(start, start + 17)}." for start in range(0, 400, 17))
    text = "\n\n".join([words(0, 50), long_paragraph, words(400, 700), "end of it", words(1, 90)])
    pieces = cut(text, max_words=60, min_words=10)
    assert max(num_words(piece) for piece in pieces) <= 60
    assert " ".join(pieces).split() == text.split()


def test_cut_prefers_paragraph_then_sentence_borders() -> None:
    first, second = words(0, 40), words(40, 80)
    assert cut(f"{first}\n\n{second}", max_words=60, min_words=10) == [first, second]
    sentences = f"{words(0, 40)}. {words(40, 80)}."
    assert cut(sentences, max_words=60, min_words=10) == [f"{first}.", f"{second}."]


def test_cut_evens_out_a_short_last_piece() -> None:
    text = "\n\n".join([words(0, 30), words(30, 60), words(60, 65)])
    assert cut(text, max_words=60, min_words=10) == [
        words(0, 30),
        f"{words(30, 60)}\n{words(60, 65)}",
    ]


def test_cut_keeps_what_stands_behind_a_sentence() -> None:
    text = f"({words(0, 40)}.) {words(40, 80)}."
    assert cut(text, max_words=60, min_words=10) == [f"({words(0, 40)}.)", f"{words(40, 80)}."]


def test_cut_parts_unspaced_scripts_at_sentences_then_words() -> None:
    assert [len(piece) for piece in cut("漢字" * 50, max_words=40, min_words=5)] == [80, 20]
    sentence = "朝市では魚がよく売れる。"  # of seven words
    assert cut(sentence * 8, max_words=16, min_words=5) == [sentence * 2] * 4


def test_cut_parts_long_thai_sentences_at_spaces() -> None:
    phrase = "การเรียนรู้ของเครื่องเป็นสาขาหนึ่งของปัญญาประดิษฐ์"
    pieces = cut(" ".join([phrase] * 6), max_words=2 * num_words(phrase) + 1, min_words=5)
    assert pieces == [f"{phrase} {phrase}"] * 3


def test_cut_parts_unbroken_strings() -> None:
    assert len(cut("x" * 10_000, max_words=40, min_words=5)) == 5


def test_cut_refuses_limits_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="min_words=100"):
        cut("a", max_words=150, min_words=100)


def test_passage_id_is_the_same_in_another_process() -> None:
    code = "from pipelines.corpus.cutting import passage_id; print(passage_id('a', 'b\\u00e9'))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == passage_id("a", "be\u0301") == "d2611daf61365013"


def test_passage_id_depends_on_title_and_text_apart() -> None:
    assert len({passage_id("a", "bc"), passage_id("ab", "c"), passage_id("", "abc")}) == 3


def test_passages_of_number_the_parts_of_a_document() -> None:
    document = Document(name="doc", title="A\n title", text=f"{words(0, 40)}\n\n{words(40, 80)}")
    first, second = passages_of(document, max_words=60, min_words=10)
    assert (first.source, second.source) == ("doc#1", "doc#2")
    assert first.title == "A title"
    assert first.id == passage_id("A title", words(0, 40)) != second.id


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n ", "empty"),
        ("Return the name.", "too short"),
        ("12 34 56 78 90 12 34 56 78 90 and 4711", "too few letters"),
        (
            "result = compute(value); print(result); other = values[index] | mask; done()",
            "mostly code",
        ),
        ("Return the low median of numeric data, i.e. the smaller of the two middle values.", None),
        ("これは日本語の短い文章であり、検索の対象になります。", None),
    ],
)
def test_reject_reason_names_why_a_text_is_unfit(text: str, reason: str | None) -> None:
    assert reject_reason(text) == reason
