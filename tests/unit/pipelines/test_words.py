from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.words import (
    MAX_WORD_CHARACTERS,
    compared_words,
    letter_share,
    normalized,
    num_words,
    sentence_starts,
    word_spans,
)
from pipelines.corpus.cutting import clean, cut, passages_of, reject_reason
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document

LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")

# A sentence each of scripts that no test set here has.
SENTENCES = {
    "Japanese": "朝市では魚がよく売れるので、雨が降っても漁師たちは早くから港に集まってくる。",
    "Korean": "아침 시장에서는 생선이 잘 팔려서 비가 와도 어부들이 일찍부터 항구에 모여든다.",
    "Khmer": "ពេលព្រឹកយើងទៅផ្សារទិញបន្លែនិងត្រីស្រស់ពេលត្រឡប់មកផ្ទះមានភ្លៀងធ្លាក់",
    "Lao": "ຕອນເຊົ້າພວກເຮົາໄປຕະຫຼາດຊື້ຜັກແລະປາສົດຕອນກັບບ້ານຝົນຕົກ",
    "Burmese": "မနက်ပိုင်းမှာ ကျွန်တော်တို့ ဈေးကိုသွားပြီး ဟင်းသီးဟင်းရွက်နဲ့ ငါးလတ်လတ်ဆတ်ဆတ် ဝယ်တယ်။",
    "Tibetan": "ཞོགས་པར་ང་ཚོ་ཁྲོམ་ལ་ཕྱིན་ནས་སྔོ་ཚལ་དང་ཉ་ཤ་གསར་པ་ཉོས་པ་ཡིན།",
    "Tamil": "காலையில் நாங்கள் சந்தைக்குச் சென்று காய்கறிகளும் புதிய மீனும் வாங்கி வீட்டிற்குத் திரும்பினோம்.",
    "Bengali": "সকালে আমরা বাজারে গিয়ে সবজি আর তাজা মাছ কিনে বৃষ্টির মধ্যে বাড়ি ফিরে আসি।",
    "vowelled Arabic": "يَفْتَحُ مَكْتَبُ المِينَاءِ فِي السَّابِعَةِ صَبَاحًا وَيُغْلَقُ بَعْدَ مُغَادَرَةِ آخِرِ عَبَّارَةٍ.",
    "vowelled Hebrew": "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ וְהָאָרֶץ הָיְתָה תֹהוּ וָבֹהוּ.",
    "Persian": "صبح‌ها به بازار می‌رویم و سبزی‌ها و ماهی تازه می‌خریم و زیر باران برمی‌گردیم.",
    "Ethiopic": "ጠዋት፡ወደ፡ገበያ፡ሄደን፡አትክልትና፡ትኩስ፡ዓሣ፡ገዝተን፡በዝናብ፡ተመለስን።",
    "Georgian": "დილით ბაზარში მივდივართ და ბოსტნეულს და ახალ თევზს ვყიდულობთ წვიმაში.",
}


def in_one_line(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's ~/path (no. 5) sat.", ["The", "cat's", "~/path", "(no.", "5)", "sat."]),
        ("日本語の文章。", ["日本語", "の", "文章。"]),
        ("「日本語」の", ["「日本語」", "の"]),
        ("ราคา 50 บาท", ["ราคา", "50", "บาท"]),
        ("बाज़ार से सब्ज़ियाँ।", ["बाज़ार", "से", "सब्ज़ियाँ।"]),
        ("https://example.org/a-b in 中文", ["https://example.org/a-b", "in", "中文"]),
        ("𠮷野家 \ud800中", ["𠮷", "野家", "\ud800中"]),
        ("a\u200bb\u200bก", ["a", "b", "ก"]),
        ("ab" * 60, ["ab" * 25, "ab" * 25, "ab" * 10]),
    ],
)
def test_word_spans_are_found_by_spaces_or_by_the_script(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in word_spans(text)] == words
    assert num_words(text) == len(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The CAT's café, 3.5_x", ["the", "cat", "s", "café", "3", "5_x"]),
        ("cafe\u0301", ["café"]),
        ("замо\u0301к", ["замо\u0301к"]),
        ("日本語の、(don't)!", ["日本語", "の", "don", "t"]),
        ("सब्ज़ियाँ।", ["सब्ज़ियाँ"]),
        ("می\u200cخواهم؟", ["می\u200cخواهم"]),
    ],
)
def test_compared_words_have_no_case_and_no_punctuation(text: str, words: list[str]) -> None:
    assert compared_words(text) == [normalized(word) for word in words]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('One (two.) Three "four." Five', ["One (two.) ", 'Three "four." ', "Five"]),
        ("पहला वाक्य। दूसरा 3.5 है।", ["पहला वाक्य। ", "दूसरा 3.5 है।"]),
        ("雨が降る。雪が降る！", ["雨が降る。", "雪が降る！"]),
        ("نعم؟ لا.", ["نعم؟ ", "لا."]),
        ("", [""]),
    ],
)
def test_sentence_starts_are_behind_ends_of_every_script(text: str, sentences: list[str]) -> None:
    starts = [*sentence_starts(text), len(text)]
    assert [text[a:b] for a, b in pairwise(starts)] == sentences


