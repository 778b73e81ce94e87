"""Passages that say too little."""

from actors.words import num_words

MIN_WORDS = 8
"""A passage of fewer words says too little to write a question about."""


def is_short(text: str) -> str | None:
    """Refuses a text of fewer than MIN_WORDS words."""
    if not text.strip():
        return "empty"
    return "too short" if num_words(text) < MIN_WORDS else None
