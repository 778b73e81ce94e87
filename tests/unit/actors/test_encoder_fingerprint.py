"""What makes other vectors makes another fingerprint, and nothing else does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates

TinyModel = Callable[..., Path]


@pytest.fixture
def encoder(tiny_model: TinyModel, tmp_path: Path) -> Encoder:
    return Encoder.load(str(tiny_model("bert", tmp_path / "plain")), device="cpu")


def remade(encoder: Encoder, **changed: object) -> Encoder:
    parts = {"pooling": encoder.pooling, "max_tokens": encoder.max_tokens}
    parts |= {"templates": encoder.templates, "tokenizer": encoder.tokenizer, **changed}
    return Encoder(encoder.model, **parts)


def test_fingerprint_is_of_the_content_and_not_of_the_place(
    encoder: Encoder, tmp_path: Path
) -> None:
    marks = set()
    for name in "ab":
        encoder.save(tmp_path / name, model_card=name)
        loaded = Encoder.load(str(tmp_path / name), device="cpu")
        marks.add(loaded.fingerprint)
        loaded.encode(["one text", "another " * 50])
        marks.add(loaded.fingerprint)
    assert len(marks) == 1


def test_fingerprint_is_of_what_makes_the_vectors_alone(encoder: Encoder) -> None:
    before = encoder.fingerprint
    encoder.packed = not encoder.packed
    encoder.num_tokens += 7
    encoder.note = "a new attribute"
    assert encoder.fingerprint == remade(encoder).fingerprint == before


@pytest.mark.parametrize(
    "changed",
    [
        {"pooling": "cls"},
        {"max_tokens": 17},
        {"templates": PromptTemplates(query="query: {text}")},
        {"templates": PromptTemplates(passage="query: {text}")},
    ],
)
def test_fingerprint_changes_with_pooling_limit_and_templates(
    encoder: Encoder, changed: dict[str, object]
) -> None:
    assert remade(encoder, **changed).fingerprint != encoder.fingerprint


def test_fingerprint_changes_with_the_tokenizer(encoder: Encoder) -> None:
    before = encoder.fingerprint
    encoder.tokenizer.add_tokens(["gecko"])
    assert encoder.fingerprint != before


def test_fingerprint_changes_with_a_weight_and_its_precision(encoder: Encoder) -> None:
    marks = [encoder.fingerprint]
    with torch.no_grad():
        next(iter(encoder.model.parameters()))[0, 0] += 1e-3
    marks.append(encoder.fingerprint)
    encoder.model.half()
    marks.append(encoder.fingerprint)
    assert len(set(marks)) == 3


def test_fingerprint_changes_with_the_transformers_configuration(
    encoder: Encoder, tmp_path: Path
) -> None:
    encoder.save(tmp_path / "a", model_card="")
    path = tmp_path / "a/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-3}))
    assert Encoder.load(str(tmp_path / "a"), device="cpu").fingerprint != encoder.fingerprint
