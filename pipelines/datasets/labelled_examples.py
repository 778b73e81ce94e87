"""Labelled sets as training examples: what each kind's rows mean.

A row that cannot be read is a reject; one that is fine and gives no example is left out; both are
counted with their reasons.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.errors import Reject, UserError
from cluster.row_files import Row
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.labelled_rows import read_rows, retrieval_rows
from pipelines.datasets.labelled_sets import FIELDS, LabelledSet
from pipelines.datasets.qrels import number, read_qrels
from pipelines.ids import passage_id

if TYPE_CHECKING:
    from cluster.artifacts import Artifact

MAX_LISTED = 100
_UNIQUE_ID_LENGTH = 10  # hexadecimal characters: a million triples collide once or never


class Target(NamedTuple):
    """A positive or a negative, unformatted."""

    text: str
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training example, unformatted.

    Attributes:
        task: What the query asks for.
        query: The query's text.
        positive: Its target.
        negatives: Its hard negatives.
        query_id: Equal for equal queries.
        positive_id: Equal for equal positives.
        unique_id: Appended to query, positive and negatives, so that other examples' targets are
            trivial negatives and no false ones (Gecko, for classification).
        teacher_scores: Of the positive and of each negative; empty where nobody scored them.
    """

    task: str
    query: str
    positive: Target
    negatives: tuple[Target, ...]
    query_id: str
    positive_id: str
    unique_id: str = ""
    teacher_scores: tuple[float, ...] = ()


@dataclass(kw_only=True)
class Reading:
    """What became of a set's rows, filled while its examples are taken.

    Attributes:
        decontamination: Knows the texts that the run is judged by.
        num_rows: Rows read.
        rejects: (place, reason, text) of the rows that could not be.
        left_out: Reason -> rows that are fine and give no example.
        decontaminated: Reason -> rows, or examples, that repeat an evaluation query.
        contaminated: The first of their texts, each with the query that it repeats.
    """

    decontamination: Decontamination
    num_rows: int = 0
    rejects: list[Reject] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    decontaminated: Counter[str] = field(default_factory=Counter)
    contaminated: list[tuple[str, str]] = field(default_factory=list)

    def reject(self, where: str, reason: str, row: object) -> None:
        """Notes a row that cannot be read."""
        self.rejects.append((where, reason, json.dumps(row, default=str)[:200]))

    def is_contaminated(self, *texts: str) -> bool:
        """Says whether one of the texts repeats an evaluation query, and notes it."""
        for text in texts:
            if repeated := self.decontamination.repeated(text):
                reason, query = repeated
                self.decontaminated[reason] += 1
                if len(self.contaminated) < MAX_LISTED:
                    self.contaminated.append((text, query))
                return True
        return False


def read_examples(
    labelled: LabelledSet, reading: Reading, passages: Artifact | None = None
) -> Iterator[Example]:
    """Yields the set's examples, and notes in `reading` what became of its rows.

    `passages` are the run's, for a set that is made of them.

    Raises:
        UserError: The set does not exist, is no file that is read here, or has one label only.
    """
    if labelled.kind == "retrieval":
        examples = _retrieval(labelled, reading)
    else:
        rows = partial(_texts, labelled, reading, passages)
        examples = _KINDS[labelled.kind](labelled, rows, reading)
    for example in examples:
        # An asymmetric set's targets are passages, which a corpus may share with a test set.
        targets = (example.positive, *example.negatives) if labelled.is_symmetric else ()
        if not reading.is_contaminated(example.query, *[target.text for target in targets]):
            yield example


_Rows = Callable[..., Iterator[tuple[dict[str, Any], str, list[str]]]]


def _texts(
    labelled: LabelledSet, reading: Reading, passages: Artifact | None, *names: str
) -> Iterator[tuple[dict[str, Any], str, list[str]]]:
    """Yields each row, its place, and the texts of some fields, which it must have."""
    for row in read_rows(labelled, passages):
        reading.num_rows += 1
        if len(row) == 3:
            reading.rejects.append(row)
            continue
        where, fields = row
        values = [fields.get(name) for name in names]
        texts = [value.strip() if isinstance(value, str) else "" for value in values]
        if all(texts):
            yield fields, where, texts
        else:
            bad = names[texts.index("")]
            reading.reject(where, f"no text in field {labelled.fields.get(bad, bad)!r}", fields)


