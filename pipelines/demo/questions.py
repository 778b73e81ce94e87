"""Reads the demo's questions, which `data` turns into a test set."""

from importlib.resources import files
from typing import Literal

from pydantic import Field

from cluster.config import Config


class Question(Config):
    """A question and the sources of all passages that answer it."""

    id: str
    split: Literal["dev", "test"]
    question: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(min_length=1)


def load_questions() -> list[Question]:
    """Returns the questions of both splits, in the order of their ids."""
    text = files("pipelines.demo").joinpath("questions.jsonl").read_text("utf-8")
    return [Question.model_validate_json(line) for line in text.splitlines()]
