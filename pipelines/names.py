"""Names that become folders and files, so that none leads out of the folder it is meant for."""

import re
from typing import Annotated

from pydantic import AfterValidator

MAX_LENGTH = 100
_RUN_NAME = re.compile(r"(?!\.)[\w.-]{1,100}")
_SET_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]{1,100}")


def _run_name(name: str) -> str:
    if not _RUN_NAME.fullmatch(name):
        raise ValueError(
            f"accepted are up to {MAX_LENGTH} letters, digits, '.', '_' and '-', the first not '.'"
        )
    return name


def _set_name(name: str) -> str:
    if not _SET_NAME.fullmatch(name):
        raise ValueError(
            f"accepted are up to {MAX_LENGTH} characters without '/' and '\\', the first not '.'"
        )
    return name


RunName = Annotated[str, AfterValidator(_run_name)]
SetName = Annotated[str, AfterValidator(_set_name)]