def _pairs(labelled: LabelledSet, rows: _Rows, reading: Reading) -> Iterator[Example]:
    for row, where, (query, positive) in rows("query", "positive"):
        negatives = [_list(row.get(name)) for name in ("negative", "negatives")]
        if None in negatives:
            reading.reject(where, "negatives are neither a text nor a list of texts", row)
            continue
        # Those who list several put the hardest first.
        several = [negative for texts in negatives for negative in texts or []]
        yield _example(labelled, query, positive, several)


def _title_body(labelled: LabelledSet, rows: _Rows, reading: Reading) -> Iterator[Example]:
    for row, where, (text,) in rows("text"):
        given = row.get("title") or ""
        if not isinstance(given, str):
            reading.reject(where, "title is no text", row)
            continue
        title = given.strip()
        body = text.removeprefix(title).lstrip(" .:-\n")  # else the words of the title would do
        if title and body:
            yield _example(labelled, title, body, [])
        else:
            reading.left_out["nothing behind its title" if title else "no title"] += 1


def _nli(labelled: LabelledSet, rows: _Rows, reading: Reading) -> Iterator[Example]:
    """Entailed hypotheses are positives; contradicting ones of the same premise are negatives."""
    hypotheses: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row, where, (premise, hypothesis, label) in rows("premise", "hypothesis", "label"):
        if label not in _NLI_LABELS:
            reading.reject(where, f"label is none of {', '.join(_NLI_LABELS)}", row)
        elif label not in ("entailment", "contradiction"):
            reading.left_out[f"label {label}"] += 1
        elif not reading.is_contaminated(premise, hypothesis):
            of_label = hypotheses.setdefault(premise, ({}, {}))[label == "contradiction"]
            if hypothesis in of_label:
                reading.left_out["repeats another row"] += 1
            of_label[hypothesis] = None
    for premise, (entailed, contradicting) in hypotheses.items():
        if not entailed:
            reading.left_out["contradiction of a premise without entailment"] += len(contradicting)
        for place, hypothesis in enumerate(entailed):
            yield _example(labelled, premise, hypothesis, _turned(list(contradicting), place))


_NLI_LABELS = ("entailment", "neutral", "contradiction", "not_entailment", "-")


def _classes(labelled: LabelledSet, rows: _Rows, reading: Reading) -> Iterator[Example]:
    """Another text of the same label is the positive, texts of other labels are negatives."""
    by_label: dict[str, dict[str, None]] = defaultdict(dict)
    for row, where, (text,) in rows("text"):
        label = row.get("label")
        if not isinstance(label, str | int) or label == "":
            reading.reject(where, "label is neither a text nor a whole number", row)
        elif text in by_label[str(label)]:
            reading.left_out["repeats another text of its label"] += 1
        elif not reading.is_contaminated(text):
            by_label[str(label)][text] = None
    by_label = {label: members for label, members in by_label.items() if members}
    if len(by_label) == 1:
        raise UserError(
            f"labelled set {labelled.name!r} has the label {next(iter(by_label))!r} alone, and"
            " negatives have another: give at least two"
        )
    texts = [text for members in by_label.values() for text in members]
    draw, start = random.Random(labelled.name), 0
    for label, members in by_label.items():
        size, num_others = len(members), len(texts) - len(members)
        if size == 1:
            reading.left_out["no other text of its label"] += 1
        for place in range(start, start + size if size > 1 else start):
            another = start + (place - start + draw.randrange(1, size)) % size
            others = draw.sample(range(num_others), min(labelled.max_negatives, num_others))
            negatives = [texts[other if other < start else other + size] for other in others]
            unique = passage_id(labelled.name, f"{label} {texts[place]}")[:_UNIQUE_ID_LENGTH]
            yield _example(labelled, texts[place], texts[another], negatives, unique)
        start += size


def _sts(labelled: LabelledSet, rows: _Rows, reading: Reading) -> Iterator[Example]:
    for row, where, (one, other) in rows("sentence1", "sentence2"):
        score = _score(row["score"])
        if score is None:
            reading.reject(where, "score is no number", row)
            continue
        if score >= labelled.min_score:
            yield _example(labelled, one, other, [])
        else:
            reading.left_out[f"score below {labelled.min_score:g}"] += 1


def _score(value: Any) -> float | None:
    """Returns a field's number, None where it is none."""
    try:
        score = number(value) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return score if score is not None and math.isfinite(score) else None


def _bitext(labelled: LabelledSet, rows: _Rows, reading: Reading) -> Iterator[Example]:
    for _, _, (one, other) in rows("sentence1", "sentence2"):
        if one == other:
            reading.left_out["equal in both languages"] += 1
        else:
            yield _example(labelled, one, other, [])


