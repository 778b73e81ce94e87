import re

from pipelines.corpus.cutting import Passage
from pipelines.demo.questions import load_questions


def test_every_answer_is_a_passage_of_the_corpus(documentation: list[Passage]) -> None:
    sources = {passage.source for passage in documentation}
    for question in load_questions():
        assert set(question.answers) <= sources, question
        assert len(set(question.answers)) == len(question.answers), question


def test_a_third_of_the_questions_is_for_development() -> None:
    dev, test = (
        [question for question in load_questions() if question.split == split]
        for split in ("dev", "test")
    )
    assert len(dev) + len(test) >= 170
    assert 0.30 < len(dev) / (len(dev) + len(test)) < 0.36
    assert not {question.id for question in dev} & {question.id for question in test}
    assert not {question.question for question in dev} & {question.question for question in test}


def test_questions_do_not_copy_the_passages(documentation: list[Passage]) -> None:
    """No run of six words of a question stands in one of its answers."""
    texts = {passage.source: _words(passage.text) for passage in documentation}
    for question in load_questions():
        words = _words(question.question).split()
        runs = {" ".join(words[start : start + 6]) for start in range(len(words) - 5)}
        for answer in question.answers:
            assert not {run for run in runs if f" {run} " in texts[answer]}, question


def _words(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "
