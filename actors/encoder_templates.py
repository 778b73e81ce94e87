"""What stands around a text when it is embedded: the paper's format, and any other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from string import Formatter

MAX_TEMPLATE_CHARS = 20_000
_NO_TITLE = "none"


@dataclass(frozen=True, kw_only=True)
class PromptTemplates:
    """What surrounds a text before it is embedded, by its role.

    Gecko's format (arXiv 2403.20327, section 4) is ``task: {task} | query: {text}`` and
    ``title: {title} | text: {text}``.

    Attributes:
        query: Template with ``{text}`` and perhaps ``{task}``, each once.
        passage: Template with ``{text}`` and perhaps ``{title}``, each once; without ``{title}``
            the title stands in front of the text.

    >>> gecko = PromptTemplates(passage="title: {title} | text: {text}")
    >>> gecko.format_passage("It leaves at eight.", "Ferry"), gecko.format_passage("Untitled.")
    ('title: Ferry | text: It leaves at eight.', 'title: none | text: Untitled.')
    """

    query: str = "{text}"
    passage: str = "{text}"

    def __post_init__(self) -> None:
        for name, other in (("query", "task"), ("passage", "title")):
            template = getattr(self, name)
            if len(template) > MAX_TEMPLATE_CHARS:
                raise ValueError(
                    f"{name} template of {len(template)} characters: accepted are"
                    f" {MAX_TEMPLATE_CHARS}"
                )
            fields = [field for _, field in _parts(template) if field is not None]
            if sorted(fields) not in (["text"], sorted(["text", other])):
                shown = template if len(template) <= 200 else template[:200] + "…"
                raise ValueError(
                    f"{name} template {shown!r}: it must hold {{text}} once and may hold"
                    f" {{{other}}} once, with nothing else between the braces; write other braces"
                    " twice"
                )

    def format_query(self, text: str, *, task: str) -> str:
        """Returns the query as the encoder reads it."""
        before, after = _around(self.query, task=task)
        return before + text + after

    def format_passage(self, text: str, title: str | None = None) -> str:
        """Returns the passage as the encoder reads it.

        A template without a place for the title gets it in front of the text, as in mteb.

        A missing title reads ``none`` where the template names it (``title: {title}``), as in
        EmbeddingGemma. Elsewhere it is left out, with the blanks that it leaves at the beginning.
        """
        has_place = _names(self.passage, "title")
        if title and not has_place:
            text = f"{title} {text}"
        missing = _NO_TITLE if "title:" in self.passage else ""
        before, after = _around(self.passage, title=title or missing)
        if not title and has_place:
            before = before.lstrip()
        return before + text + after

    def query_chars(self, text: str, *, task: str) -> int:
        """Returns the length of what :meth:`format_query` makes, without making it."""
        named = len(task) if _names(self.query, "task") else 0
        return len(self.format_query("", task="")) + named + len(text)

    def passage_chars(self, text: str, title: str | None = None) -> int:
        """Returns the length of what :meth:`format_passage` makes, without making it."""
        if not title:
            return len(self.format_passage("")) + len(text)
        return len(self.format_passage("", "x")) - 1 + len(title) + len(text)

    def prefixes(self, task: str | None) -> dict[str, str]:
        """Returns sentence-transformers' prompts, for those templates that are a fixed prefix.

        Args:
            task: The task that a query has where nobody names one; None where there is none.
        """
        prompts = {}
        if self.query.endswith("{text}") and (task is not None or "{task}" not in self.query):
            prompts["query"] = self.format_query("", task=task or "")
        if self.passage.endswith("{text}"):
            prompts["document"] = self.format_passage("")
        return prompts


@lru_cache
def _parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """Returns literals and the field behind each.

    A field with anything but its name between the braces is none that a template knows: a
    specification such as `{text:>1000000}` would make as long a text of any.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError:  # a brace alone
        return (("", ""),)
    return tuple(
        (literal, f"{field}!{kind}:{specification}" if specification or kind else field)
        for literal, field, specification, kind in parsed
    )


def _names(template: str, field: str) -> bool:
    return any(name == field for _, name in _parts(template))


def _around(template: str, **values: str) -> tuple[str, str]:
    """Returns what stands before and behind the text."""
    sides, side = ["", ""], 0
    for literal, field in _parts(template):
        sides[side] += literal
        if field == "text":
            side = 1
        elif field is not None:
            sides[side] += values[field]
    return sides[0], sides[1]
