import numpy as np

from actors.vectors import shorten, unit

ROWS = np.array([[0.6, 0.0, 0.8], [0.0, 0.0, 1.0], [0.48, 0.64, 0.6]], np.float32)


def test_shortened_vectors_are_the_beginnings_at_length_one():
    short = shorten(ROWS, 2)
    assert short.dtype == np.float32
    # The second has nothing in its first two dimensions, and no direction is made up for it.
    np.testing.assert_allclose(short, [[1, 0], [0, 0], [0.6, 0.8]], atol=1e-6)


def test_whole_vectors_stay_to_the_last_bit():
    uneven = ROWS * np.float32(1 + 1e-6)
    assert shorten(uneven, 3) is uneven


def test_unit_divides_every_row_by_its_own_length():
    np.testing.assert_allclose(unit(ROWS * [[2], [3], [0]]), [*ROWS[:2], [0, 0, 0]], atol=1e-6)
