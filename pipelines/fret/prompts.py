"""What the LLM is shown, as data: `prompts.yaml`, or a file of a recipe's own; and what it answers.

Which prompts a step used is part of its fingerprint.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from actors.language_model import LanguageModel
from actors.pair_scores import ScoringPrompt
from actors.words import compared_words, num_words
from cluster.config import Config
from cluster.errors import UserError, excerpt
from pipelines.fret.fusion import LLM_JUDGES
from pipelines.fret.languages import OF_PASSAGE, language_name, language_of
from pipelines.yaml_files import read_yaml

MIN_QUERY_WORDS = 3
MAX_QUERY_WORDS = 40
MAX_COPIED_WORDS = 8
STOP = ("\n",)
WRITTEN = "written"  # the LLM writes the task with the query

_NAMES_THE_PASSAGE = re.compile(
    r"\b(?:the|this|that|above|given|following) "
    r"(?:passage|text|article|document|paragraph|excerpt|author)\b",
    re.IGNORECASE,
)


class JudgedTask(Config):
    """How pairs of one task are judged: the question by the kind of relevance, and queries.

    `examples` holds a query of each passage that is less than fully relevant to it.
    """

    questions: dict[str, str] = Field(min_length=1)
    examples: dict[str, str]


class TaskPrompt(Config):
    """A few-shot prompt for queries of one task; `examples` holds the query of each passage."""

    instruction: str
    cue: str
    examples: dict[str, str]
    judged: JudgedTask | None = None


class WrittenExample(Config):
    """A passage, a task for which it is a good result, and a query of that task."""

    passage: str
    task: str
    query: str


class WrittenPrompt(Config):
    """Gecko's own form (section 3.1): the LLM writes the task and the query."""

    instruction: str
    cue: str
    examples: tuple[WrittenExample, ...]


class JudgedExample(Config):
    """A passage, a query, and the label that says how relevant the one is to the other."""

    passage: str
    query: str
    label: str


class ScorePrompt(Config):
    """The few-shot prompt that both scores are read from; labels with the weight of each."""

    cue: str
    question: str
    labels: dict[str, float] = Field(min_length=2)
    examples: tuple[JudgedExample, ...]

    def is_positive(self, example: JudgedExample) -> bool:
        """Says whether no label has more weight than the example's."""
        return self.labels[example.label] == max(self.labels.values())

    def of_task(self, task: TaskPrompt, relevance: str) -> "ScorePrompt":
        """Returns this prompt, the kind of `relevance`, in a task's words if it has any.

        Raises:
            KeyError: The task has no query of a passage of the examples.
        """
        if task.judged is None or relevance not in task.judged.questions:
            return self
        queries = {True: task.examples, False: task.judged.examples}
        return ScorePrompt(
            cue=task.cue,
            question=task.judged.questions[relevance],
            labels=self.labels,
            examples=tuple(
                example.model_copy(
                    update={"query": queries[self.is_positive(example)][example.passage]}
                )
                for example in self.examples
            ),
        )


class Prompts(Config):
    """A file of prompts."""

    version: int
    passages: dict[str, str]
    tasks: dict[str, TaskPrompt]
    written: WrittenPrompt
    scores: dict[str, ScorePrompt]

    @model_validator(mode="after")
    def _known_passages(self) -> "Prompts":
        named = {name for task in self.tasks.values() for name in task.examples}
        named |= {name for t in self.tasks.values() if t.judged for name in t.judged.examples}
        named |= {example.passage for example in self.written.examples}
        named |= {e.passage for prompt in self.scores.values() for e in prompt.examples}
        if unknown := sorted(named - self.passages.keys()):
            raise ValueError(f"examples name the passages {unknown}, which are not in `passages`")
        for name, prompt in self.scores.items():
            if unknown := sorted({e.label for e in prompt.examples} - prompt.labels.keys()):
                raise ValueError(f"scores.{name}: examples have the labels {unknown}")
        return self

    @model_validator(mode="after")
    def _judged_tasks(self) -> "Prompts":
        for name, task in self.tasks.items():
            questions = task.judged.questions if task.judged else {}
            if unknown := sorted(questions.keys() - self.scores.keys()):
                raise ValueError(f"tasks.{name}.judged.questions: {unknown} are not in `scores`")
            for relevance in questions:
                try:
                    self.scores[relevance].of_task(task, relevance)
                except KeyError as error:
                    raise ValueError(
                        f"tasks.{name} has no query of the passage {error} for the examples of"
                        f" scores.{relevance}: `examples` gives those of full relevance,"
                        " `judged.examples` the others"
                    ) from error
        return self


