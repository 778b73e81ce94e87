"""The step `corpus_queries`: titles and sentences of the corpus, as queries that cost no LLM.

They ask in the words of the corpus, not in those of people. They are enough for a teacher that
orders the candidates of any text, such as `hybrid` with `mixture.fixed_passages`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Json, write_shards
from cluster.config import Config
from cluster.steps import Step, StepContext
from pipelines.corpus.cutting import Passage
from pipelines.corpus.held_out import (
    TrainingPassages,
    behind_title,
    draw,
    held_out_documents,
    read_passages,
    reads_as_query,
    sentence_spans,
)
from pipelines.fingerprints import fingerprinted
from pipelines.ids import query_id
from pipelines.records import QUERY

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "take queries from the corpus"
TASKS = TITLE_TASK, SENTENCE_TASK = ("title", "sentence")
MIN_TITLE_WORDS = 2
MIN_SENTENCE_WORDS = 4
MAX_WORDS = 30
QUERIES_PER_SHARD = 256
_BITS = 64


class CorpusQueriesConfig(Config):
    """How many queries are taken from the corpus itself; never from what the gate holds out."""

    max_titles: int = Field(
        default=1000,
        ge=0,
        description=f"of {MIN_TITLE_WORDS} to {MAX_WORDS} words, each once; drawn by a hash, so"
        " that more contain the fewer; their task is 'title'",
    )
    max_sentences: int = Field(
        default=1000,
        ge=0,
        description=f"of {MIN_SENTENCE_WORDS} to {MAX_WORDS} words, headings among them; drawn by a"
        " hash, no second one of a passage before each has given one; their task is 'sentence'",
    )
    seed: int = 0


def step(recipe: Recipe) -> Step:
    """Returns the step of a recipe that takes queries from the corpus."""
    config = recipe.corpus_queries
    assert config is not None
    return Step(
        name="corpus_queries",
        config=fingerprinted(config),
        inputs=("passages", *(["seeds"] if recipe.gate else [])),
        work=lambda context: take_queries(config, context),
    )


def take_queries(config: CorpusQueriesConfig, context: StepContext) -> dict[str, Json]:
    """Draws the queries from all passages whose documents are not held out, and writes them."""
    passages, seeds = context.input("passages"), context.inputs.get("seeds")
    held_out = held_out_documents(seeds) if seeds else frozenset()

    def read() -> Iterator[Passage]:
        fit = TrainingPassages(passages.storage, passages.manifest, held_out)
        for number, passage in enumerate(read_passages(fit)):
            if number % QUERIES_PER_SHARD == 0:
                context.progress.update(number, passages.num_rows)
            yield passage

    rows = draw_queries(read(), config)
    table = pa.Table.from_pylist(rows, schema=QUERY)
    context.log.append(write_shards(context.storage, table, QUERIES_PER_SHARD))
    num_titles = sum(row["task"] == TITLE_TASK for row in rows)
    return {"num_titles": num_titles, "num_sentences": len(rows) - num_titles}


def draw_queries(passages: Iterable[Passage], config: CorpusQueriesConfig) -> list[dict[str, Json]]:
    """Returns rows of `QUERY`: the titles that are drawn, and then the sentences.

    The draw knows nothing of the passages' order but for a title that several have: it is asked
    for the first of them.
    """
    titles, sentences = _Smallest(config.max_titles), _Smallest(config.max_sentences)
    for passage in passages:
        title = passage.title
        if reads_as_query(title, MIN_TITLE_WORDS, MAX_WORDS):
            place = _draw(f"{config.seed} title {title.casefold()}")
            titles.add(place, _row(passage, TITLE_TASK, title))
        place = _draw(f"{config.seed} sentences {passage.id}")
        for turn, (number, sentence) in enumerate(_sentences(passage, config.seed)):
            row = _row(passage, SENTENCE_TASK, sentence, number)
            sentences.add(turn << _BITS | place, row)
    return [*titles.rows(), *sentences.rows()]


class _Smallest:
    """Keeps the rows of the smallest keys, of equal keys the first row."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._largest_first: list[int] = []  # the keys, negated: a heap
        self._rows: dict[int, dict[str, Any]] = {}

    def add(self, key: int, row: dict[str, Any]) -> None:
        if key in self._rows:
            return
        heapq.heappush(self._largest_first, -key)
        self._rows[key] = row
        if len(self._rows) > self._num:
            del self._rows[-heapq.heappop(self._largest_first)]

    def rows(self) -> list[dict[str, Any]]:
        return [self._rows[key] for key in sorted(self._rows)]


def _sentences(passage: Passage, seed: int) -> list[tuple[int, str]]:
    """Returns the fit sentences of a passage with their numbers, in the order of a draw."""
    body = behind_title(passage)
    every = enumerate(body[start:end].strip() for start, end in sentence_spans(body))
    fit = [each for each in every if reads_as_query(each[1], MIN_SENTENCE_WORDS, MAX_WORDS)]
    return sorted(fit, key=lambda each: _draw(f"{seed} sentence {each[0]} of {passage.id}"))


def _draw(text: str) -> int:
    return int.from_bytes(draw(text)[: _BITS // 8])


def _row(passage: Passage, task: str, query: str, number: int = 0) -> dict[str, Any]:
    id_ = query_id(passage.id, number, task)
    return {"id": id_, "seed_id": passage.id, "task": task, "query": query, "dropped_by": None}
