"""The prompts of the factory, as data: what the LLM is shown to write a query, and to score one.

Gecko (arXiv 2403.20327, section 3) names three few-shot prompts and prints none; all text here is
ours. A small model completes far better than it follows instructions, so the prompts are documents
to be continued, with one task each; every prompt begins with the same examples, which the engine
computes once. The examples speak of things that exist in no library and no test collection, so
that no query is ever written for the model beforehand.
"""

import hashlib
import re
from dataclasses import dataclass

from actors.language_model import ScoringPrompt

MIN_QUERY_WORDS = 3
MAX_QUERY_WORDS = 40
STOP = ("\n",)


@dataclass(frozen=True, kw_only=True)
class QueryPrompt:
    """A few-shot prompt for queries of one task.

    Attributes:
        task: The task its queries have (Gecko's t).
        examples: (passage, query) pairs.
        cue: What stands before a query.
    """

    task: str
    examples: tuple[tuple[str, str], ...]
    cue: str

    def render(self, title: str, text: str) -> str:
        """Returns the prompt for a passage, to be continued by the query."""
        shots = "".join(f"Passage: {p}\n{self.cue} {q}\n\n" for p, q in self.examples)
        return f"{shots}Passage: {passage_line(title, text)}\n{self.cue}"


@dataclass(frozen=True, kw_only=True)
class FreeTaskPrompt:
    """Gecko's own form, for larger models: they write the task and the query for it.

    Attributes:
        instruction: What to do, before the examples.
        examples: (passage, task, query) triples; many tasks here make many tasks there.
    """

    instruction: str
    examples: tuple[tuple[str, str, str], ...]

    def render(self, title: str, text: str) -> str:
        """Returns the prompt for a passage, to be continued by `TASK | QUERY`."""
        shots = "".join(f"Passage: {p}\nTask | Query: {t} | {q}\n\n" for p, t, q in self.examples)
        return f"{self.instruction}\n\n{shots}Passage: {passage_line(title, text)}\nTask | Query:"


@dataclass(frozen=True, kw_only=True)
class PairPrompt:
    """The few-shot prompt that both scores are read from.

    Attributes:
        examples: (passage, query, relevant?) triples, as many relevant as not.
        question: What is asked after the query.
        labels: The answers for relevant and irrelevant, with their leading blanks.
    """

    examples: tuple[tuple[str, str, bool], ...]
    question: str
    labels: tuple[str, str]

    def render(self, query: str, title: str, text: str) -> ScoringPrompt:
        """Lays out a (query, passage) pair; pairs of one passage share `context`."""
        shots = "".join(
            f"Passage: {p}\nQuestion: {q}\n{self.question}{self.labels[0 if relevant else 1]}\n\n"
            for p, q, relevant in self.examples
        )
        return ScoringPrompt(
            context=f"{shots}Passage: {passage_line(title, text)}\nQuestion:",
            query=f" {query}",
            question=f"\n{self.question}",
            labels=self.labels,
        )


def parse_query(completion: str, *, cut: bool) -> tuple[str, str | None]:
    """Returns the query and None, or what was written and why it is no query."""
    query = re.sub(r"\s+", " ", completion.split("\n")[0]).strip().strip('"').strip()
    num_words = len(query.split())
    if not query:
        return query, "the LLM wrote nothing"
    if num_words < MIN_QUERY_WORDS:
        return query, "query too short"
    if cut or num_words > MAX_QUERY_WORDS:
        return query, "query too long"
    return query, None


def parse_task_and_query(completion: str, *, cut: bool) -> tuple[str, str, str | None]:
    """Returns (task, query, None), or what could be read and why it is not usable."""
    task, bar, rest = completion.split("\n")[0].partition("|")
    query, reason = parse_query(rest, cut=cut)
    task = " ".join(task.split()).lower()
    if not bar or not task:
        return task, query, "the LLM wrote no task"
    return task, query, reason


def choose_prompt(tasks: tuple[str, ...], query_id: str) -> QueryPrompt:
    """Returns the prompt of one of the tasks, drawn by the query's id."""
    number = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:4], "big")
    return QUERY_PROMPTS[tasks[number % len(tasks)]]


def scoring_prompt(query: str, title: str, text: str) -> ScoringPrompt:
    """Lays out a (query, passage) pair for both scores."""
    return PAIR_PROMPT.render(query, title, text)


def passage_line(title: str, text: str) -> str:
    """Returns a passage as one line."""
    line = " ".join(text.split())
    return f"{title}. {line}" if title and not line.startswith(title) else line


@dataclass(frozen=True, kw_only=True)
class _Shot:
    """An invented passage with a query of each task."""

    passage: str
    question: str
    search: str
    claim: str


