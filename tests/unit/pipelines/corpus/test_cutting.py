import subprocess
import sys
from itertools import accumulate, pairwise

import pytest

from actors.words import num_words
from pipelines.corpus.cutting import _within, clean, cut, passages_of, reject_reason
from pipelines.datasets.documents import Document
from pipelines.ids import passage_id

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


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([60, 60, 30, 28, 5], [[60], [60], [30], [28, 5]]),  # the last two pieces alone
        ([30, 30, 10], [[30, 30], [10]]),  # as large as it has to be
        ([30, 30, 9], [[30], [30, 9]]),
        ([10, 50, 9], [[10], [50, 9]]),  # what is left is just of a fair size
        ([9, 51, 9], [[9, 51], [9]]),  # and here it would not be
        ([5, 5, 45, 9], [[5, 5], [45, 9]]),  # all that is left counts
        ([60, 9], [[60], [9]]),  # of one paragraph nothing is taken
        ([50, 3, 2, 6], [[50], [3, 2, 6]]),
        ([48, 6, 4, 2, 4], [[48, 6], [4, 2, 4]]),
        ([40, 6, 4, 3, 7], [[40, 6, 4, 3, 7]]),
        ([40, 6, 4, 3, 8], [[40, 6, 4], [3, 8]]),
        ([48, 4, 3, 5, 1], [[48], [4, 3, 5, 1]]),
    ],
)
def test_cut_takes_paragraphs_for_a_short_last_piece(
    sizes: list[int], expected: list[list[int]]
) -> None:
    ends = list(accumulate(sizes, initial=0))
    text = "\n\n".join(words(start, end) for start, end in pairwise(ends))
    pieces = cut(text, max_words=60, min_words=10)
    assert [[len(part.split()) for part in piece.split("\n")] for piece in pieces] == expected
    assert " ".join(pieces).split() == text.split()


def test_cut_makes_pieces_of_160_words_and_not_below_20() -> None:
    assert [num_words(piece) for piece in cut(words(0, 321))] == [160, 160, 1]
    for last, expected in ((20, [150, 20]), (19, [100, 69])):
        text = "\n\n".join([words(0, 100), words(100, 150), words(150, 150 + last)])
        assert [num_words(piece) for piece in cut(text)] == expected
        document = Document(name="doc", title="", text=text)
        assert [num_words(passage.text) for passage in passages_of(document)] == expected


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


def test_cut_of_a_sentence_is_at_a_space_of_its_last_half() -> None:
    for place, expected in ((9, 9), (6, 6), (5, 10)):
        text = "漢字" * place + " " + "漢字" * 12  # each of one word
        assert num_words(cut(text, max_words=10, min_words=1)[0]) == expected


def test_piece_in_which_there_are_more_words_than_its_text_had_is_halved() -> None:
    spans = [(0, 3), (4, 7), (8, 11), (12, 15)]  # as if each pair had been one word
    assert [*_within("a b c d e f g h", spans, 2)] == [(p, 2) for p in ("a b", "c d", "e f", "g h")]
    assert [*_within("a b c d e f g h", spans[1:2], 1)] == [("c d", 2)]
    assert [*_within("a b c d e f g h", spans[:3], 4)] == [("a b", 2), ("c d e f", 4)]


def test_cut_parts_unbroken_strings() -> None:
    assert len(cut("x" * 10_000, max_words=40, min_words=5)) == 5


def test_cut_refuses_limits_that_cannot_be_met() -> None:
    for min_words in (100, 76, 0, -1):
        with pytest.raises(ValueError, match=f"min_words={min_words}"):
            cut("a", max_words=150, min_words=min_words)
    assert cut("a", max_words=150, min_words=75) == cut("a", max_words=2, min_words=1) == ["a"]


def test_passage_id_is_the_same_in_another_process() -> None:
    code = "from pipelines.ids import passage_id; print(passage_id('a', 'b\\u00e9'))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == passage_id("a", "be\u0301") == "e858b8e66a7cad7f8021ed2d6c62ab60"


def test_passage_id_depends_on_title_and_text_apart() -> None:
    assert len({passage_id("a", "bc"), passage_id("ab", "c"), passage_id("", "abc")}) == 3
    assert passage_id("\ud800", "a") != passage_id("\ud801", "a")  # half a character in a name


def test_passages_of_number_the_parts_of_a_document() -> None:
    document = Document(name="doc", title="A\n title", text=f"{words(0, 40)}\n\n{words(40, 80)}")
    first, second = passages_of(document, max_words=60, min_words=10)
    assert (first.source, second.source) == ("doc#1", "doc#2")
    assert (first.title, second.title) == ("A title", "A title")
    assert (first.text, second.text) == (words(0, 40), words(40, 80))
    assert first.id == passage_id("A title", words(0, 40)) != second.id
    short = Document(
        name="doc", title="", text=f"{words(0, 30)}\n\n{words(30, 50)}\n\n{words(50, 62)}"
    )
    parts = passages_of(short, max_words=60, min_words=10)
    assert [num_words(part.text) for part in parts] == [50, 12]  # 20 would take the 20 before


def test_passages_keep_what_is_known_of_their_page_and_the_headings_over_them() -> None:
    document = Document(
        name="doc",
        title="",
        text="\n\n".join(["First", words(0, 30), words(30, 60), "Second", words(60, 85)]),
        url="http://x.org",
        date="2020-01-02",
        language="en",
        headings=("First", " Second", "Elsewhere"),
    )
    parts = passages_of(document, max_words=40, min_words=5)
    assert [part.headings for part in parts] == [("First",), ("First", "Second"), ("Second",)]
    assert {(part.url, part.date, part.language) for part in parts} == {
        ("http://x.org", "2020-01-02", "en")
    }


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
        ("one two three four five six seven", "too short"),
        ("one two three four five six seven eight", None),
        (" ".join(["abc45"] * 8), None),  # 24 letters of 40
        (" ".join(["abc45"] * 7 + ["ab345"]), "too few letters"),
        (" ".join(["abcdefgh|"] * 8 + ["a", "bc"]), None),  # 8 signs of 75: 0.11
        (" ".join(["abcdef~|"] * 3 + ["abcdef"] * 4 + ["ab"]), None),  # 6 of 50: just 0.12
        (" ".join(["abcdef~|"] * 3 + ["abcdef"] * 4 + ["a"]), "mostly code"),  # 6 of 49
    ],
)
def test_reject_reason_names_why_a_text_is_unfit(text: str, reason: str | None) -> None:
    assert reject_reason(text) == reason
