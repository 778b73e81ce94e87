"""The errors a person meets: the command line answers each with one line and its exit code."""

import re
from collections import Counter
from collections.abc import Sequence

Reject = tuple[str, str, str]  # id, reason, text
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near-duplicate"
DUPLICATES = (DUPLICATE, NEAR_DUPLICATE)  # reasons of rejects that are not bad rows

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def excerpt(value: object, max_characters: int = 200) -> str:
    """Returns a value's text on one line that any terminal can show, cut at `max_characters`.

    For whatever comes from outside, above all in errors: control characters and lone surrogates
    become U+FFFD.
    """
    line = _UNPRINTABLE.sub("\ufffd", " ".join(str(value).split()))
    return line if len(line) <= max_characters else line[: max_characters - 1].rstrip() + "…"


class TokayError(Exception):
    """Something failed that the user could not have prevented; exit code 1."""

    exit_code = 1


class UserError(TokayError):
    """The user's mistake: what was given, what is accepted and what to do; exit code 2."""

    exit_code = 2


class StorageError(UserError):
    """A storage URI that cannot be read or written."""


class ArtifactError(TokayError):
    """An artifact whose files do not agree with its manifest."""


class OtherFormat(ArtifactError):
    """An artifact that another version of Tokay wrote, in a format that this one does not read."""

    exit_code = 2


class TooManyRejects(TokayError):
    """A step gave up because more rows were bad than the recipe allows."""

    @classmethod
    def of(
        cls, step: str, reasons: Counter[str], examples: Sequence[Reject], limit: str
    ) -> "TooManyRejects":
        """Returns the error with the commonest reasons and three examples.

        `limit` says what was accepted, and what to do.
        """
        common = ", ".join(
            f"{excerpt(reason, 80)!r} ({count})" for reason, count in reasons.most_common(3)
        )
        shown = "; ".join(
            f"{excerpt(id_, 80)}: {excerpt(reason, 80)}: {excerpt(text, 80)!r}"
            for id_, reason, text in examples[:3]
        )
        return cls(
            f"step {step!r} refused {reasons.total()} rows, mostly {common}, and {limit}."
            f" Examples: {shown}"
        )


class EngineDied(TokayError):
    """The engine that a stage works with is gone; the stage must be loaded again."""


class ScoresDiffer(TokayError):
    """The teacher's scores over its prefix cache are not those that it computes separately."""
