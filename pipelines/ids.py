"""Ids that depend on content alone, so that they are the same on every machine and in every run."""

from hashlib import blake2b, sha256

from actors.words import normalized


def passage_id(title: str, text: str) -> str:
    """Returns 32 hexadecimal characters that depend on nothing but title and text."""
    content = normalized(f"{title}\x1f{text}")
    return blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def document_name(source: str) -> str:
    """Returns the name of the document that a passage is a part of, from the passage's source.

    >>> document_name("notes/C#.md#2")
    'notes/C#.md'
    """
    return source.rpartition("#")[0]


def query_id(seed_id: str, number: int = 0, kind: str = "query") -> str:
    """Returns 16 hex digits that name a passage's query of that kind and number."""
    name = f"{kind} of {seed_id}" + (f", {number}" if number else "")
    return sha256(name.encode()).hexdigest()[:16]