def test_letter_share_counts_marks_with_their_letters() -> None:
    assert letter_share("क्षि त्र") == 1.0  # two viramas and a vowel sign
    assert letter_share("مَكْتَبُ") == 1.0
    assert letter_share("می\u200cخواهم") == 1.0  # the joiner is neither
    assert letter_share("ab12") == 0.5
    assert letter_share("❤\ufe0f❤\ufe0f") == 0.0  # a mark of no letter
    assert letter_share(" ") == 0.0


def test_normalized_takes_a_long_run_of_marks() -> None:
    text = normalized("a" + "\u0301\u0316" * 100_000)
    assert text.replace("\u034f", "").count("\u0316") == 100_000
    assert normalized("e\u0301" * 100) == "é" * 100


@pytest.mark.parametrize("script", SENTENCES)
def test_no_script_is_refused(script: str) -> None:
    sentence = SENTENCES[script]
    assert reject_reason(clean(sentence)) is None
    passages = passages_of(Document(name="d", title="", text=" ".join([sentence] * 60)))
    assert len(passages) > 1
    for passage in passages:
        assert num_words(passage.text) <= 160
        assert len(passage.text) <= 1600
        assert reject_reason(passage.text) is None
    assert in_one_line("".join(p.text for p in passages)) == in_one_line(clean(sentence)) * 60


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_of_every_language_become_passages(data_folder: Path, language: str) -> None:
    path = data_folder / "bitext" / "xquad-questions" / f"{language}.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    # In a paragraph each, all in one, and without a single space.
    for joint in ("\n\n", " ", ""):
        text = joint.join(lines)
        passages = passages_of(Document(name="d", title="", text=text))
        assert max(num_words(passage.text) for passage in passages) <= 160
        assert in_one_line("".join(p.text for p in passages)) == in_one_line(clean(text))
        if joint:
            rejected = [p for p in passages if reject_reason(p.text)]
            assert len(rejected) <= 0.01 * len(passages)
            assert max(len(passage.text) for passage in passages) <= 160 * 10


@pytest.mark.parametrize("name", ["xquad-de", "xquad-en", "xquad-zh", "xquad-cross"])
def test_paragraphs_of_xquad_are_kept(data_folder: Path, name: str) -> None:
    corpus = Corpus(CorpusConfig(path=str(data_folder / "retrieval" / name)))
    passages = [p for d in corpus.documents() if isinstance(d, Document) for p in passages_of(d)]
    assert len(passages) >= 240
    assert sum(reject_reason(p.text) is not None for p in passages) <= 0.01 * len(passages)


texts = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.sampled_from(sorted(SENTENCES.values())),
        st.sampled_from([" ", "\n\n", "\u200b", ". ", "。", "\ud800", "\u0301" * 40, "x" * 120]),
        st.text(st.characters(min_codepoint=0xE00, max_codepoint=0x30FF), max_size=200),
        st.text(st.sampled_from("漢字。、「」ไปตลาด་།ខ្មែរ"), max_size=300),
    ),
    max_size=8,
).map("".join)


@given(texts, st.integers(1, 12))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_is_cut_within_the_limit_and_loses_nothing(text: str, min_words: int) -> None:
    max_words = 2 * min_words + 4
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    pieces = cut(cleaned, max_words=max_words, min_words=min_words)
    assert in_one_line("".join(pieces)) == in_one_line(cleaned)
    for piece in pieces:
        assert 0 < num_words(piece) <= max_words
        assert len(piece) <= max_words * (MAX_WORD_CHARACTERS + 1)
        reject_reason(piece)


@given(texts, texts)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_words_of_any_texts_add_up(left: str, right: str) -> None:
    assert num_words(f"{left} {right}") == num_words(left) + num_words(right)
    spans = word_spans(left)
    assert in_one_line("".join(left[a:b] for a, b in spans)) == in_one_line(
        left.replace("\u200b", "")
    )
    assert all(1 <= b - a <= MAX_WORD_CHARACTERS for a, b in spans)
    compared_words(left)
    assert sentence_starts(left)[0] == 0


def cut_short(text: str) -> list[str]:
    return cut(text, max_words=16, min_words=8)


@pytest.mark.parametrize("call", [clean, word_spans, compared_words, sentence_starts, cut_short])
def test_words_take_time_in_proportion_to_the_text(
    call: Callable[[str], object], assert_linear: Callable[[Callable[[str], object], str], None]
) -> None:
    units = list("漢กຂア😀\u200d\ud800한ᄀ🇩")
    units += ["क\u093e", ".1", ".)", "。」", "中.1", "中.", "👨\u200d", "'a", "ก.'"]
    for unit in [*units, "a\u0301\u0316", "\u0301\u0316", ". 1", "中. 1 ", "\n ", "\u2029"]:
        assert_linear(call, unit)
