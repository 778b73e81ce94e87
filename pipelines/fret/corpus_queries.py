"""The step `corpus_queries`: titles and sentences of the corpus, as queries that cost no LLM.

They ask in the words of the corpus, not in those of people. They are enough for a teacher that
orders the candidates of any text, such as `hybrid` with `mixture.fixed_passages`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Json, write_shards
from cluster.config import Config
from cluster.exchange import Shared, run_tasks
from cluster.shard_groups import ShardGroup, shard_groups
from cluster.steps import Step, StepContext
from pipelines.corpus.cutting import Passage
from pipelines.corpus.held_out import (
    behind_title,
    draw,
    held_out_documents,
    reads_as_query,
    sentence_spans,
)
from pipelines.fingerprints import fingerprinted
from pipelines.ids import document_name, query_id
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
    """Draws the queries from all passages whose documents are not held out, and writes them.

    Tasks draw from some shards each; the driver holds as many queries as are asked for.
    """
    passages, seeds = context.input("passages"), context.inputs.get("seeds")
    held_out = Shared.of(held_out_documents(seeds) if seeds else frozenset())
    drawn, num_read = _Drawn(config), 0
    groups = ((config, group, held_out) for group in shard_groups(passages))
    for num_passages, of_group in run_tasks(_draw_from, groups):
        drawn.add_all(of_group)
        num_read += num_passages
        context.progress.update(num_read, passages.num_rows)
    rows = drawn.rows()
    table = pa.Table.from_pylist(rows, schema=QUERY)
    context.log.append(write_shards(context.storage, table, QUERIES_PER_SHARD))
    num_titles = sum(row["task"] == TITLE_TASK for row in rows)
    return {"num_titles": num_titles, "num_sentences": len(rows) - num_titles}


def draw_queries(passages: Iterable[Passage], config: CorpusQueriesConfig) -> list[dict[str, Json]]:
    """Returns rows of `QUERY`: the titles that are drawn, and then the sentences.

    The draw knows nothing of the passages' order but for a title that several have: it is asked
    for the first of them.
    """
    drawn = _Drawn(config)
    for number, passage in enumerate(passages):
        drawn.add(number, passage)
    return drawn.rows()


def _draw_from(
    config: CorpusQueriesConfig, group: ShardGroup, held_out: Shared
) -> tuple[int, _Drawn]:
    """Returns how many passages a group has, and what is drawn from those not held out."""
    drawn, names, number = _Drawn(config), held_out.get(), group.first_row
    for table in group.tables():
        for row in table.to_pylist():
            if document_name(row["source"]) not in names:
                drawn.add(number, Passage.of_row(row))
            number += 1
    return number - group.first_row, drawn


class _Drawn:
    """Titles and sentences that are drawn from some passages."""

    def __init__(self, config: CorpusQueriesConfig) -> None:
        self._seed = config.seed
        self._titles = _Smallest(config.max_titles)
        self._sentences = _Smallest(config.max_sentences)

    def add(self, number: int, passage: Passage) -> None:
        """Draws from a passage, whose number in the corpus this is."""
        title = passage.title
        if reads_as_query(title, MIN_TITLE_WORDS, MAX_WORDS):
            key = _draw(f"{self._seed} title {title.casefold()}")
            self._titles.add(key, number, _row(passage, TITLE_TASK, title))
        place = _draw(f"{self._seed} sentences {passage.id}")
        for turn, (sentence_number, sentence) in enumerate(_sentences(passage, self._seed)):
            row = _row(passage, SENTENCE_TASK, sentence, sentence_number)
            self._sentences.add(turn << _BITS | place, number, row)

    def add_all(self, other: _Drawn) -> None:
        """Draws from what is drawn from other passages."""
        self._titles.add_all(other._titles)
        self._sentences.add_all(other._sentences)

    def rows(self) -> list[dict[str, Any]]:
        return [*self._titles.rows(), *self._sentences.rows()]


class _Smallest:
    """Keeps the rows of the smallest keys, of equal keys that of the first passage."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._largest_first: list[int] = []  # the keys, negated: a heap
        self._rows: dict[int, tuple[int, dict[str, Any]]] = {}

    def add(self, key: int, number: int, row: dict[str, Any]) -> None:
        if key in self._rows:
            if number < self._rows[key][0]:
                self._rows[key] = number, row
            return
        heapq.heappush(self._largest_first, -key)
        self._rows[key] = number, row
        if len(self._rows) > self._num:
            del self._rows[-heapq.heappop(self._largest_first)]

    def add_all(self, other: _Smallest) -> None:
        for key, (number, row) in other._rows.items():
            self.add(key, number, row)

    def rows(self) -> list[dict[str, Any]]:
        return [self._rows[key][1] for key in sorted(self._rows)]


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
