"""Addresses with a user name or a password; a recipe may hold none, since it is kept and shown."""

import re
from collections.abc import Iterable

_CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)


def key_with_credentials(value: object, key: str = "") -> str | None:
    """Returns the key of the first address with a user's name or a password in it."""
    if isinstance(value, str):
        return key if _CREDENTIALS.match(value) else None
    inner: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    parts = (key_with_credentials(each, f"{key}.{part}".lstrip(".")) for part, each in inner)
    return next(filter(None, parts), None)
