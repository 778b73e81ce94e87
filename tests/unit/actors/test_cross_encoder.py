"""Scores of pairs beside those that transformers and sentence-transformers compute themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.cross_encoder import CrossEncoder
from cluster.errors import UserError

PAIRS = [
    ("how do bees dance", "Bees dance in the shape of an eight. " * 3),
    ("wing", "A wing."),
    ("what makes bread rise, and how long does it take", "Yeast " * 200),  # cut
    ("", "An empty query."),
    ("wing", "A wing in the wind tunnel"),
    *((f"query {number}", "flow " * number) for number in range(9)),
]


@pytest.fixture
def folder(tiny_classifier: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_classifier(tmp_path / "model")


def direct(folder: Path, pairs: list[tuple[str, str]], max_tokens: int) -> list[float]:
    """One pair at a time, so that nothing is filled up or put into another order."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [
            model(
                **tokenizer(  # lists: an empty passage alone would be none
                    [query], [passage], truncation=True, max_length=max_tokens, return_tensors="pt"
                )
            ).logits.item()
            for query, passage in pairs
        ]


def test_scores_are_those_of_transformers_in_the_order_of_the_pairs(folder: Path) -> None:
    expected = direct(folder, PAIRS, 64)
    assert np.ptp(expected) > 0.1  # else the order would not show
    model = CrossEncoder.load(str(folder), device="cpu")
    assert model.max_tokens == 64
    for batch_tokens in (None, 1, 100):
        found = model.score(PAIRS, batch_tokens=batch_tokens)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)
    shorter = CrossEncoder.load(str(folder), device="cpu", max_tokens=16)
    np.testing.assert_allclose(shorter.score(PAIRS), direct(folder, PAIRS, 16), atol=2e-5)
    assert model.score([]).shape == (0,)


def test_bfloat16_is_near_float32(folder: Path) -> None:
    model = CrossEncoder.load(str(folder), device="cpu", dtype="bfloat16")
    assert model.model.dtype == torch.bfloat16
    np.testing.assert_allclose(model.score(PAIRS), direct(folder, PAIRS, 64), atol=0.05)


def test_folder_of_sentence_transformers_gives_its_scores_before_the_activation(
    folder: Path, tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder as Theirs

    theirs = Theirs(str(folder), device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    expected = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())
    found = CrossEncoder.load(str(tmp_path / "saved"), device="cpu").score(PAIRS)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def change(file: Path, **keys: object) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **keys}))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        CrossEncoder.load(str(folder), device="cpu")
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in parts), line


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    refused(folder, "pytorch_model.bin", "can run code", "save_pretrained")


def test_code_of_a_model_is_not_run_unless_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    change(folder / "config.json", auto_map={"AutoModelForSequenceClassification": "own.Own"})
    refused(folder, "auto_map", "trust_remote_code")
    assert not marker.exists()


def test_what_is_no_classifier_with_one_output_is_refused(
    folder: Path, tiny_classifier: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    parent = folder.parent
    refused(tiny_classifier(parent / "three", num_labels=3), "3 labels", "num_labels 1")
    refused(tiny_model("bert", parent / "plain"), "2 labels")
    headless = tiny_model("bert", parent / "headless")
    change(headless / "config.json", id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    refused(headless, "classifier.")  # else transformers would draw it at random
    modules = [{"idx": n, "name": str(n), "path": "", "type": ""} for n in range(2)]
    for module, kind in zip(modules, ("Transformer", "Pooling"), strict=True):
        module["type"] = f"sentence_transformers.models.{kind}"
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, "modules.json", "Pooling", "Transformer alone")


def test_prompt_that_would_change_the_scores_is_refused(folder: Path) -> None:
    file = folder / "config_sentence_transformers.json"
    change(file, model_type="CrossEncoder", prompts={"web": "Search: "}, default_prompt_name="web")
    refused(folder, "default_prompt_name", "null")
