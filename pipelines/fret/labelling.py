"""The tables that the step `fret` brings together: queries, their candidates' scores, and texts.

First a query meets its scores, by its id, and is labelled. Then the labels meet the passages'
texts, by the passages' ids, and at last the texts meet their queries, in the order of the
candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact
from cluster.errors import ArtifactError
from cluster.exchange import PARTITION, Exchange, Shared
from cluster.key_filter import codes
from cluster.shard_groups import ShardGroup, shard_groups
from pipelines.fret.fusion import JUDGES, choose_labels
from pipelines.fret.pairs import scored_candidates
from pipelines.fret.scored_queries import (
    PAIR,
    judged_first,
    of_one_query,
    one_row_a_pair,
    with_scores,
)
from pipelines.records import CANDIDATES, FRET

if TYPE_CHECKING:
    from pipelines.datasets.decontamination import Decontamination
    from pipelines.fret.fret import FretConfig

QUERIES_PER_SHARD = 2048
TEXTS_PER_SHARD = 16384
CANDIDATES_SOURCE, SCORES_SOURCE = "candidates", "scores"
LABELS_SOURCE, PASSAGES_SOURCE = "labels", "passages"
TEXTS_SOURCE, DROPPED_SOURCE = "texts", "dropped"

_TEXTS = ("positive_title", "positive", "negative_titles", "negatives")
# A row of the candidates by its number among them all, and what is chosen of it; texts come later.
LABELLED = pa.schema(
    [("place", pa.int64()), *(field for field in FRET if field.name not in _TEXTS)]
)
# A text of a query: of its positive, 0, or of one of its negatives, from 1.
PLACED_TEXT = pa.schema(
    [
        ("place", pa.int64()),
        ("slot", pa.int32()),
        ("title", pa.string()),
        ("text", pa.string()),
    ]
)
DROPPED = pa.schema([("place", pa.int64()), ("reason", pa.string())])
_NOT_LABELLED: dict[str, Any] = dict.fromkeys(LABELLED.names) | {
    field.name: [] for field in LABELLED if pa.types.is_list(field.type)
}


Source = tuple[str, ShardGroup]  # what it holds, and where


def sources_of(kind: str, artifact: Artifact) -> Iterator[Source]:
    """Yields the shards of an artifact as sources of an exchange."""
    return ((kind, group) for group in shard_groups(artifact))


def num_partitions(num_rows: int, rows_each: int) -> int:
    """Returns how many partitions have so many rows each."""
    return max(1, -(-num_rows // rows_each))


@dataclass(frozen=True, kw_only=True)
class LabelQueries(Exchange):
    """Queries meet their candidates' scores, and are labelled.

    Attributes:
        config: How.
        decontamination: A `Decontamination`, which knows the texts of the run's own test sets.
        label_all: Label all candidates of a query, also those that were not scored.
        num_unscored: Of a query of which none was scored, the nearest that are labelled.
        only_positives: The negatives' texts are not asked for.
    """

    order: tuple[str, ...] = ("query_id",)
    config: FretConfig
    decontamination: Shared
    label_all: bool
    num_unscored: int
    only_positives: bool

    def split(self, source: Source) -> pa.Table:
        """Returns queries with their candidates, or the scores of pairs, by query."""
        kind, group = source
        table = group.read()
        if kind == CANDIDATES_SOURCE:
            places = np.arange(group.first_row, group.first_row + table.num_rows)
            table = table.append_column("place", pa.array(places))
            table = table.append_column("query_id", table["id"])
        else:
            table = one_row_a_pair(table)
        return _by_key(_filled(table, _SCORED), "query_id", self.num_partitions)

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Labels each query; counts them, and the texts that their labels ask for."""
        labelled, known = [], self.decontamination.get()
        for _, own in _groups(rows, "query_id"):
            pairs = [row for row in own if row["place"] is None]
            asked = (row for row in own if row["place"] is not None)
            labelled += [self._labelled(row, pairs, known) for row in asked]
        table = pa.Table.from_pylist(labelled, schema=LABELLED)
        num_texts = sum(len(label_ids(row, self.only_positives)) for row in labelled)
        return table, {"num_queries": table.num_rows, "num_texts": num_texts}

    def _labelled(
        self, row: dict[str, Any], pairs: list[dict[str, Any]], known: Decontamination
    ) -> dict[str, Any]:
        found = {name: row[name] for name in ("place", *CANDIDATES.names)}
        scored = of_one_query(pairs)
        labelled = _NOT_LABELLED | found
        if found["dropped_by"] is not None:
            return labelled
        error = next((score["error"] for score in scored.values() if score["error"]), None)
        repeated = known.repeated(row["query"])
        labelled["dropped_by"] = error or (repeated[0] if repeated else None)
        if error:
            return labelled
        columns, num_judged = self._judged(found, scored)
        labelled |= columns
        if self.label_all and num_judged:
            num_judged = len(labelled["candidate_ids"])
        return labelled | _labels(labelled, num_judged, self.config)

    def _judged(
        self, row: dict[str, Any], scored: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, Any], int]:
        """Returns a query's candidates with their scores, and how many of the first are labelled.

        They are those that were scored or else, of a query that was not, the nearest.
        """
        if scored:
            return with_scores(row, scored), len(scored)
        nearest = set(scored_candidates(row, self.num_unscored))
        return judged_first(row, nearest), len(nearest)


