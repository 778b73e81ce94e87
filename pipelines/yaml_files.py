"""YAML by version 1.2, read from files that anybody may have written.

PyYAML follows version 1.1, in which ``no`` is false, ``12:30`` is 750 and ``1e-4`` is a text, and
keeps the last of two equal keys. Here such files are refused or read as their authors meant them,
and none can take more time or memory than its size allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from cluster.errors import UserError, excerpt

MAX_BYTES = 500_000
MAX_DEPTH = 40
MAX_NODES = 50_000  # an anchor's content counts again at each alias
MAX_DIGITS = 400  # of a number

_CORE = "tag:yaml.org,2002:"
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PATTERN = re.compile(r"(?<=[\[,])\s*(\*(?:[^\[\]{},]*[^\[\]{},\s])?)")


def read_yaml(content: str | bytes, place: str) -> Any:
    """Reads one YAML document: mappings, lists, texts, numbers, booleans and None.

    `place` is what an error calls the file.

    Raises:
        UserError: It is not YAML, holds a key twice, a number that versions 1.1 and 1.2 read
            differently, several documents or a tag, or is too large or too deep.
    """
    return _read(content, place)[0]


def read_value(text: str, place: str) -> Any:
    """Reads the value of a setting: a list, mapping or quoted text as YAML, else the whole text.

    Items such as `*.txt` need no quotes where a list has neither quotes nor anchors to name.

    Raises:
        UserError: As :func:`read_yaml`, or something follows the value.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        return _plain(text, place)
    if text.startswith("[") and not {"&", '"', "'"}.intersection(text):
        text = _PATTERN.sub(r"'\1'", text)
    value, end = _read(text, place)
    if text[end:].strip():
        raise UserError(
            f"{place}: {excerpt(text[end:].strip())!r} follows the value: put it in quotes"
        )
    return value


def write_yaml(tree: Any) -> str:
    """Returns the text that :func:`read_yaml` reads as `tree`, in ASCII."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value that holds no others, with its key from the top: `evaluation.0.name`."""
    if isinstance(tree, dict | list | tuple):
        for part, each in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(each, f"{key}.{part}" if key else str(part))
    else:
        yield key, tree


class _Refused(yaml.MarkedYAMLError):
    """What YAML allows, and our files do not."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own way

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._num_nodes = 0
        self._sizes: dict[int, int] = {}  # of each finished node, by its id()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _Refused(
                    problem=f"*{excerpt(str(event.anchor))} contains itself", problem_mark=mark
                )
            self._count(self._sizes[id(node)], mark)
            return node
        if event.tag not in (None, "!"):
            tag = event.tag.replace(_CORE, "!!")
            raise _Refused(problem=f"the tag {excerpt(tag)!r} is not accepted", problem_mark=mark)
        before = self._num_nodes
        self._count(1, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(problem=f"more than {MAX_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
            raise _Refused(problem="a lone surrogate", problem_mark=mark)
        self._depth -= 1
        self._sizes[id(node)] = self._num_nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, list[int]] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(problem="a key that is not text", problem_mark=key.start_mark)
            lines.setdefault(key.value, []).append(key.start_mark.line + 1)
        twice = [
            f"{excerpt(key, 60)!r} in lines {at[0]} and {at[1]}"
            for key, at in lines.items()
            if len(at) > 1
        ]
        if twice:
            raise _Refused(problem=f"keys that occur twice: {', '.join(twice[:3])}; take one out")
        return node

    def _count(self, number: int, mark: Any) -> None:
        self._num_nodes += number
        if self._num_nodes > MAX_NODES:
            raise _Refused(problem=f"more than {MAX_NODES:,} values", problem_mark=mark)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"{_CORE}{_name}", re.compile(f"(?:{_pattern})\\Z"), list(_first))
    # Besides version 1.1's own, so that text that either takes for something else is quoted.
    _Dumper.add_implicit_resolver(f"{_CORE}{_name}", re.compile(f"(?:{_pattern})\\Z"), list(_first))


def _integer(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    if _LEADING_ZERO.fullmatch(text):
        plain = text.lstrip("+-").lstrip("0") or "0"
        raise _Refused(
            problem=f"{excerpt(text)} is not a number: write {excerpt(plain)}, or quote it",
            problem_mark=node.start_mark,
        )
    if len(text) > MAX_DIGITS:
        raise _Refused(problem=f"a number of {len(text):,} digits", problem_mark=node.start_mark)
    return int(text, 0)


def _real(loader: _Loader, node: Any) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor(f"{_CORE}int", _integer)
_Loader.add_constructor(f"{_CORE}float", _real)


def _read(content: str | bytes, place: str) -> tuple[Any, int]:
    """Returns the document, and where in the text it ends."""
    if len(content) > MAX_BYTES:
        raise UserError(f"{place} is larger than {MAX_BYTES:,} bytes: no file of this kind is")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8, at byte {error.start}: convert it") from error
    except yaml.YAMLError as error:
        raise UserError(f"{place}{_why(error)}") from error
    return value, len(text) if node is None else node.end_mark.index


def _plain(text: str, place: str) -> Any:
    """Returns what a text without quotes stands for."""
    loader = _Loader("")
    if _SURROGATE.search(text):
        raise UserError(f"{place}: a lone surrogate, or not of this locale: try LC_ALL=C.UTF-8")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    if tag == f"{_CORE}merge":
        return text
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except _Refused as error:
        raise UserError(f"{place}: {error.problem}") from error


def _why(error: yaml.YAMLError) -> str:
    """Returns what is wrong with a file, and where."""
    reason, where = str(error), ""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        reason, where = str(error.problem), f" line {mark.line + 1}:" if mark else ""
        if error.context == "expected a single document in the stream":
            reason = "a second document begins here; one is accepted"
    reason = excerpt(" ".join(reason.split()), 240)
    return f":{where} {reason}" if isinstance(error, _Refused) else f" is not YAML:{where} {reason}"
