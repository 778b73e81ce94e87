"""Vectors of length 1, whole or cut to their first dimensions."""

import numpy as np

from cluster.errors import TokayError


class BrokenVectors(TokayError):
    """A model gives vectors that are no numbers."""


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns ``[n, dimensions]`` with every row brought to length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12))


def shorten(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """Keeps the first dimensions and brings every row back to length 1.

    Args:
        vectors: float32 ``[n, all dimensions]``, unit length.
        dimensions: How many to keep.

    Returns:
        float32 ``[n, dimensions]``, unit length; a row of zeros stays one. Vectors that have that
        many dimensions already are returned as they are.
    """
    return vectors if dimensions == vectors.shape[1] else unit(vectors[:, :dimensions])