@dataclass(frozen=True, kw_only=True)
class QueryPrompts:
    """How queries are asked for: picklable, and all of it in the fingerprint.

    Attributes:
        prompts: The file.
        tasks: The tasks to draw from, or `("written",)`.
        language: The language to ask for, `passage`: that of each; None: nothing is said of it.
        instruct: Whether the instruction precedes the examples, as chat models want it.
    """

    prompts: Prompts
    tasks: tuple[str, ...]
    language: str | None = None
    instruct: bool = False

    def of(self, text: str) -> "QueryPrompts":
        """Returns how queries are asked for of a passage, in its language if that is wanted."""
        if self.language != OF_PASSAGE:
            return self
        return replace(self, language=language_name(language_of(text)))

    def task(self, query_id: str) -> str:
        """Returns the task of a query, drawn uniformly by its id; `written`: the LLM chooses."""
        number = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:4], "big")
        return self.tasks[number % len(self.tasks)]

    def render(self, task: str, title: str, text: str) -> str:
        """Returns the prompt for a passage, to be continued by the query (or `task | query`)."""
        prompt = self.prompts.written if task == WRITTEN else self.prompts.tasks[task]
        passages = self.prompts.passages
        head = ""
        if self.instruct or self.language or task == WRITTEN:
            language = self.of(text).language
            asked = f" Write in {language}." if language else ""
            head = f"{prompt.instruction}{asked}\n\n"
        shots = "".join(
            f"Passage: {passages[p]}\n{prompt.cue} {a}\n\n" for p, a in self.examples(task)
        )
        return f"{head}{shots}Passage: {passage_line(title, text)}\n{prompt.cue}"

    def examples(self, task: str) -> list[tuple[str, str]]:
        """Returns the few-shot examples of a task: a passage's name and what is written for it."""
        if task == WRITTEN:
            return [(e.passage, f"{e.task} | {e.query}") for e in self.prompts.written.examples]
        return list(self.prompts.tasks[task].examples.items())

    def parse(self, task: str, completion: str, *, cut: bool) -> tuple[str, str, str | None]:
        """Returns (task, query, None), or what could be read and why it is no query."""
        line = completion.split("\n")[0]
        if task != WRITTEN:
            return task, *_parse_query(line, cut=cut)
        written, bar, rest = line.partition("|")
        written = " ".join(written.split()).lower()
        query, reason = _parse_query(rest, cut=cut)
        return written, query, reason if bar and written else "the LLM wrote no task"


