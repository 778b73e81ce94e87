"""Reads the demo's test set; every other test set is a BEIR folder, which the user brings."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["dev", "test"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and the sources of all passages that answer it."""

    id: str
    split: Split
    question: str
    answers: tuple[str, ...]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    split: Split
    question: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(min_length=1)


def load_questions(split: str) -> list[Question]:
    """Return the questions of a split, in the order of their ids.

    Raises:
        ValueError: When `split` is neither dev nor test.
    """
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} does not exist: the demo's questions have dev and test")
    text = files("pipelines.demo").joinpath("questions.jsonl").read_text("utf-8")
    lines = [_Line.model_validate_json(line) for line in text.splitlines()]
    return [
        Question(id=line.id, split=line.split, question=line.question, answers=line.answers)
        for line in lines
        if line.split == split
    ]
