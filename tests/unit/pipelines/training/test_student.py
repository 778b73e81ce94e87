from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actors.encoder import Encoder
from cluster.artifacts import Json
from cluster.errors import UserError
from cluster.steps import StepContext
from pipelines.training.student import StudentConfig, make_student

TinyModel = Callable[..., Path]
MakeContext = Callable[..., StepContext]
TEXTS = ["the boundary layer of a flat plate", "x", "a longer text " * 9]


def made(context: MakeContext, folder: Path, model: Path, **settings: Json) -> Encoder:
    config = StudentConfig(model=str(model), max_tokens=64, **settings)
    metrics = make_student(config, context(folder))
    encoder = Encoder.load(str(folder / "model"), device="cpu")
    assert metrics == {
        "num_parameters": encoder.num_parameters,
        "dimensions": encoder.dimensions,
    }
    return encoder


def test_student_is_what_the_recipe_says(
    context: MakeContext, tiny_model: TinyModel, tmp_path: Path
):
    plain = tiny_model("qwen3", tmp_path / "plain")
    small = made(
        context,
        tmp_path / "a",
        plain,
        layers=[0, 2],
        pooling="lasttoken",
        bidirectional=True,
        projection=16,
    )
    assert small.dimensions == 16
    assert small.pooling == "lasttoken"
    assert small.model.config.num_hidden_layers == 2
    assert small.model.config.is_causal is False
    assert "layers [0, 2]" in (tmp_path / "a/model/README.md").read_text()
    whole = made(context, tmp_path / "b", plain)
    assert (whole.dimensions, whole.pooling) == (32, "lasttoken")
    both_ways = made(context, tmp_path / "c", plain, bidirectional=True)
    assert both_ways.pooling == "mean"
    assert np.abs(both_ways.encode(TEXTS) - whole.encode(TEXTS)).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("bert", {"bidirectional": True}, r"student\.bidirectional: .*both ways already"),
        ("bert", {"layers": [3]}, r"student\.layers: .*0 to 2"),
        ("modernbert", {"layers": [1]}, r"student\.layers: .*keep layer 0"),
    ],
)
def test_student_that_cannot_be_made_is_the_users_error(
    kind: str,
    settings: dict[str, Json],
    reason: str,
    context: MakeContext,
    tiny_model: TinyModel,
    tmp_path: Path,
):
    with pytest.raises(UserError, match=reason):
        made(context, tmp_path / "a", tiny_model(kind, tmp_path / "plain"), **settings)
