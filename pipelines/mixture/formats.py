"""One format for all sets (Gecko, arXiv 2403.20327, section 4), as texts and as tokens.

A query reads ``task: {task} | query: {text}``, a target ``title: {title} | text: {text}``, and a
target of a symmetric set like a query; the student's own templates may say something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.datasets.labelled_examples import Example
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.records import EXAMPLE

if TYPE_CHECKING:
    from actors.encoder import Encoder

_ROWS_AT_ONCE = 4096
_CHARACTERS_A_TOKEN = 6  # more than nearly all texts have: what is longer is cut at once


def _large(kind: pa.DataType) -> pa.DataType:
    """Returns a type whose column may hold more than 2 GB."""
    if pa.types.is_list(kind):
        return pa.large_list(_large(kind.value_type))
    return pa.large_string() if pa.types.is_string(kind) else kind


_TOKENS = ("query_tokens", "positive_tokens", "negative_tokens")
TEXTS = pa.schema(
    [("task", pa.large_string())]
    + [(f.name, _large(f.type)) for f in EXAMPLE if f.name not in ("batch", *_TOKENS)]
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a process needs to know to format and tokenise; it travels to tasks.

    Attributes:
        student: Whose templates and tokenizer they are.
        max_query_tokens: As in `Formatter`.
        max_passage_tokens: As in `Formatter`.
    """

    student: EncoderConfig
    max_query_tokens: int
    max_passage_tokens: int

    def load(self) -> Formatter:
        """Returns the formatter, whose encoder is loaded once in each process."""
        return Formatter(
            encoder=_encoder_without_weights(self.student),
            max_query_tokens=self.max_query_tokens,
            max_passage_tokens=self.max_passage_tokens,
        )


@lru_cache(maxsize=1)
def _encoder_without_weights(config: EncoderConfig) -> Encoder:
    encoder = load_encoder(config, device="cpu")
    encoder.model.to("meta")
    return encoder


@dataclass(frozen=True, kw_only=True)
class Formatter:
    """Formats examples for a student, and tokenises them.

    Attributes:
        encoder: The student: its templates and its tokenizer.
        max_query_tokens: Of queries, and of targets of symmetric sets.
        max_passage_tokens: Of other targets.
    """

    encoder: Encoder
    max_query_tokens: int
    max_passage_tokens: int

    def texts(
        self, examples: Iterable[Example], *, dataset: str, symmetric: bool
    ) -> Iterator[pa.Table]:
        """Yields the examples of one set as formatted texts, with the columns of `TEXTS`.

        There is one table at least.
        """
        stream = iter(examples)
        some = list(islice(stream, _ROWS_AT_ONCE))
        yield pa.Table.from_pylist(self._rows(some, dataset, symmetric), schema=TEXTS)
        while some := list(islice(stream, _ROWS_AT_ONCE)):
            yield pa.Table.from_pylist(self._rows(some, dataset, symmetric), schema=TEXTS)

    def with_tokens(self, texts: pa.Table, *, symmetric: bool) -> pa.Table:
        """Adds the tokens of formatted texts: the columns of `EXAMPLE` without `batch`."""
        limit = self._target_tokens(symmetric)
        negatives = texts["negatives"].combine_chunks()
        flat = self._tokens(negatives.flatten(), limit)
        offsets = pc.subtract(negatives.offsets, negatives.offsets[0])
        columns = {
            "query_tokens": self._tokens(texts["query"].combine_chunks(), self.max_query_tokens),
            "positive_tokens": self._tokens(texts["positive"].combine_chunks(), limit),
            "negative_tokens": pa.LargeListArray.from_arrays(offsets, flat),
        }
        for name, column in columns.items():
            texts = texts.append_column(name, column)
        return texts.select([name for name in EXAMPLE.names if name != "batch"])

    def _target_tokens(self, symmetric: bool) -> int:
        return self.max_query_tokens if symmetric else self.max_passage_tokens

    def _rows(
        self, examples: list[Example], dataset: str, symmetric: bool
    ) -> list[dict[str, object]]:
        templates = self.encoder.templates
        targets = [(e, target) for e in examples for target in (e.positive, *e.negatives)]
        queries = self._marked(
            [templates.format_query(e.query, task=e.task) for e in examples],
            [e.unique_id for e in examples],
            self.max_query_tokens,
        )
        marked = iter(
            self._marked(
                [
                    templates.format_query(target.text, task=e.task)
                    if symmetric
                    else templates.format_passage(target.text, target.title)
                    for e, target in targets
                ],
                [e.unique_id for e, _ in targets],
                self._target_tokens(symmetric),
            )
        )
        return [
            {
                "task": e.task,
                "dataset": dataset,
                "query": query,
                "positive": next(marked),
                "negatives": list(islice(marked, len(e.negatives))),
                "teacher_scores": e.teacher_scores,
                "query_id": e.query_id,
                "positive_id": e.positive_id,
                "symmetric": symmetric,
            }
            for e, query in zip(examples, queries, strict=True)
        ]

    def _marked(self, texts: list[str], ids: list[str], max_tokens: int) -> list[str]:
        """Appends its id to each text that has one, and cuts the text so that the id stays."""
        limit = min(max_tokens, self.encoder.max_tokens)
        texts, todo = list(texts), [place for place, id_ in enumerate(ids) if id_]
        for place in todo:
            texts[place] = texts[place][: _CHARACTERS_A_TOKEN * limit]
        while todo:
            whole = [f"{texts[place]} {ids[place]}" for place in todo]
            tokens = self.encoder.tokenize(whole, max_tokens=limit)
            cut = [len(row) >= limit for row in tokens]
            todo = [place for place, was in zip(todo, cut, strict=True) if was and texts[place]]
            for place in todo:
                texts[place] = texts[place][: len(texts[place]) * 7 // 8]
        return [f"{text} {id_}" if id_ else text for text, id_ in zip(texts, ids, strict=True)]

    def _tokens(self, texts: pa.LargeStringArray, limit: int) -> pa.LargeListArray:
        """Tokenises a column, each different text once."""
        encoded = texts.dictionary_encode()
        parts = [pa.array([], _TOKEN_LISTS)]
        for start in range(0, len(encoded.dictionary), _ROWS_AT_ONCE):
            some = encoded.dictionary.slice(start, _ROWS_AT_ONCE).to_pylist()
            parts.append(pa.array(self.encoder.tokenize(some, max_tokens=limit), _TOKEN_LISTS))
        return pa.concat_arrays(parts).take(encoded.indices)


_TOKEN_LISTS = pa.large_list(pa.int32())
