"""Places that differ from one machine to the next: ${NAME} in a recipe, from the environment.

A recipe ends in the run's files and its report, and may be somebody else's; so it reads only what
is meant for it, and what is read stays a text.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from cluster.errors import UserError, excerpt

VARIABLE = re.compile(r"\$\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OWN = "TOKAY_"
SECRETS = ("TOKAY_API_KEY",)  # of ours that no file of a run may hold


def fill_in(tree: Any, place: str, *, names: Sequence[str] = (), keep_unset: bool = False) -> Any:
    """Returns a tree with the variables in its texts replaced.

    Args:
        tree: What was read from YAML; keys are left as they are.
        place: What is being read, for an error.
        names: Variables that may be read besides `TOKAY_*`.
        keep_unset: Leave a variable that is not set as it stands.

    Raises:
        UserError: A variable that is not set, or may not be read.
    """
    if isinstance(tree, str):
        return VARIABLE.sub(lambda match: _value(match, place, names, keep_unset), tree)
    if isinstance(tree, list):
        return [fill_in(each, place, names=names, keep_unset=keep_unset) for each in tree]
    if isinstance(tree, dict):
        return {
            key: fill_in(value, place, names=names, keep_unset=keep_unset)
            for key, value in tree.items()
        }
    return tree


def unset_variables(texts: Iterable[str]) -> list[str]:
    """Returns those that were kept, as they stand in the texts."""
    return [match[0] for text in texts for match in VARIABLE.finditer(text)]


def is_name(text: object) -> bool:
    """Says whether a text can be the name of a variable."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def _value(match: re.Match[str], place: str, names: Sequence[str], keep_unset: bool) -> str:
    name = match[1]
    if not is_name(name):
        raise UserError(f"{place} reads {excerpt(match[0])}: write ${{NAME}}, NAME of A-Z, 0-9, _")
    if name in SECRETS:
        raise UserError(
            f"{place} reads ${{{name}}}, a secret, which a run's files would show: take it out"
        )
    if not name.startswith(OWN) and name not in names:
        raise UserError(
            f"{place} reads ${{{excerpt(name)}}}, which may not be meant for a run's files: call"
            f" it {OWN}{excerpt(name)}, or list it under the recipe's key `variables`"
        )
    value = os.environ.get(name)
    if value:
        return value
    if keep_unset:
        return match[0]
    raise UserError(f"{place} reads ${{{name}}}: set it in the environment, {name}=...")
