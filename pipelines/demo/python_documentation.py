"""A corpus that every machine with Tokay already holds: the documentation of its own Python.

It lets a newcomer see the whole loop on real text without a data hub. Taken are the language
reference (`pydoc_data.topics`), the docstrings of the standard library and of the scientific
packages, and the long descriptions of the installed distributions. Nothing is executed beyond
imports, and the order is the same every time.
"""

import importlib
import inspect
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageMetadata, distributions
from operator import attrgetter
from types import ModuleType

from actors.words import num_words
from pipelines.corpus.cutting import clean

log = logging.getLogger(__name__)

# Sections of the reference that other sections repeat; each paragraph is taken once, from the
# specific section where there is one.
_COLLECTIVE_TOPICS = ("typesseq", "typesmapping", "types", "specialnames", "execmodel", "compound")
# The str docstrings say it method by method; the debugger's commands are pdb's own module text.
_SKIPPED_TOPICS = {"string-methods", "debugger"}

_EVERYDAY = """
    builtins bisect calendar collections contextlib copy csv datetime enum fnmatch functools
    glob graphlib hashlib heapq html itertools json math os.path pathlib queue random re secrets
    shutil statistics string tempfile textwrap threading time urllib.parse uuid zipfile
"""
_STANDARD = """
    abc argparse array ast asyncio atexit base64 binascii bz2 codecs collections.abc
    concurrent.futures configparser contextvars dataclasses decimal difflib email.message
    email.utils filecmp fractions gc getpass gzip hmac html.parser http.client
    http.server importlib.metadata importlib.util inspect io ipaddress linecache
    locale logging logging.config logging.handlers lzma mimetypes
    multiprocessing.shared_memory operator os pdb pickle platform plistlib
    profile sched select selectors shelve signal smtplib socket socketserver
    sqlite3 ssl struct subprocess sys tarfile timeit traceback types typing
    unicodedata unittest unittest.mock urllib.error urllib.request venv
    warnings wave weakref webbrowser xml.etree.ElementTree zlib
"""
_SCIENTIFIC = """
    numpy numpy.linalg numpy.fft numpy.random scipy.cluster.hierarchy scipy.integrate
    scipy.interpolate scipy.optimize scipy.sparse.csgraph scipy.spatial scipy.spatial.distance
    scipy.stats pandas sklearn.calibration sklearn.cluster sklearn.compose sklearn.decomposition
    sklearn.ensemble sklearn.feature_extraction.text sklearn.feature_selection sklearn.impute
    sklearn.inspection sklearn.linear_model sklearn.manifold sklearn.metrics sklearn.mixture
    sklearn.model_selection sklearn.naive_bayes sklearn.neighbors sklearn.neural_network
    sklearn.pipeline sklearn.preprocessing sklearn.svm sklearn.tree
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A document: its name, its title and its text."""

    name: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class _Shelf:
    """Modules whose entries are taken alike: the shortest entry, and how much of a long one."""

    modules: str
    min_words: int
    max_words: int
    methods: bool


_SHELVES = (
    _Shelf(modules=_EVERYDAY, min_words=16, max_words=240, methods=True),
    _Shelf(modules=_STANDARD, min_words=40, max_words=240, methods=True),
    _Shelf(modules=_SCIENTIFIC, min_words=100, max_words=150, methods=False),
)
_METHODS_OF = {"pandas": ("DataFrame", "Series.str", "Series.dt")}
"""Scientific classes whose methods are entries too; elsewhere the class stands for them."""
_ALIKE: dict[str, type] = {"bytes": str, "bytearray": bytes, "frozenset": set}
"""Types of which only the methods are taken that the other type has not."""

_DISTRIBUTION_WORDS = 150

