"""Prints text as text: that of a corpus, a recipe or a cluster, which the reader did not write.

rich takes ``[bold]`` in a text for markup and ``:smile:`` for a picture, and passes control
characters on to the terminal, which may obey them.
"""

import re
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """Returns a text without what a terminal would obey; keeps line ends and tabs."""
    return _CONTROL.sub("", _SEQUENCE.sub("", text))


class Screen(Console):
    """A console that shows texts as they are; markup is `rich.text.Text`."""

    def __init__(self, *, file: TextIO | None = None, stderr: bool = False) -> None:
        """Writes to `file`, or to the standard output or error."""
        super().__init__(file=file, stderr=stderr, markup=False, emoji=False, highlight=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Renders as `Console` does, and removes control characters from what is not its own."""
        for segment in super().render(renderable, options):
            if segment.control or not _CONTROL.search(segment.text):
                yield segment
            else:
                yield Segment(plain(segment.text), segment.style)


def write_any_text() -> None:
    """Lets standard output and error show `?` for a character that they cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
