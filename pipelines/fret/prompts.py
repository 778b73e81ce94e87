"""The prompts of the factory, as data: what the LLM is shown to write a query, and to score one.

Gecko (arXiv 2403.20327, section 3) names three few-shot prompts and prints none; all text here is
ours. A small model completes far better than it follows instructions, so the prompts are documents
to be continued; every prompt begins with the same examples, which the engine computes once.
"""

import hashlib
import re
from dataclasses import dataclass

from actors.language_model import ScoringPrompt

MIN_QUERY_WORDS = 3
MAX_QUERY_WORDS = 40


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


STOP = ("\n",)


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


def choose_prompt(tasks: tuple[str, ...], query_id: str) -> QueryPrompt:
    """Returns the prompt of one of the tasks, drawn by the query's id."""
    number = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:4], "big")
    return QUERY_PROMPTS[tasks[number % len(tasks)]]


def passage_line(title: str, text: str) -> str:
    """Returns a passage as one line."""
    line = " ".join(text.split())
    return f"{title}. {line}" if title and not line.startswith(title) else line


_SHOTS = (
    (
        "Sourdough rises slowly because wild yeast is less active than baker's yeast. A dough left"
        " overnight in the refrigerator develops acids that give the bread its flavour.",
        "why does my homemade bread taste better when the dough rests overnight in the fridge",
        "overnight dough flavour refrigerator",
    ),
    (
        "shutil.disk_usage. Return disk usage statistics about the given path as a named tuple with"
        " the attributes total, used and free, which are the amounts of total, used and free space,"
        " in bytes.",
        "how can I find out how much space is left on a drive",
        "get free disk space of a folder in a program",
    ),
    (
        "Lift on a thin wing at low speed grows with the angle of attack until the flow separates"
        " from the upper surface, after which it falls abruptly.",
        "what happens to the lift of a wing when the angle of attack becomes too large",
        "effect of flow separation on lift at high angle of attack",
    ),
)

QUERY_PROMPTS = {
    prompt.task: prompt
    for prompt in (
        QueryPrompt(
            task="question answering",
            examples=tuple((passage, question) for passage, question, _ in _SHOTS),
            cue="Question:",
        ),
        QueryPrompt(
            task="search result",
            examples=tuple((passage, search) for passage, _, search in _SHOTS),
            cue="Search:",
        ),
    )
}


_SCORING_SHOTS = (
    (_SHOTS[1][0], _SHOTS[1][1], True),
    (_SHOTS[0][0], "what temperature should an oven have for pizza", False),
    (_SHOTS[2][0], _SHOTS[2][1], True),
    (_SHOTS[1][0], "how do I delete all files in a folder", False),
)
_LABELS = (" yes", " no")


def scoring_prompt(query: str, title: str, text: str) -> ScoringPrompt:
    """Lays out a (query, passage) pair for both scores; pairs of one passage share `context`."""
    shots = "".join(
        f"Passage: {p}\nQuestion: {q}\nDoes the passage answer the question?"
        f"{_LABELS[0] if relevant else _LABELS[1]}\n\n"
        for p, q, relevant in _SCORING_SHOTS
    )
    return ScoringPrompt(
        context=f"{shots}Passage: {passage_line(title, text)}\nQuestion:",
        query=f" {query}",
        question="\nDoes the passage answer the question?",
        labels=_LABELS,
    )
