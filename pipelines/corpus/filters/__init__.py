"""What makes a passage unfit: a rule a file, which takes a text and returns a reason, or None."""

from collections.abc import Callable

from pipelines.corpus.filters.code import is_code
from pipelines.corpus.filters.length import is_short
from pipelines.corpus.filters.letters import has_few_letters

FILTERS: tuple[Callable[[str], str | None], ...] = (is_short, has_few_letters, is_code)
"""In their order: the first reason counts."""
