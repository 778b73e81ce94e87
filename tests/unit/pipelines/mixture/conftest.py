"""A stand-in for the student: Gecko's templates, and a tokenizer that a person can read."""

from collections.abc import Sequence
from typing import Any

import pytest

from actors.encoder_templates import PromptTemplates
from pipelines.mixture.formats import Formatter


class Words:
    """A token for each word: its length in characters; between 1 and 2, like CLS and SEP."""

    templates = PromptTemplates(
        query="task: {task} | query: {text}", passage="title: {title} | text: {text}"
    )

    max_tokens = 100

    def __init__(self) -> None:
        self.texts: list[str] = []

    def tokenize(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        self.texts += texts
        return [[1, *map(len, text.split()[: max_tokens - 2]), 2] for text in texts]


@pytest.fixture
def formatter() -> Formatter:
    student: Any = Words()
    return Formatter(encoder=student, max_query_tokens=12, max_passage_tokens=16)