def _rerank(labelled: LabelledSet, rows: _Rows, reading: Reading) -> Iterator[Example]:
    for row, where, (query,) in rows("query"):
        positives, negatives = _list(row.get("positive")), _list(row.get("negative"))
        if positives is None or negatives is None:
            reading.reject(where, "positive or negative is no list of texts", row)
            continue
        if not positives:
            reading.left_out["no positive"] += 1
        for place, positive in enumerate(positives):
            yield _example(labelled, query, positive, _turned(negatives, place))


def _choices(labelled: LabelledSet, rows: _Rows, reading: Reading) -> Iterator[Example]:
    """The label names the choice that answers the question; the others are negatives."""
    choices = FIELDS[labelled.kind][2:]
    for row, where, (query, label) in rows("query", "label"):
        texts = {choice: row[choice] for choice in choices if row[choice] is not None}
        if not all(isinstance(text, str) and text.strip() for text in texts.values()):
            reading.reject(where, "a choice is no text", row)
        elif label not in texts:
            reading.reject(where, f"label is none of {', '.join(choices)}", row)
        else:
            answer = texts.pop(label).strip()
            wrong = [text.strip() for text in texts.values()]
            # So that each stands as the hard negative of some question.
            yield _example(labelled, query, answer, _turned(wrong, reading.num_rows))


def _retrieval(labelled: LabelledSet, reading: Reading) -> Iterator[Example]:
    """Each relevant passage of the qrels is an example."""
    rows = retrieval_rows(labelled)
    judged = read_qrels(rows.qrels, rows.place)
    reading.num_rows += len(judged.judgements) + len(judged.rejects) + judged.num_repeated
    reading.rejects += judged.rejects
    qrels = {pair: where for pair, (score, where) in judged.judgements.items() if score > 0}
    for reason, num_rows in (
        ("judged not relevant", len(judged.judgements) - len(qrels)),
        ("repeats another judgement", judged.num_repeated),
    ):
        if num_rows:
            reading.left_out[reason] += num_rows
    queries = _texts_by_id(rows.queries, {query for query, _ in qrels}, reading)
    passages = _texts_by_id(rows.corpus, {passage for _, passage in qrels}, reading)
    for (query, passage), where in qrels.items():
        if query in queries and passage in passages:
            yield _example(labelled, queries[query].text, passages[passage], [])
        else:
            missing = "the query" if query not in queries else "the passage"
            reading.reject(where, f"{missing} is missing or empty", [query, passage])


def _texts_by_id(
    rows: Iterable[Row | Reject], ids: set[str], reading: Reading
) -> dict[str, Target]:
    """Reads the texts of some ids; a line that cannot be read is a reject if nothing else is."""
    texts = {}
    for row in rows:
        if len(row) == 3:
            reading.num_rows += 1
            reading.rejects.append(row)
            continue
        given, text, title = (row[1].get(name) for name in ("_id", "text", "title"))
        id_ = str(given) if isinstance(given, str | int) else None
        if id_ in ids and isinstance(text, str) and isinstance(title or "", str) and text.strip():
            texts[id_] = Target(text.strip(), title or "")
    return texts


_KINDS: dict[str, Callable[[LabelledSet, _Rows, Reading], Iterator[Example]]] = {
    "pairs": _pairs,
    "title-body": _title_body,
    "nli": _nli,
    "classification": _classes,
    "clustering": _classes,
    "sts": _sts,
    "rerank": _rerank,
    "multiple-choice": _choices,
    "bitext": _bitext,
}


def _example(
    labelled: LabelledSet,
    query: str,
    positive: str | Target,
    negatives: Iterable[str],
    unique_id: str = "",
) -> Example:
    target = Target(positive) if isinstance(positive, str) else positive
    # Of a symmetric set, a query and a target with the same text are the same.
    kind = "query" if labelled.is_symmetric else target.title
    others = [Target(text) for text in dict.fromkeys(negatives) if text != target.text]
    return Example(
        task=labelled.query_task,
        query=query,
        positive=target,
        negatives=tuple(others[: labelled.max_negatives]),
        query_id=passage_id("query", f"{query} {unique_id}" if unique_id else query),
        positive_id=passage_id(kind, f"{target.text} {unique_id}" if unique_id else target.text),
        unique_id=unique_id,
    )


def _list(value: Any) -> list[str] | None:
    """Returns the texts of a field that holds a text, a list of them or nothing; else None."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        return None
    return [text.strip() for text in values if text.strip()]


def _turned(texts: list[str], by: int) -> list[str]:
    """Returns the texts from another start, so that a query's positives get different negatives."""
    start = by % len(texts) if texts else 0
    return texts[start:] + texts[:start]
