import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.encoder import Encoder
from cluster.artifacts import Artifact, Json, Manifest
from cluster.errors import TokayError
from cluster.steps import StepContext
from cluster.storage import open_storage
from pipelines.training.export import export_student
from pipelines.training.layers import add_linear_adapter, add_projection
from pipelines.training.student import MODEL, StudentConfig, make_student

TinyModel = Callable[..., Path]
MakeContext = Callable[..., StepContext]
TEXTS = ["the boundary layer of a flat plate", "x", "a longer text " * 9]


def artifact(folder: Path, config: dict[str, Json], metrics: dict[str, Json]) -> Artifact:
    manifest = Manifest(step="s", fingerprint="f", config=config, inputs={}, metrics=metrics)
    return Artifact(open_storage(folder), manifest)


@pytest.fixture
def inputs(tiny_model: TinyModel, tmp_path: Path) -> dict[str, Artifact]:
    """What the step `export` reads, of a student with a projection to 24 dimensions."""
    plain = str(tiny_model("modernbert", tmp_path / "plain"))
    trained = Encoder.load(plain, max_tokens=64, device="cpu")
    add_projection(trained, 24)
    return inputs_of(trained, tmp_path)


def inputs_of(trained: Encoder, tmp_path: Path) -> dict[str, Artifact]:
    trained.save(tmp_path / "training/encoder", model_card="")
    loss = {"loss": {"matryoshka_dimensions": [8, 16]}}
    fret = {
        "num_queries": 9,
        "num_kept": 8,
        "num_evaluation_queries": 7,
        "highest_overlap_kept": 0.5,
        "dropped_by": {"held out for the gate": 3},
    }
    return {
        "training": artifact(tmp_path / "training", loss, {}),
        "fret": artifact(tmp_path / "fret", {"fusion": "ql+rc"}, fret),
        "mixture": artifact(tmp_path / "mixture", {}, {"sets": {"fret": 8}}),
    }


def test_export_proves_its_parity_and_names_its_dimensions(
    context: MakeContext, inputs: dict[str, Artifact], tmp_path: Path
):
    sets: dict[str, Json] = {"sets": {"passages": 7, "queries": 6}}
    taught = artifact(tmp_path / "taught", {"teacher": {"model": "a/teacher"}}, sets)
    inputs["embedding_distillation_mixture"] = taught
    metrics = export_student(
        "r", StudentConfig(model="base"), TEXTS, context(tmp_path / "export", **inputs)
    )
    assert metrics["dimensions"] == 24
    assert metrics["parity_cosine"] > 0.9999
    card = (tmp_path / "export/model/README.md").read_text()
    assert "24 dimensions" in card
    assert "the vectors that `a/teacher` gives to 7 passages and 6 queries, without labels" in card
    assert "Trained on: fret (8 examples)" in card
    assert "first 16 or 8 dimensions" in card and "truncate_dim=16" in card
    assert "Trained on: fret (8 examples)" in card
    assert "6 queries, 8 kept" in card  # those held out are none of training's


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_export_is_what_the_gate_chose_and_its_card_says_so_first(
    context: MakeContext,
    inputs: dict[str, Artifact],
    tiny_model: TinyModel,
    tmp_path: Path,
    weight: float,
):
    chosen = Encoder.load(str(tmp_path / "plain"), max_tokens=64, device="cpu")
    add_projection(chosen, 24, seed=1)
    chosen.save(tmp_path / "gate/encoder", model_card="")
    decision = "The trained student was not better than its start: the start is exported."
    inputs["gate"] = artifact(tmp_path / "gate", {}, {"weight": weight, "decision": decision})
    step = context(tmp_path / "export", **inputs)
    assert export_student("r", StudentConfig(model="base"), TEXTS, step)["parity_cosine"] > 0.9999
    exported = Encoder.load(str(tmp_path / "export/model"), device="cpu")
    assert torch.equal(exported.model.projection[0].weight, chosen.model.projection[0].weight)
    card = (tmp_path / "export/model/README.md").read_text()
    first = card.partition("# A text-embedding model distilled with Tokay")[2].strip()
    assert first.startswith(decision)
    # The start has seen nothing of the training.
    assert ("Not trained in this run." in card, "datasets: []" in card) == (weight == 0,) * 2
    assert ("Matryoshka" in card) == ("Trained on: fret" in card) == (weight != 0)


def test_card_says_who_labelled_and_names_the_linear_adapter(
    context: MakeContext, inputs: dict[str, Artifact], tmp_path: Path
):
    fret = inputs["fret"].manifest.metrics
    inputs["fret"] = artifact(tmp_path / "hybrid", {"fusion": "hybrid"}, fret)
    adapted = Encoder.load(str(tmp_path / "training/encoder"), device="cpu")
    add_linear_adapter(adapted, torch.randn(24, 24))
    adapted.save(tmp_path / "adapted/encoder", model_card="")
    inputs["linear_adapter"] = artifact(tmp_path / "adapted", {}, {"num_lists": 11})
    step = context(tmp_path / "export", **inputs)
    assert export_student("r", StudentConfig(model="base"), TEXTS, step)["parity_cosine"] > 0.9999
    exported = Encoder.load(str(tmp_path / "export/model"), device="cpu")
    assert len(exported.model.projection) == 4
    card = (tmp_path / "export/model/README.md").read_text()
    assert "order of their candidates is by hybrid, not by the language model: 6 queries" in card
    assert "wrote and labelled" not in card
    assert "learned the order of 11 lists" in card


def test_student_with_code_of_its_own_is_exported(
    context: MakeContext, tiny_model: TinyModel, tmp_path: Path
):
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
    context: MakeContext,
    inputs: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    assert not (tmp_path / "export" / MODEL).exists()