_NUMPYDOC_SECTION = re.compile(r"^([A-Z][A-Za-z ]+)\n-{3,}[ \t]*$", re.MULTILINE)
_SIGNATURE = re.compile(r"^\s*[\w.]+\(.*?\)\s*(?:-{1,2}>|--|:|=|$)\s*")
_WRAPPED_SIGNATURE = re.compile(r"\A[\w.]+\([^()\n]*\n(?:[^()]|\([^()]*\))*\)\n\s*\n")
_STATEMENT = re.compile(
    r"^\s*(?:(?:def|class|import|from|for|if|while|try|with|return|print|assert|async|else|except)\b"
    r".*[:)\w]$|\$ |@\w|[\w.\[\]]+ = |\w[\w.]*\(.*\)$|#)"
)
_DROPPED_DIRECTIVE = re.compile(
    r"^\s*\.\. (?:math|code|plot|image|figure|literalinclude|doctest|testcode|highlight|raw|"
    r"toctree|index|_|\||list-table|table|csv-table|contents|autosummary|jupyterlite|versionadded|"
    r"deprecated|versionchanged|versionremoved|seealso|sectionauthor|moduleauthor|badge|start|end)"
)
_DIRECTIVE = re.compile(r"^[ \t]*\.\. [\w-]+::[ \t]*", re.MULTILINE)
_VERSION_REMARK = re.compile(
    r"\A\s*(?:(?:New|Changed|Added) in version|Deprecated since|See also:?\s*$)"
)
_HEADING = re.compile(r"^(\S.*)\n([=\-*~^#+])\2{2,}[ \t]*$", re.MULTILINE)

