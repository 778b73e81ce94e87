"""Program code and markup."""

_SYMBOLS = "{}[]()<>=|\\/$#@;`~^&+"


def is_code(text: str) -> str | None:
    """Refuses a text of whose characters more than 12 % are symbols of programs."""
    num_characters = len("".join(text.split()))
    return "mostly code" if sum(map(text.count, _SYMBOLS)) > 0.12 * num_characters else None
