"""What is done to a model to make a student of it: fewer layers, a projection, both directions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch

from actors.encoder import Encoder


def cut_layers(encoder: Encoder, layers: Sequence[int]) -> Encoder:
    """Returns a shallower copy that keeps some of an encoder's layers: a student's starting point.

    `layers` are the indices of those to keep, rising, such as ``[0, 2, 5]``.

    Raises:
        ValueError: The model is of another kind, or the indices do not fit it.
    """
    stack = _layers(encoder.model)
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(stack):
        raise ValueError(
            f"layers {kept}: give rising indices from 0 to {len(stack) - 1}, such as "
            f"{list(range(0, len(stack), 2))}"
        )
    config = cast(Any, encoder.model.config)
    if config.model_type == "modernbert" and kept[0] != 0:
        raise ValueError(f"layers {kept}: a ModernBERT's first layer differs, so keep layer 0")
    model = cast(Any, copy.deepcopy(encoder.model))
    chosen = torch.nn.ModuleList(_layers(model)[index] for index in kept)
    holder = model if hasattr(model, "layers") else model.encoder
    setattr(holder, "layers" if hasattr(model, "layers") else "layer", chosen)
    for place, layer in enumerate(chosen):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = place
    if getattr(config, "layer_types", None):
        model.config.layer_types = [config.layer_types[index] for index in kept]
    model.config.num_hidden_layers = len(kept)
    return Encoder(
        model,
        encoder.tokenizer,
        pooling=encoder.pooling,
        max_tokens=encoder.max_tokens,
        templates=encoder.templates,
    )


def add_projection(encoder: Encoder, dimensions: int, seed: int = 0) -> None:
    """Puts a projection, to be trained, behind the pooling; it replaces one that is there.

    Its random weights are orthogonal, which keeps similarities as well as that number of
    `dimensions` can.
    """
    weights = next(encoder.model.parameters())
    size = int(cast(Any, encoder.model.config).hidden_size)
    layer = torch.nn.Linear(size, dimensions, bias=False)
    torch.nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    projection = torch.nn.Sequential(layer, torch.nn.Identity())
    encoder.model.add_module("projection", projection.to(weights.device, weights.dtype))


def add_linear_adapter(encoder: Encoder, matrix: torch.Tensor) -> None:
    """Puts ``[dimensions, dimensions]`` of a linear layer behind all that the encoder has."""
    weights = next(encoder.model.parameters())
    size = len(matrix)
    layer = torch.nn.Linear(in_features=size, out_features=size, bias=False)
    layer.weight.data.copy_(matrix)
    before = getattr(encoder.model, "projection", None) or ()
    projection = torch.nn.Sequential(*before, layer, torch.nn.Identity())
    encoder.model.add_module("projection", projection.to(weights.device, weights.dtype))


def make_bidirectional(encoder: Encoder) -> None:
    """Lets every token of a decoder see those behind it too; its configuration says so from now on.

    sentence-transformers and transformers (from 5.2) read that from the saved configuration.

    Raises:
        ValueError: The model is no decoder, or of a kind that stays one.
    """
    model = cast(Any, encoder.model)
    kind = type(model).__name__
    if not _looks_back_only(encoder):
        raise ValueError(f"a {kind} sees both ways already: leave `bidirectional` out")
    model.config.is_causal = False
    if _looks_back_only(encoder):
        del model.config.is_causal
        raise ValueError(f"transformers has no bidirectional attention for a {kind}")


def _looks_back_only(encoder: Encoder) -> bool:
    """Says whether the first token's state is the same whatever follows."""
    ids = torch.tensor([[5, 6], [5, 7]], device=encoder.device)
    training = encoder.model.training
    encoder.model.eval()
    with torch.no_grad():
        states = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    encoder.model.train(training)
    first = states.last_hidden_state[:, 0].float()
    return bool(torch.allclose(first[0], first[1], atol=1e-6))


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    for holder, name in ((getattr(model, "encoder", None), "layer"), (model, "layers")):
        stack = getattr(holder, name, None)
        if isinstance(stack, torch.nn.ModuleList):
            return stack
    raise ValueError(
        f"layers of a {type(model).__name__} cannot be cut: accepted are BERT-like encoders (BERT, "
        "RoBERTa, XLM-RoBERTa, MPNet, ELECTRA, ModernBERT) and decoders (Qwen, Gemma, Llama); take "
        "a smaller model as it is"
    )