_BREAD, _ALBUM, _WING, _SHIFT, _CORAL, _POOL, _MERIDIAN, _GAPS = _SHOTS = (
    _Shot(
        passage=(
            "Sourdough rises slowly because wild yeast is less active than baker's yeast. A dough"
            " left overnight in the refrigerator develops acids that give the bread its flavour."
        ),
        question="why does homemade bread taste better when the dough rests overnight",
        search="overnight sourdough fermentation flavour",
        claim=("Dough that rests overnight in the cold tastes better because acids develop in it."),
    ),
    _Shot(
        passage=(
            "album.rotate. Turn every picture of the album by the given angle, counter-clockwise"
            " and in degrees. If expand is true, the canvas grows so that no corner is cut off;"
            " otherwise pictures keep their size."
        ),
        question="how do I turn a photo sideways without losing its corners",
        search="turn pictures without cutting off the corners",
        claim="Pictures of an album can be turned without losing their corners.",
    ),
    _Shot(
        passage=(
            "Lift on a thin wing at low speed grows with the angle of attack until the flow"
            " separates from the upper surface, after which it falls abruptly."
        ),
        question=("what happens to the lift of a wing when the angle of attack becomes too large"),
        search="loss of lift at high angle of attack",
        claim=("The lift of a wing keeps growing however large the angle of attack becomes."),
    ),
    _Shot(
        passage=(
            "roster.Shift.overlaps. Return True if this shift and other have any minute in"
            " common. Shifts that merely touch, one ending when the other begins, do not overlap."
        ),
        question="how can I check whether two time slots clash",
        search="test if two time ranges share a moment",
        claim=("Two shifts overlap when one begins at the moment at which the other ends."),
    ),
    _Shot(
        passage=(
            "Coral polyps expel the algae that live in their tissue when the water stays too warm"
            " for several weeks. Without them the coral turns white, and it starves unless the"
            " algae return."
        ),
        question="why do corals turn white when the sea gets warmer",
        search="cause of coral bleaching in warm water",
        claim=("Corals turn white when warm water makes them lose the algae in their tissue."),
    ),
    _Shot(
        passage=(
            "Pool. A set of worker threads that outlives the jobs given to it. Starting a thread"
            " for every small job wastes time; a pool starts them once, hands out jobs in the"
            " order of their arrival and waits for the last one when it is closed."
        ),
        question=("how can I run many small jobs at once without starting a new thread for each"),
        search="reuse threads for many small jobs",
        claim="A pool of threads starts a new thread for every job.",
    ),
    _Shot(
        passage=(
            "The committee of 1884 fixed the prime meridian at Greenwich, mainly because most of"
            " the world's shipping already used charts that were based on it."
        ),
        question="why was Greenwich chosen as the zero line of longitude",
        search="reason for the Greenwich prime meridian",
        claim=(
            "Greenwich became the prime meridian because most ships already used charts based on"
            " it."
        ),
    ),
    _Shot(
        passage=(
            "table.fill_gaps. Replace missing values. method: 'mean' puts in the average of the"
            " column, 'last' repeats the value before the gap. Columns of text accept 'last' only."
        ),
        question="what can I do about empty cells in a column of numbers",
        search="replace missing values by the column average",
        claim="Gaps in a column of text can be filled with the average of the column.",
    ),
)

QUERY_PROMPTS = {
    prompt.task: prompt
    for prompt in (
        QueryPrompt(
            task="question answering",
            examples=tuple((shot.passage, shot.question) for shot in _SHOTS),
            cue="Question:",
        ),
        QueryPrompt(
            task="search result",
            examples=tuple((shot.passage, shot.search) for shot in _SHOTS),
            cue="Search:",
        ),
        QueryPrompt(
            task="fact checking",
            examples=tuple((shot.passage, shot.claim) for shot in _SHOTS),
            cue="Claim:",
        ),
    )
}

FREE_TASK_PROMPT = FreeTaskPrompt(
    instruction=(
        "For each passage, name a retrieval task for which it would be a good result, and write a"
        " query of that task in the words of someone who has not seen the passage."
    ),
    examples=(
        (_BREAD.passage, "question answering", _BREAD.question),
        (_ALBUM.passage, "search result", _ALBUM.search),
        (_WING.passage, "fact checking", _WING.claim),
        (_SHIFT.passage, "find the function that does what is described", _SHIFT.question),
        (_CORAL.passage, "sentence similarity", _CORAL.claim),
        (_MERIDIAN.passage, "find the reason for a decision", _MERIDIAN.question),
    ),
)

PAIR_PROMPT = PairPrompt(
    examples=(
        (_ALBUM.passage, _ALBUM.question, True),
        (_BREAD.passage, "what temperature should an oven have for pizza", False),
        (_SHIFT.passage, "how do I print a list of the shifts of next week", False),
        (_WING.passage, _WING.question, True),
        (_CORAL.passage, "how fast does a coral reef grow", False),
        (_GAPS.passage, _GAPS.question, True),
    ),
    question="Does the passage answer the question?",
    labels=(" yes", " no"),
)
