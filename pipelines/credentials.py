"""Addresses with a user name or a password; a recipe may hold none, since it is kept and shown."""

import re

from pipelines.yaml_files import leaves

_CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)


def key_with_credentials(tree: object) -> str | None:
    """Returns the key of the first address with a user's name or a password in it."""
    texts = ((key, text) for key, text in leaves(tree) if isinstance(text, str))
    return next((key for key, text in texts if _CREDENTIALS.match(text)), None)
