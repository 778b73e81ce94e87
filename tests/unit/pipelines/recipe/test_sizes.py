"""Sizes of models: against models that are built, and against what autograd saves of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from pipelines.recipe.sizes import ModelSize, read_size

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "num_hidden_layers": 3,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(hidden_size=128, attention_probs_dropout_prob=0.0, **SHAPE),
    "modernbert": ModernBertConfig(
        hidden_size=128, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **SHAPE
    ),
    "qwen3": Qwen3Config(hidden_size=128, num_key_value_heads=2, head_dim=64, **SHAPE),
    "llama": LlamaConfig(hidden_size=128, num_key_value_heads=2, **SHAPE),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models, which threads only wait for."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def saved_bytes(config: PreTrainedConfig, num_texts: int, *, bfloat16: bool, again: bool) -> int:
    """Counts the bytes that autograd keeps of a batch; the model's own weights are left out."""
    model = AutoModel.from_config(config, attn_implementation="sdpa").train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(num_texts, 32, dtype=torch.long)
    options = {"use_cache": False} if hasattr(config, "use_cache") else {}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        _output = model(input_ids=ids, **options)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_kept_bytes_are_what_autograd_saves(kind: str, bfloat16: bool, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    config.save_pretrained(tmp_path)
    size = read_size(tmp_path)
    assert size is not None

    def a_token(again: bool) -> float:  # copies of weights are the same in both
        more, fewer = (saved_bytes(config, n, bfloat16=bfloat16, again=again) for n in (2, 1))
        return (more - fewer) / 32

    kept = a_token(again=False)
    assert size.kept_bytes(bfloat16=bfloat16) == pytest.approx(kept, rel=0.1)
    if bfloat16:  # its backward pass computes one layer of three again, which was not saved
        found = size.kept_bytes(bfloat16=True, checkpointing=True)
        assert found == pytest.approx(a_token(again=True) + kept / 3, rel=0.15)


def test_kept_bytes_of_modernbert_base_are_those_that_were_counted() -> None:
    size = ModelSize(
        parameters=149e6,
        model_type="modernbert",
        hidden_size=768,
        intermediate_size=1152,
        num_hidden_layers=22,
        num_attention_heads=12,
    )
    kept = size.kept_bytes(bfloat16=True)
    assert kept is not None and kept / 1024 == pytest.approx(604, rel=0.02)


@pytest.mark.parametrize("kind", CONFIGS)
def test_size_comes_from_the_weights_or_from_the_shape(kind: str, tmp_path: Path) -> None:
    model = AutoModel.from_config(CONFIGS[kind])
    CONFIGS[kind].save_pretrained(tmp_path)
    counted = sum(weight.numel() for weight in model.parameters())
    by_shape = read_size(tmp_path)
    # Norms, biases and positions are few beside the matrices of models of a useful size.
    assert by_shape is not None and by_shape.parameters == pytest.approx(counted, rel=0.2)
    model.save_pretrained(tmp_path)
    exact = read_size(tmp_path)
    assert exact is not None and exact.parameters == counted
    assert exact.weights_bytes("float32") == 4 * counted
    assert exact.weights_bytes("auto") == 2 * counted
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    of_one = sum(weight.numel() for weight in layers[2].parameters())
    assert exact.parameters - exact.with_layers(2).parameters == pytest.approx(of_one, rel=0.02)


def test_size_of_quantised_weights_is_that_of_their_files(tmp_path: Path) -> None:
    model = AutoModel.from_config(CONFIGS["llama"]).to(torch.float16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    size = read_size(tmp_path)
    num_bytes = 2 * sum(weight.numel() for weight in model.parameters())
    assert size is not None and size.weights_bytes("float32") == num_bytes


def test_size_is_of_all_the_files_that_the_index_names(tmp_path: Path) -> None:
    model = AutoModel.from_config(CONFIGS["qwen3"])
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    (tmp_path / "consolidated.safetensors").write_bytes(files[0].read_bytes())
    size, counted = read_size(tmp_path), sum(weight.numel() for weight in model.parameters())
    assert size is not None and size.parameters == counted
    files[1].unlink()  # half fetched: then it is counted by the shape
    size = read_size(tmp_path)
    assert size is not None and size.parameters == pytest.approx(counted, rel=0.2)


@pytest.mark.parametrize("config", ["no JSON", "[]", '{"hidden_size": [1, 2]}'])
def test_size_of_a_strange_folder_is_unknown(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert read_size(tmp_path) is None


def test_size_of_an_unknown_kind_is_unknown(tmp_path: Path) -> None:
    assert read_size(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 64}')
    assert read_size(tmp_path) is None
    assert ModelSize(parameters=1e6, model_type="mamba").kept_bytes(bfloat16=True) is None