@dataclass(frozen=True, kw_only=True)
class FindTexts(Exchange):
    """Labels meet the texts of their passages.

    Attributes:
        only_positives: The negatives' texts are not asked for.
        wanted: A `KeyFilter` of the passages that are asked for, so that the texts of most others
            do not travel.
    """

    order: tuple[str, ...] = ("passage_id",)
    only_positives: bool
    wanted: Shared

    def split(self, source: Source) -> pa.Table:
        """Returns for which query, and which of its labels, texts are asked for; or texts."""
        kind, group = source
        if kind == LABELS_SOURCE:
            return _by_key(self._asked(group), "passage_id", self.num_partitions)
        table = group.read(["id", "title", "text"]).rename_columns(["passage_id", "title", "text"])
        is_wanted = self.wanted.get().passes(codes(table["passage_id"].to_pylist()))
        table = table.filter(pa.array(is_wanted, pa.bool_()))
        return _by_key(_filled(table, _ASKED), "passage_id", self.num_partitions)

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Returns the texts that are asked for.

        Raises:
            ArtifactError: A passage is not in the corpus.
        """
        placed = []
        for id_, own in _groups(rows, "passage_id"):
            asking = [row for row in own if row["place"] is not None]
            text = next((row for row in own if row["place"] is None), None)
            if asking and text is None:
                raise ArtifactError(
                    f"passage {id_} of the candidates is not among the passages: make both anew"
                )
            placed += [
                {"place": row["place"], "slot": row["slot"]}
                | {"title": text["title"], "text": text["text"]}
                for row in asking
                if text is not None
            ]
        table = pa.Table.from_pylist(placed, schema=PLACED_TEXT)
        return table, {"num_texts": table.num_rows}

    def _asked(self, labels: ShardGroup) -> pa.Table:
        rows = labels.read(_OF_LABELS).to_pylist()
        asked = [
            {"passage_id": id_, "place": row["place"], "slot": slot}
            for row in rows
            for slot, id_ in enumerate(label_ids(row, self.only_positives))
        ]
        return pa.Table.from_pylist(asked, schema=_ASKED)


@dataclass(frozen=True, kw_only=True)
class JoinTexts(Exchange):
    """Texts meet the queries that they are labels of, and so does why some are dropped.

    A partition is a range of the candidates' rows, so that their order stays.

    Attributes:
        rows_each: How many of them.
    """

    order: tuple[str, ...] = ("place",)
    rows_each: int

    def split(self, source: Source) -> pa.Table:
        """Returns what is known of each row of the candidates."""
        _, group = source
        rows = _filled(group.read(), _JOINED)
        places = rows["place"].to_numpy() // self.rows_each
        return rows.append_column(PARTITION, pa.array(places, pa.int64()))

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Returns rows of `FRET`."""
        joined = []
        for _, own in _groups(rows, "place"):
            (row,) = (each for each in own if each["id"] is not None)
            reason = next((each["reason"] for each in own if each["reason"] is not None), None)
            texts = sorted(
                (each for each in own if each["slot"] is not None), key=itemgetter("slot")
            )
            positive, negatives = (texts[0], texts[1:]) if texts else ({}, [])
            joined.append(
                {name: row[name] for name in LABELLED.names if name != "place"}
                | {
                    "dropped_by": row["dropped_by"] or reason,
                    "positive_title": positive.get("title"),
                    "positive": positive.get("text"),
                    "negative_titles": [each["title"] for each in negatives],
                    "negatives": [each["text"] for each in negatives],
                }
            )
        table = pa.Table.from_pylist(joined, schema=FRET)
        return table, {"num_queries": table.num_rows}


_OF_LABELS = ["place", "positive_id", "negative_ids"]
_SCORED = pa.schema([("place", pa.int64()), *CANDIDATES, *PAIR])
_ASKED = pa.schema([("passage_id", pa.string()), *PLACED_TEXT])
_JOINED = pa.unify_schemas([LABELLED, PLACED_TEXT, DROPPED])


def wanted_codes(labels: ShardGroup, only_positives: bool) -> np.ndarray:
    """Returns the sorted codes of the passages that labels ask texts of."""
    rows = labels.read(_OF_LABELS).to_pylist()
    return np.unique(codes([id_ for row in rows for id_ in label_ids(row, only_positives)]))


def label_ids(row: dict[str, Any], only_positive: bool) -> list[str]:
    """Returns the passages of a row's labels whose texts are asked for, the positive first."""
    if row["positive_id"] is None:
        return []
    return [row["positive_id"], *([] if only_positive else row["negative_ids"])]


def _labels(row: dict[str, Any], num_judged: int, config: FretConfig) -> dict[str, Any]:
    """Returns the labels of a query by its first `num_judged` candidates; none if none was."""
    if num_judged == 0:
        return {}
    ids = row["candidate_ids"][:num_judged]
    unknown = [float("nan")] * num_judged
    labels = choose_labels(
        {judge: (row[column] + unknown)[:num_judged] for judge, column in JUDGES.items()},
        seed_place=ids.index(row["seed_id"]),
        config=config,
        query_id=row["id"],
    )
    positive_id = ids[labels.positive]
    return {
        "fused": labels.fused,
        "positive_id": positive_id,
        "positive_is_seed": positive_id == row["seed_id"],
        "negative_ids": [ids[place] for place in labels.negatives],
    }


def _filled(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns a table with the columns of a schema; those that it lacks are null."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.schema.names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _by_key(table: pa.Table, key: str, num_partitions: int) -> pa.Table:
    places = codes(table[key].to_pylist()) % num_partitions
    return table.append_column(PARTITION, pa.array(places, pa.int64()))


def _groups(rows: pa.Table, key: str) -> Iterable[tuple[Any, list[dict[str, Any]]]]:
    """Yields rows that are sorted by a key, those of one key together."""
    for value, own in groupby(rows.to_pylist(), key=itemgetter(key)):
        yield value, list(own)