_DOCTEST = re.compile(r"^[ \t]*>>>.*(?:\n[ \t]*\S.*)*", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*([=\-*~^#_+])\1{2,}[ \t]*$", re.MULTILINE)
_ROLE = re.compile(r":[a-z][a-z:+.-]{0,40}:`~?([^`<]++)(<[^`>]*+>)?`")
_LITERAL = re.compile(r"(?<![`\w])(`{1,2})([^`\n]+)\1_{0,2}(?![`\w])")
_CITATION = re.compile(r"(?<![ \t])[ \t]*\[(?:\d+|#\w*|\*)\]_(?!\w)")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(\w[^*\n]{0,60}?)\1(?![\w*])")

_DEFINED = re.compile(r"^((?:(?:class )?[\w.]+(?:\(.*\))?\n){1,30})\n(?=   \S)", re.MULTILINE)
"""Terms on lines of their own, before the indented text that defines them."""


def python_documentation() -> list[Entry]:
    """Returns the documentation of this environment, in an order that does not change.

    It is read in a fresh interpreter that imports little, since it must not depend on what the
    caller did: Ray replaces `print`, and `concurrent.futures` has more members once they are used.

    `Entry.name` is `python:topic/<topic>`, the dotted name of a module, class, function or
    method (the first public one, when it has several), or `dist:<distribution>`.
    """
    # -P: a module in the caller's folder must not stand in for one of the standard library.
    command = [sys.executable, "-P", "-m", __name__]
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    return [Entry(**json.loads(line)) for line in lines]


def _documents() -> Iterator[Entry]:
    for document in _entries_in_order():
        # Once more over the whole text, for mark-up that a line's end parted.
        yield replace(document, title=_plain(document.title), text=_plain(document.text))


def _entries_in_order() -> Iterator[Entry]:
    yield from _language_reference()
    seen: set[int] = set()
    for shelf in _SHELVES:
        for module in shelf.modules.split():
            for name, value in _entries(module, shelf, seen):
                paragraphs = _docstring_prose(value)
                if sum(map(num_words, paragraphs)) >= shelf.min_words:
                    title = f"{name} module" if inspect.ismodule(value) else name
                    text = _first_words(paragraphs, shelf.max_words)
                    yield Entry(name=name, title=title, text=text)
    yield from _distributions()


def _language_reference() -> Iterator[Entry]:
    from pydoc_data.topics import topics

    names = sorted(set(topics) - _SKIPPED_TOPICS - set(_COLLECTIVE_TOPICS))
    seen: set[str] = set()
    for name in [*names, *(topic for topic in _COLLECTIVE_TOPICS if topic in topics)]:
        title, _, body = topics[name].strip().partition("\n")
        body = _HEADING.sub(r"\1.", body.partition("\n")[2])
        body = _DEFINED.sub(lambda match: f"   {_names(match[1])}:\n", body)
        paragraphs = []
        for paragraph in _prose(body):
            if paragraph not in seen:
                paragraphs.append(paragraph)
                seen.add(paragraph)
        text = "\n\n".join(paragraphs)
        yield Entry(name=f"python:topic/{name}", title=title.replace('"', ""), text=text)


def _names(signatures: str) -> str:
    return ", ".join(signature.partition("(")[0] for signature in signatures.splitlines())


def _entries(module_name: str, shelf: _Shelf, seen: set[int]) -> Iterator[tuple[str, object]]:
    """Yields a module, its public members and their methods, each object once."""
    module = _imported(module_name)
    if module is None:
        return
    prefix = "" if module_name == "builtins" else f"{module_name}."
    entries: list[tuple[str, object]] = [(module_name, module)] if prefix else []
    for name, value in _public(module):
        entries.append((prefix + name, value))
        if shelf.methods and inspect.isclass(value) and id(value) not in seen:
            entries += _methods(prefix + name, vars(value))
    for path in _METHODS_OF.get(module_name, ()):
        owner = attrgetter(path)(module)
        # Inherited ones count: pandas defines most of DataFrame's in private base classes.
        members = {name: inspect.getattr_static(owner, name) for name in dir(owner)}
        entries += _methods(prefix + path, members)
    for name, value in entries:
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _imported(name: str) -> ModuleType | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            # Distributions build Python without some of its modules.
            log.warning("%s is left out of the corpus: %s", name, error)
            return None


def _public(module: ModuleType) -> Iterator[tuple[str, object]]:
    listed = getattr(module, "__all__", None)
    for name in sorted(set(listed or vars(module))):
        value = vars(module).get(name)
        if name.startswith("_") or not _is_entry(value):
            continue
        home = getattr(value, "__module__", None) or module.__name__
        if listed or home.lstrip("_") == module.__name__:
            yield name, value


def _is_entry(value: object) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value) or type(value).__name__ == "ufunc"


def _methods(name: str, members: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    alike = _ALIKE.get(name)
    for attribute, member in sorted(members.items()):
        if not attribute.startswith("_") and not (alike and hasattr(alike, attribute)):
            yield f"{name}.{attribute}", member


def _docstring_prose(value: object) -> list[str]:
    """Returns the prose of summary, description and parameters; no signature, no examples."""
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or (not inspect.isclass(value) and doc is type(value).__doc__):
        return []
    pieces = _NUMPYDOC_SECTION.split(_without_signature(inspect.cleandoc(doc)))
    paragraphs = _prose(pieces[0])
    for heading, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if heading == "Parameters":
            paragraphs += _parameters(body)
    return paragraphs


def _without_signature(doc: str) -> str:
    lines = _WRAPPED_SIGNATURE.sub("", doc).split("\n")
    kept = []
    while lines and (match := _SIGNATURE.match(lines[0])):
        rest = lines.pop(0)[match.end() :]
        if len(rest.split()) > 2:
            kept.append(rest)
    return "\n".join([*kept, *lines])


def _parameters(section: str) -> list[str]:
    entries = re.split(r"\n(?=\S)", section.strip("\n"))
    prose = []
    for entry in entries:
        head, _, description = entry.partition("\n")
        text = " ".join(" ".join(_prose(inspect.cleandoc(description))).split())
        if text:
            prose.append(f"{head.partition(' : ')[0].strip()}: {text}")
    return prose


def _prose(text: str) -> list[str]:
    """Returns paragraphs of running text, without code, grammar, tables and version remarks."""
    kept: list[str] = []
    hidden_below: int | None = None
    for block in re.split(r"\n[ \t]*\n", text):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if hidden_below is not None and indent > hidden_below:
            continue
        dropped = _DROPPED_DIRECTIVE.match(lines[0])
        hidden_below = indent if dropped or lines[-1].rstrip().endswith("::") else None
        if not dropped and not _VERSION_REMARK.match(lines[0]) and not _is_code(lines):
            kept += _plain(_DIRECTIVE.sub("", "\n".join(lines))).split("\n\n")
    return [
        re.sub("::$", ":", paragraph)
        for paragraph in kept
        if paragraph and not paragraph.startswith("Read more in the")
    ]


def _plain(text: str) -> str:
    """Returns cleaned text without doctest sessions, heading rules and the mark-up around words."""
    text = _RULE.sub("", _DOCTEST.sub("", text))
    text = _EMPHASIS.sub(r"\2", _LITERAL.sub(r"\2", _ROLE.sub(_linked, text)))
    return clean(_CITATION.sub("", text))


def _is_code(lines: list[str]) -> bool:
    block = "\n".join(lines)
    if ">>>" in block or "::=" in block or re.match(r"\s*(?:\+[-=]|\||={3,}\s+=)", block):
        return True
    if sum(bool(_STATEMENT.match(line)) for line in lines) > 0.4 * len(lines):
        return True
    characters = [character for character in block if not character.isspace()]
    return sum(character in "{}[]<>=|\\/;" for character in characters) > 0.09 * len(characters)


def _first_words(paragraphs: list[str], max_words: int) -> str:
    kept: list[str] = []
    room = max_words
    for paragraph in paragraphs:
        room -= num_words(paragraph)
        if room < 0 and kept:
            break
        kept.append(paragraph)
    while len(kept) > 1 and num_words(kept[-1]) < 4:
        kept.pop()  # a heading whose text did not fit
    return "\n\n".join(kept)


def _distributions() -> Iterator[Entry]:
    installed: dict[str, PackageMetadata] = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        installed.setdefault(name, distribution.metadata)
    # Tokay's own description would change the corpus with every edit of its README.
    for name in sorted(set(installed) - {"", "tokay"}):
        metadata = installed[name]
        summary = " ".join((metadata["Summary"] or "").split())
        body = metadata["Description"] or ""
        paragraphs = _prose(_without_markup(body))
        if summary and summary not in paragraphs:
            paragraphs.insert(0, summary)
        title = f"{metadata['Name']} (distribution)"
        yield Entry(
            name=f"dist:{name}", title=title, text=_first_words(paragraphs, _DISTRIBUTION_WORDS)
        )


_SPANS = tuple(
    (re.compile(opening), re.compile(closing))
    for opening, closing in (
        (r"(?m)^[ \t]*```", r"(?m)^[ \t]*```[ \t]*$"),  # fenced code
        (r"(?m)^[ \t]*~~~", r"(?m)^[ \t]*~~~[ \t]*$"),
        (r"<!--", r"-->"),
        (r"<(?:details|table|pre|picture|svg|style|script)\b", r"</\w+>"),
    )
)


def _linked(match: re.Match[str]) -> str:
    """Returns the text of a link, without the space before its target."""
    return match[1].rstrip() if match[2] else match[1]


def _heading(match: re.Match[str]) -> str:
    title = match[1].lstrip(" \t").rstrip(" \t#")
    return f"\n{title}\n"


# What may hold anything is bounded, for the sake of texts that open it again and again.
_MARKUP: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<https?://[^<>\s]+>", ""),
        (r"</?[a-zA-Z][^<>]*>", ""),
        # A badge with a link.
        (r"\[!\[[^\]]{0,300}\]\([^)]{0,300}\)\]\([^)]{0,300}\)", ""),
        (r"!\[[^\]]{0,300}\](?:\([^)]{0,300}\)|\[[^\]]{0,300}\])", ""),
        (r"\[([^\]\[]+)\]\([^)]{0,300}\)", r"\1"),
        (r"\[([^\]\[]+)\]\[[^\]]{0,300}\]", r"\1"),
        (r"(?m)^[ \t]*\[[^\]]{1,300}\]:.*$", ""),  # a link's definition
        (r"`([^`<]++)(<[^`>]*+>)`__?", _linked),
        (r"(?m)^[ \t]*\.\. .*(?:\n[ \t]+\S.*)*$", ""),  # directives with their options
        (r"(?m)^[ \t]*\|.*$", ""),  # tables and substitutions
        (r"(?m)^#{1,6}(.*)$", _heading),
        (r"https?://\S+", ""),
        (r"`([^`\n]+)`_?", r"\1"),
        (r"(?m)^>[ \t]?", ""),
    )
)


def _without_markup(text: str) -> str:
    for opening, closing in _SPANS:
        text = _without(text, opening, closing)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


def _without(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> str:
    """Returns the text without the spans that are opened and closed again."""
    kept: list[str] = []
    position = 0
    while (start := opening.search(text, position)) and (end := closing.search(text, start.end())):
        kept.append(text[position : start.start()])
        position = end.end()
    return "".join([*kept, text[position:]])


if __name__ == "__main__":
    for document in _documents():
        print(json.dumps(asdict(document)))
