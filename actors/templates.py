"""What stands around a text when it is embedded: the paper's format, and any other."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

_NO_TITLE = "none"


@dataclass(frozen=True, kw_only=True)
class PromptTemplates:
    """What surrounds a text before it is embedded, by its role.

    Gecko's format (arXiv 2403.20327, section 4) is ``task: {task} | query: {text}`` and
    ``title: {title} | text: {text}``.

    Attributes:
        query: Template with ``{text}`` and perhaps ``{task}``.
        passage: Template with ``{text}`` and perhaps ``{title}``.
    """

    query: str = "{text}"
    passage: str = "{text}"

    def __post_init__(self) -> None:
        for name, other in (("query", "task"), ("passage", "title")):
            template = getattr(self, name)
            fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
            if fields.count("text") != 1 or not set(fields) <= {"text", other}:
                raise ValueError(
                    f"{name} template {template!r}: it must hold {{text}} once and may hold "
                    f"{{{other}}}; write other braces twice"
                )

    def format_query(self, text: str, *, task: str) -> str:
        """Returns the query as the encoder reads it."""
        return self.query.format(text=text, task=task)

    def format_passage(self, text: str, title: str | None = None) -> str:
        """Returns the passage as the encoder reads it.

        A missing title reads ``none`` where the template names it (``title: {title}``), as in
        EmbeddingGemma, and is left out elsewhere.
        """
        missing = _NO_TITLE if "title:" in self.passage else ""
        # Only on the left: sentence-transformers' prompt is this of an empty text.
        return self.passage.format(text=text, title=title or missing).lstrip()

    def prefixes(self, task: str | None) -> dict[str, str]:
        """Returns sentence-transformers' prompts, for those templates that are a fixed prefix.

        Args:
            task: The task that a query has where nobody names one; None where there is none.
        """
        found = {}
        if self.query.endswith("{text}") and (task is not None or "{task}" not in self.query):
            found["query"] = self.format_query("", task=task or "")
        if self.passage.endswith("{text}"):
            found["document"] = self.format_passage("")
        return found
