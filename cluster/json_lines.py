"""Lines and JSON from anywhere, perhaps packed, with a reason for whatever cannot be read.

Python's reader takes more than JSON (`NaN`, a key twice, a lone surrogate) and raises
`RecursionError` for what is nested deeply; the readers here do neither.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.errors import Reject

GZIP = ".gz"
_MAX_KEYS = 10_000
_TOO_DEEP = "JSON nested too deeply"
_SHOWN = 200  # of a line, in a reject


class _Unaccepted(ValueError):
    """What Python's reader takes and these do not."""


def parse_json(content: bytes) -> Any:
    """Returns the value of one JSON text in UTF-8.

    Raises:
        ValueError: It is not one; the message says why in a few words.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON ({error.msg} at character {error.pos})") from error
    except _Unaccepted:
        raise
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except ValueError as error:  # Python's own limit
        raise ValueError("a whole number of thousands of digits") from error


def json_lines(
    content: bytes | Iterable[bytes], place: str, first: int = 1
) -> Iterator[tuple[str, Any] | Reject]:
    r"""Yields the place and the value of each line of JSON, or why it could not be read.

    Only ``\n`` ends a line, as JSON Lines has it: U+0085 and U+2028 may stand in a text. Blank
    lines are passed over, but counted: the lines are ``place:1`` and so on, from `first` on.
    """
    lines = io.BytesIO(content) if isinstance(content, bytes) else content
    for number, line in enumerate(lines, start=first):
        line = line.strip(b" \t\r\n")
        if not line or line == b"\xef\xbb\xbf":
            continue
        where = f"{place}:{number}"
        try:
            value = parse_json(line)
            if b"\\u" in line and not is_text(value):
                raise ValueError("half of a surrogate pair, which is no character")
        except RecursionError:
            yield where, _TOO_DEEP, line[:_SHOWN].decode("utf-8", "replace")
        except ValueError as error:
            reason = str(error).partition(" (")[0]  # where in the line would part equal reasons
            yield where, reason[:_SHOWN], line[:_SHOWN].decode("utf-8", "replace")
        else:
            yield where, value


def text_lines(lines: Iterable[bytes], place: str) -> Iterator[tuple[str, str] | Reject]:
    """Yields ``file:line`` and each line without its end; blank ones are left out."""
    for number, line in enumerate(lines, start=1):
        where = f"{place}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield where, "not UTF-8", line[:_SHOWN].decode("utf-8", "replace")
            continue
        if text.strip():
            yield where, text.rstrip("\r\n")


def is_text(value: Any) -> bool:
    """Says whether a JSON value can be written as UTF-8: a lone surrogate cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise _Unaccepted(f"a JSON object of {len(pairs)} keys (accepted are {_MAX_KEYS})")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _Unaccepted(f"the key {twice[:80]!r} twice in one JSON object")
    return fields


def _no_number(name: str) -> float:
    raise _Unaccepted(f"{name} is no number")
