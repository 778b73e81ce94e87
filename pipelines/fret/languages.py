"""Whether a query is written in the language that a recipe asks for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# Queries are short, so only what is clearly another language is called so.
MIN_OTHER, MAX_ASKED = 0.5, 0.1


def language_code(name: str) -> str:
    """Returns the ISO 639 code of a language by its English name or code.

    Raises:
        UserError: There is no such language, or none that can be recognised.
    """
    import pycountry

    try:
        language = pycountry.languages.lookup(name)
    except LookupError as error:
        raise UserError(
            f"queries.language {name!r} is no language: give its English name, as German"
        ) from error
    known = _identifier().labels
    code = getattr(language, "alpha_2", language.alpha_3)
    if code not in known:
        raise UserError(
            f"queries.language {name!r} cannot be recognised by py3langid, which knows"
            f" {', '.join(sorted(known))}"
        )
    return str(code)


def is_other_language(text: str, code: str) -> bool:
    """Says whether a text is clearly of another language than that of the code."""
    shares = dict(_identifier().rank(text))
    return bool(shares[code] < MAX_ASKED and max(shares.values()) > MIN_OTHER)


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
