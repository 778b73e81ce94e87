import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.encoder import Encoder
from cluster.artifacts import Artifact, Json, Manifest
from cluster.errors import TokayError, UserError
from cluster.steps import StepContext
from cluster.storage import open_storage
from pipelines.training import student
from pipelines.training.student import StudentConfig, export_student, make_student

TinyModel = Callable[..., Path]
TEXTS = ["the boundary layer of a flat plate", "x", "a longer text " * 9]


class Quiet:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def context(folder: Path, **inputs: Artifact) -> StepContext:
    storage = open_storage(folder)
    return StepContext(storage=storage, inputs=inputs, progress=Quiet())


def artifact(folder: Path, config: dict[str, Json], metrics: dict[str, Json]) -> Artifact:
    manifest = Manifest(
        step="s", fingerprint="f", config=config, inputs={}, files=(), metrics=metrics
    )
    return Artifact(open_storage(folder), manifest)


def made(folder: Path, model: Path, **settings: Json) -> Encoder:
    config = StudentConfig(model=str(model), max_tokens=64, **settings)
    metrics = make_student(config, context(folder))
    encoder = Encoder.load(str(folder / "model"), device="cpu")
    assert metrics == {
        "num_parameters": encoder.num_parameters,
        "dimensions": encoder.dimensions,
    }
    return encoder


def test_student_is_what_the_recipe_says(tiny_model: TinyModel, tmp_path: Path):
    plain = tiny_model("qwen3", tmp_path / "plain")
    small = made(
        tmp_path / "a", plain, layers=[0, 2], pooling="lasttoken", bidirectional=True, projection=16
    )
    assert small.dimensions == 16
    assert small.pooling == "lasttoken"
    assert small.model.config.num_hidden_layers == 2
    assert small.model.config.is_causal is False
    assert "layers [0, 2]" in (tmp_path / "a/model/README.md").read_text()
    whole = made(tmp_path / "b", plain)
    assert (whole.dimensions, whole.pooling) == (32, "lasttoken")
    both_ways = made(tmp_path / "c", plain, bidirectional=True)
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
    kind: str, settings: dict[str, Json], reason: str, tiny_model: TinyModel, tmp_path: Path
):
    with pytest.raises(UserError, match=reason):
        made(tmp_path / "a", tiny_model(kind, tmp_path / "plain"), **settings)


@pytest.fixture
def inputs(tiny_model: TinyModel, tmp_path: Path) -> dict[str, Artifact]:
    """What the step `export` reads, of a student with a projection to 24 dimensions."""
    trained = made(tmp_path / "s", tiny_model("modernbert", tmp_path / "plain"), projection=24)
    return inputs_of(trained, tmp_path)


def inputs_of(trained: Encoder, tmp_path: Path) -> dict[str, Artifact]:
    trained.save(tmp_path / "training/encoder", model_card="")
    loss = {"loss": {"matryoshka_dimensions": [8, 16]}}
    fret = {
        "num_queries": 9,
        "num_kept": 8,
        "num_evaluation_queries": 7,
        "highest_overlap_kept": 0.5,
    }
    return {
        "training": artifact(tmp_path / "training", loss, {}),
        "fret": artifact(tmp_path / "fret", {}, fret),
        "mixture": artifact(tmp_path / "mixture", {}, {"sets": {"fret": 8}}),
    }


def test_export_proves_its_parity_and_names_its_dimensions(
    inputs: dict[str, Artifact], tmp_path: Path
):
    metrics = export_student(
        "r", StudentConfig(model="base"), TEXTS, context(tmp_path / "export", **inputs)
    )
    assert metrics["dimensions"] == 24
    assert metrics["parity_cosine"] > 0.9999
    card = (tmp_path / "export/model/README.md").read_text()
    assert "24 dimensions" in card
    assert "first 16 or 8 dimensions" in card and "truncate_dim=16" in card


def test_student_with_code_of_its_own_is_exported(tiny_model: TinyModel, tmp_path: Path):
    folder = tiny_model("bert", tmp_path / "plain")
    code = "from transformers import BertModel\n\n\nclass OwnBert(BertModel):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModel": "modeling_own.OwnBert"}
    (folder / "config.json").write_text(json.dumps(settings))
    config = StudentConfig(model=str(folder), max_tokens=64, trust_remote_code=True)
    make_student(config, context(tmp_path / "s"))
    own = Encoder.load(str(tmp_path / "s/model"), device="cpu", trust_remote_code=True)
    assert type(own.model).__name__ == "OwnBert"
    step = context(tmp_path / "export", **inputs_of(own, tmp_path))
    metrics = export_student("r", config, TEXTS, step)
    assert metrics["parity_cosine"] > 0.9999
    assert (tmp_path / "export/model/modeling_own.py").is_file()


def test_export_that_differs_is_refused_by_way_kind_and_dimensions(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = Encoder.save

    def save_damaged(encoder: Encoder, folder: str, **settings: str) -> None:
        weight = encoder.model.projection[0].weight
        with torch.no_grad():
            weight[:8] = weight[:8].flip(0)
        save(encoder, folder, **settings)
        with torch.no_grad():
            weight[:8] = weight[:8].flip(0)

    monkeypatch.setattr(Encoder, "save", save_damaged)
    message = r"differs .* gives a .* text's vector, at 8 dimensions, a cosine of .* 0.9999 is"
    with pytest.raises(TokayError, match=message):
        export_student(
            "r", StudentConfig(model="base"), TEXTS, context(tmp_path / "export", **inputs)
        )
    assert not (tmp_path / "export" / student.MODEL).exists()
