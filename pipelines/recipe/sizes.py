"""How large a model is: from its folder's config.json and weights, or as a recipe says.

Nothing is loaded, unpacked or fetched, so that a plan needs no hub and a run is checked at once.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.config import Config

GIB = 2**30


class ModelSize(Config):
    """What a model's memory depends on; names are those of config.json."""

    parameters: float = Field(gt=0)
    weights_gib: float | None = Field(
        default=None, gt=0, description="of a quantised model; default: by its data type"
    )
    model_type: str | None = Field(default=None, description="bert, modernbert, qwen3 or similar")
    hidden_size: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    num_hidden_layers: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    head_dim: int | None = Field(default=None, gt=0)

    def weights_bytes(self, dtype: str) -> float:
        """Returns the bytes of the weights in a data type; `auto` means one of 16 bits."""
        if self.weights_gib is not None:
            return self.weights_gib * GIB
        return self.parameters * (4 if dtype in ("float32", "float") else 2)

    def layer_matrices(self) -> dict[str, tuple[int, int]] | None:
        """Returns inputs and outputs of a layer's matrices by name, None for an unknown kind."""
        shape = self._shape()
        if shape is None:
            return None
        hidden, inner, heads, groups = shape
        if self.model_type in _BERT:
            names = ("query", "key", "value", "attention.output.dense")
            return dict.fromkeys(names, (hidden, hidden)) | {
                "intermediate.dense": (hidden, inner),
                "output.dense": (inner, hidden),
            }
        if self.model_type == "modernbert":
            return {
                "Wqkv": (hidden, 3 * hidden),
                "attn.Wo": (hidden, hidden),
                "Wi": (hidden, 2 * inner),
                "mlp.Wo": (inner, hidden),
            }
        return {
            "q_proj": (hidden, heads),
            "k_proj": (hidden, groups),
            "v_proj": (hidden, groups),
            "o_proj": (heads, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def layer_parameters(self) -> int:
        """Returns the number of parameters in a layer's matrices, 0 for an unknown kind."""
        return sum(ins * outs for ins, outs in (self.layer_matrices() or {}).values())

    def kept_bytes(self, *, bfloat16: bool, checkpointing: bool = False) -> float | None:
        """Estimates the bytes that a training step keeps for each token until its backward pass.

        What autograd saves was counted for each kind of model on a CPU, in terms of its shape; see
        ``tests/unit/pipelines/recipe/test_sizes.py``. Left out: the mask of padded batches, one
        number per pair of tokens, and what a kernel needs for a moment.

        Args:
            bfloat16: Under autocast; else float32.
            checkpointing: Only each layer's input is kept, and one layer at a time is recomputed.

        Returns:
            None for a kind of model that was not counted.
        """
        shape = self._shape()
        if shape is None or self.num_hidden_layers is None:
            return None
        hidden, inner, heads, groups = shape
        number = self.num_attention_heads or 1
        if self.model_type in _BERT:
            layer = 26 * hidden + 4 * inner if bfloat16 else 36 * hidden + 8 * inner
        elif self.model_type == "modernbert":
            layer = 24 * hidden + 8 * inner if bfloat16 else 40 * hidden + 16 * inner
        else:
            layer = 26 * hidden + 8 * inner if bfloat16 else 24 * hidden + 16 * inner
            layer += (8 if bfloat16 else 16) * heads
            if self.model_type == "qwen3":  # it norms queries and keys
                layer += (6 if bfloat16 else 8) * (heads + groups) + 4 * number
        layer += 4 * number + 16
        ends = 8 * hidden + 16
        if checkpointing:
            return 4 * hidden * self.num_hidden_layers + layer + ends
        return layer * self.num_hidden_layers + ends

    def with_layers(self, num_layers: int) -> ModelSize:
        """Returns the size of a model cut to `num_layers`; an unknown kind keeps its parameters."""
        fewer = (self.num_hidden_layers or num_layers) - num_layers
        parameters = self.parameters - fewer * self.layer_parameters()
        return self.model_copy(update={"parameters": parameters, "num_hidden_layers": num_layers})

    def _shape(self) -> tuple[int, int, int, int] | None:
        """Returns the widths of hidden states, the inner layer, all heads and all key heads."""
        if self.model_type not in (*_BERT, "modernbert", *_DECODERS):
            return None
        hidden, inner, number = self.hidden_size, self.intermediate_size, self.num_attention_heads
        if not (hidden and inner and number):
            return None
        width = self.head_dim or hidden // number
        return hidden, inner, number * width, (self.num_key_value_heads or number) * width


_MAX_HEADER = 100_000_000  # bytes; safetensors allows no more
_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
_DECODERS = ("qwen3", "qwen2", "llama", "mistral")


def read_size(folder: Path) -> ModelSize | None:
    """Reads a model folder's config.json and the headers of its weights.

    Returns:
        None where there is no config.json that can be read, or neither safetensors nor a kind of
        model whose parameters can be counted without them.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        config = config.get("text_config") or config
        fields = ModelSize.model_fields.keys() - {"parameters", "weights_gib"}
        shape = {name: config[name] for name in fields if config.get(name) is not None}
        tensors = [tensor for file in _weights(folder) for tensor in _header(file)]
        if not tensors:
            return _by_shape(config, ModelSize(parameters=1, **shape))
        num_bytes = sum(end - start for start, end in (t["data_offsets"] for t in tensors))
        return ModelSize(
            parameters=sum(math.prod(tensor["shape"]) for tensor in tensors),
            weights_gib=num_bytes / GIB if config.get("quantization_config") else None,
            **shape,
        )
    # A run reads them anyway, with libraries that report better what is wrong.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, struct.error):
        return None


def _by_shape(config: dict[str, Any], size: ModelSize) -> ModelSize | None:
    """Counts the parameters of the matrices and the token embeddings."""
    per_layer, vocab = size.layer_parameters(), config.get("vocab_size")
    if not (per_layer and vocab and size.num_hidden_layers) or config.get("quantization_config"):
        return None
    parameters = vocab * config["hidden_size"] + size.num_hidden_layers * per_layer
    return size.model_copy(update={"parameters": parameters})


def _weights(folder: Path) -> list[Path]:
    """Returns the files of the weights, none if one of them is missing."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    files = [folder / name for name in sorted(names)]
    return files if all(file.is_file() for file in files) else []


def _header(file: Path) -> list[dict[str, Any]]:
    """Returns shape and place of each tensor."""
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header: dict[str, Any] = json.loads(source.read(min(length, _MAX_HEADER)))
    return [tensor for name, tensor in header.items() if name != "__metadata__"]
