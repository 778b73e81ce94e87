"""The errors a person meets: the command line answers each with one line and its exit code."""

from collections import Counter
from collections.abc import Sequence

Reject = tuple[str, str, str]  # id, reason, text


def shorten(text: str, max_characters: int = 120) -> str:
    """Returns a text of somebody else's as an error shows it: cut where it is long."""
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


class TokayError(Exception):
    """Something failed that the user could not have prevented; exit code 1."""

    exit_code = 1


class UserError(TokayError):
    """The user's mistake, told by what was given, what is accepted and what to do; exit code 2."""

    exit_code = 2


class StorageError(UserError):
    """A storage URI that cannot be read or written."""


class ArtifactError(TokayError):
    """An artifact whose files do not agree with its manifest."""


class TooManyRejects(TokayError):
    """A step gave up because more rows were bad than the recipe allows."""

    @classmethod
    def of(
        cls, step: str, reasons: Counter[str], examples: Sequence[Reject], limit: str
    ) -> "TooManyRejects":
        """Tells the commonest reasons and three examples.

        Args:
            step: Its name.
            reasons: Rows by their reason.
            examples: Some of the rows.
            limit: What was accepted, and what to do.
        """
        common = ", ".join(f"{reason!r} ({count})" for reason, count in reasons.most_common(3))
        shown = "; ".join(f"{id_}: {reason}: {text[:80]!r}" for id_, reason, text in examples[:3])
        return cls(
            f"step {step!r} refused {reasons.total()} rows, mostly {common}, and {limit}."
            f" Examples: {shown}"
        )


class EngineDied(TokayError):
    """The engine that a stage works with is gone; the stage must be loaded anew."""


class ScoresDiffer(TokayError):
    """The teacher's scores over its prefix cache are not those that it computes separately."""
