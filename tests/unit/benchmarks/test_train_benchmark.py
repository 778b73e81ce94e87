"""What the training benchmark prints is JSON, however few its batches are."""

import pytest

from benchmarks.train import quarters


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([3.0, 1.0], [3.0, 1.0]), ([8.0, 6, 4, 2, 2, 0, 1, 1], [7.0, 3.0, 1.0, 1.0])],
)
def test_losses_of_few_batches_are_numbers(losses: list[float], expected: list[float]) -> None:
    assert quarters(losses) == expected
