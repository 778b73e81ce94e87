"""Tables of figures, rulers, and what else is no language."""

from actors.words import letter_share


def has_few_letters(text: str) -> str | None:
    """Refuses a text of whose characters fewer than 60 % are letters."""
    return "too few letters" if letter_share(text) < 0.6 else None