@dataclass(frozen=True, kw_only=True)
class PairPrompts:
    """How a (query, passage) pair is laid out for its scores, in the words of the query's task.

    Attributes:
        prompts: The file.
        relevance: Which of its `scores`.
        apart: Query likelihood has a prompt of its own, that of `QueryPrompts`, whose examples are
            all relevant; otherwise both scores come out of one prompt.
        judges: Who is asked where they are apart: ql, rc or both.
    """

    prompts: Prompts
    relevance: str
    apart: bool = False
    judges: tuple[str, ...] = LLM_JUDGES

    def wording(self, task: str) -> ScorePrompt:
        """Returns the prompt of a task, the neutral one if it has none of its own."""
        prompt, own = self.prompts.scores[self.relevance], self.prompts.tasks.get(task)
        return prompt.of_task(own, self.relevance) if own else prompt

    def render(self, query: str, title: str, text: str, task: str) -> tuple[ScoringPrompt, ...]:
        """Lays out a pair: one prompt for both scores, or one for each judge that is asked.

        Pairs of one passage and one task share the contexts.
        """
        prompt = self.wording(task)
        query, passage = f" {' '.join(query.split())}", passage_line(title, text)
        relevance = ScoringPrompt(
            context=self._context(
                prompt.cue,
                [(e.passage, f"{e.query}\n{prompt.question}{e.label}") for e in prompt.examples],
                passage,
            ),
            query=query,
            question=f"\n{prompt.question}",
            labels=tuple(prompt.labels.items()),
            likelihood=not self.apart,
        )
        if not self.apart:
            return (relevance,)
        likelihood = ScoringPrompt(context=self._positive_context(task, passage), query=query)
        parts = {"ql": likelihood, "rc": relevance}
        return tuple(parts[judge] for judge in self.judges)

    def _positive_context(self, task: str, passage: str) -> str:
        if own := self.prompts.tasks.get(task):
            return self._context(own.cue, list(own.examples.items()), passage)
        prompt = self.wording(task)
        relevant = [(e.passage, e.query) for e in prompt.examples if prompt.is_positive(e)]
        return self._context(prompt.cue, relevant, passage)

    def _context(self, cue: str, examples: Sequence[tuple[str, str]], passage: str) -> str:
        passages = self.prompts.passages
        shots = "".join(f"Passage: {passages[p]}\n{cue} {answer}\n\n" for p, answer in examples)
        return f"{shots}Passage: {passage}\n{cue}"


@cache
def load_prompts(path: str | None = None) -> Prompts:
    """Reads a file of prompts, Tokay's own if None.

    Raises:
        UserError: There is no such file, or it is no file of prompts.
    """
    file = files("pipelines.fret") / "prompts.yaml" if path is None else Path(path)
    try:
        return Prompts.model_validate(read_yaml(file.read_bytes(), f"prompts {path}"))
    except FileNotFoundError as error:
        raise UserError(f"prompts {path} does not exist: correct `prompts`") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"prompts {path}: {excerpt(where)}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"prompts {path} cannot be read: {error}") from error


def require_plain(prompts: Prompts, llm: LanguageModel) -> None:
    """Refuses prompts that spell out control tokens, which would be shown to the LLM as text.

    Raises:
        UserError: They do.
    """
    if spelt := llm.control_tokens(prompts.model_dump_json()):
        raise UserError(
            f"prompts: {spelt[0]} is a control token of llm.model, and prompts are plain text: take"
            " it out; queries.chat puts them into the model's chat template"
        )


def unfit(query: str, passage: str) -> str | None:
    """Says why a query does not suit the passage that it was written from, or None."""
    if _NAMES_THE_PASSAGE.search(query) and not _NAMES_THE_PASSAGE.search(passage):
        return "names the passage"
    words = compared_words(query)
    text = f" {' '.join(compared_words(passage))} "
    for start in range(len(words) - MAX_COPIED_WORDS + 1):
        if f" {' '.join(words[start : start + MAX_COPIED_WORDS])} " in text:
            return "copies its passage"
    return None


def passage_line(title: str, text: str) -> str:
    """Returns a passage as one line, so that none can begin another example."""
    title, line = " ".join(title.split()), " ".join(text.split())
    return f"{title}. {line}" if title and not line.startswith(title) else line


def _parse_query(line: str, *, cut: bool) -> tuple[str, str | None]:
    query = re.sub(r"\s+", " ", line).strip().strip('"').strip()
    if not query:
        return query, "the LLM wrote nothing"
    if num_words(query) < MIN_QUERY_WORDS:
        return query, "query too short"
    if cut or num_words(query) > MAX_QUERY_WORDS:
        return query, "query too long"
    return query, None
