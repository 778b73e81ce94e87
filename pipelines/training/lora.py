"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: a few weights are trained, the others stay.

What comes out has the adapters added to the plain weights, so that nothing after the training
knows of them.
"""

from __future__ import annotations

import torch

from cluster.errors import UserError
from pipelines.training.config import LoraConfig


def add_adapters(model: torch.nn.Module, config: LoraConfig, seed: int) -> None:
    """Freezes a model and puts adapters, to be trained, beside its linear layers.

    They change nothing yet. A projection is small, and is trained in full. `seed` is that of the
    adapters' random weights.

    Raises:
        UserError: No linear layer has such a name.
    """
    import peft

    projection = getattr(model, "projection", None)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.split(".")[0] not in ("pooler", "projection")
    ]
    ends = ("",) if config.target == "all-linear" else tuple(f".{end}" for end in config.target)
    chosen = [name for name in linear if f".{name}".endswith(ends)]
    if not chosen:
        raise UserError(
            f"training.lora.target {list(config.target)}: accepted are all-linear and"
            f" {', '.join(sorted({name.rsplit('.', 1)[-1] for name in linear}))}"
        )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=chosen,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)
    if projection is not None:
        projection.requires_grad_(True)


def merge_adapters(model: torch.nn.Module) -> None:
    """Adds the adapters of :func:`add_adapters` to the weights and removes them."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)  # into a new tensor: nobody keeps the old one's layout
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
