"""Which language a text is in, and whether a query is in the one that a recipe asks for."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

OF_PASSAGE = "passage"  # a query's language is that of its seed passage
NONE = "zxx"  # what ISO 639 calls a text that is in none
# What py3langid tells apart, by the name under which people ask for it.
_PARTS = {"wuu": "zh", "yue": "zh", "arz": "ar", "ary": "ar", "nn": "no", "pcm": "en"}
# Queries are short, so only what is clearly another language is called so.
MIN_OTHER, MAX_ASKED = 0.5, 0.1
MAX_CHARACTERS = 500  # enough to tell by, in half a millisecond


def language_code(name: str) -> str:
    """Returns the ISO 639 code of a language by its English name or code.

    Raises:
        UserError: There is no such language, or none that can be recognised.
    """
    import pycountry

    known = {*_identifier().labels} - _PARTS.keys()
    by_name: dict[str, str] = {language_name(code).casefold(): code for code in known}
    if name.casefold() in by_name:
        return by_name[name.casefold()]
    try:
        language = pycountry.languages.lookup(name)
    except LookupError as error:
        raise UserError(
            f"queries.language {name!r} is no language: give its English name, as German, or"
            f" {OF_PASSAGE} for that of each passage"
        ) from error
    code = getattr(language, "alpha_2", language.alpha_3)
    code = _PARTS.get(code, code)
    if code not in known:
        raise UserError(
            f"queries.language {name!r} cannot be recognised by py3langid, which knows"
            f" {', '.join(sorted(known))}"
        )
    return str(code)


def language_of(text: str) -> str:
    """Returns the ISO 639 code of the language that a text is most likely in."""
    shares = _shares(text)
    shares.pop(NONE, None)
    return max(shares, key=lambda code: shares[code])


def language_name(code: str) -> str:
    """Returns the English name of a language by its ISO 639 code.

    >>> language_name("el"), language_name("zh")
    ('Greek', 'Chinese')
    """
    import pycountry

    language = pycountry.languages.get(**{f"alpha_{len(code)}": code})
    return str(language.name).partition(" (")[0].removeprefix("Modern ")


def is_other_language(text: str, code: str) -> bool:
    """Says whether a text is clearly of another language than that of the code."""
    shares = _shares(text)
    return shares[code] < MAX_ASKED and max(shares.values()) > MIN_OTHER


def _shares(text: str) -> dict[str, float]:
    """Returns how likely a text, by its beginning, is in each language."""
    shares: dict[str, float] = defaultdict(float)
    for code, share in _identifier().rank(text[:MAX_CHARACTERS]):
        shares[_PARTS.get(code, code)] += float(share)
    return shares


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
