"""Names that become folders and files, so that none leads out of the folder it is meant for."""

import re
from functools import partial
from typing import Annotated

from pydantic import AfterValidator

_RUN_NAME = re.compile(r"(?!\.)[\w.-]{1,100}")
_SET_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]{1,100}")


def _check(pattern: re.Pattern[str], accepted: str, name: str) -> str:
    if not pattern.fullmatch(name):
        raise ValueError(f"accepted are up to 100 {accepted}, the first not '.'")
    return name


_of_a_run = partial(_check, _RUN_NAME, "letters, digits, '.', '_' and '-'")
_of_a_set = partial(_check, _SET_NAME, "characters without '/' and '\\'")
RunName = Annotated[str, AfterValidator(_of_a_run)]
SetName = Annotated[str, AfterValidator(_of_a_set)]
