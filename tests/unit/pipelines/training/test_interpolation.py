import pytest
import torch

from pipelines.training.interpolation import interpolate

START = {"weight": torch.tensor([1.0, 2.0]), "places": torch.tensor([0, 1])}
TRAINED = {"weight": torch.tensor([3.0, -2.0]), "places": torch.tensor([0, 1])}


def test_interpolation_is_worked_by_hand() -> None:
    mixed = interpolate(START, TRAINED, 0.25)
    assert mixed["weight"].tolist() == [1.5, 1.0]
    assert mixed["places"].tolist() == [0, 1]


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0), (1.0, 1)])
def test_both_ends_are_the_models_themselves_bit_by_bit(weight: float, expected: int) -> None:
    ends = [{"weight": torch.rand(1000) * 10**scale} for scale in (-3, 3)]
    assert torch.equal(interpolate(*ends, weight)["weight"], ends[expected]["weight"])


def test_start_stays_whole_beside_a_student_that_diverged() -> None:
    diverged = START | {"weight": torch.tensor([torch.nan, torch.inf])}
    assert interpolate(START, diverged, 0.0)["weight"].tolist() == [1.0, 2.0]
    assert interpolate(diverged, TRAINED, 1.0)["weight"].tolist() == [3.0, -2.0]


def test_half_precision_is_averaged_in_float32() -> None:
    one = {"weight": torch.tensor([1.0]).bfloat16()}
    other = {"weight": torch.tensor([1.0078125]).bfloat16()}  # the next one
    mixed = interpolate(one, other, 0.5)["weight"]
    assert mixed.dtype == torch.float32
    assert mixed.item() == 1.00390625


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"weight": torch.ones(3), "places": START["places"]}, r"'weight' is \[2\] and \[3\]"),
        ({"weight": START["weight"]}, "'places' is in one of the two models alone"),
        (TRAINED | {"places": torch.tensor([1, 0])}, "'places' holds no fractions"),
    ],
)
def test_weights_of_another_model_are_refused(
    trained: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interpolate(START, trained, 0.5)
