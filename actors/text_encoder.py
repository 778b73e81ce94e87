"""What turns texts into vectors, wherever its model is: here, in actors, behind an address."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Texts encoded at once; many enough to fill a GPU with short ones.
CHUNK_TEXTS = 1024


class Text(NamedTuple):
    """A text in its role: a query of a task, or a passage (no task) with its title."""

    text: str
    task: str | None
    title: str | None = None


class TextEncoder(ABC):
    """Queries and passages to unit vectors; what a subclass cannot know of its model is None."""

    @property
    def dimensions(self) -> int | None:
        """Length of a vector."""
        return None

    @property
    def num_parameters(self) -> int | None:
        """Weights of the model."""
        return None

    @property
    def fingerprint(self) -> str | None:
        """Hash of what makes the vectors: weights, tokenizer, pooling, token limit, templates."""
        return None

    @abstractmethod
    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        """Returns float32 ``[queries, dimensions]``, unit length."""

    @abstractmethod
    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Returns float32 ``[texts, dimensions]``, unit length."""

    def encode_texts(self, texts: Sequence[Text]) -> np.ndarray:
        """Returns float32 ``[texts, dimensions]`` of texts that are all of one role and task."""
        plain = [each.text for each in texts]
        if texts[0].task is not None:
            return self.encode_queries(plain, task=texts[0].task)
        return self.encode_passages(plain, [each.title for each in texts])

    def encode_chunks(self, texts: Sequence[Text]) -> Iterator[tuple[Sequence[Text], np.ndarray]]:
        """Yields texts of one role and task with their vectors, some at a time, in any order."""
        for start in range(0, len(texts), CHUNK_TEXTS):
            chunk = texts[start : start + CHUNK_TEXTS]
            yield chunk, self.encode_texts(chunk)
