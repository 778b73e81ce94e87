"""FSDP2: each worker keeps its share of the weights, the gradients and the optimizer's state.

A unit's weights are gathered when a batch comes through it, forwards or backwards, and dropped
after it. All workers take part in that, so they must run the model equally often, and read weights
together.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from actors.kernels.linear import OneDnnLinear


def shard(model: torch.nn.Module, *, bfloat16: bool) -> None:
    """Leaves this worker its share of a model: a unit for each layer and each end.

    The model is the same on all workers. With `bfloat16`, weights are gathered as the type of the
    products that they go into; shares, gradients and optimizer stay as they are.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if type(module) is OneDnnLinear:  # remembers weights by their addresses, which change
            cast(Any, module).__class__ = torch.nn.Linear
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does, where it is needed
    )
    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    # The projection is called with its weights' own type.
    projection = getattr(model, "projection", None)
    policies = [(projection, MixedPrecisionPolicy())] if projection is not None else []
    embedding = cast(Any, model).get_input_embeddings()
    policies += [(module, policy) for module in (*layers, embedding, model)]
    for module, own in policies:
        # The model itself is resharded too, so that its parameters are always the shares.
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=own)
        unit.set_gradient_divide_factor(1.0)  # the workers' losses add up to the batch's
        unit.set_force_sum_reduction_for_comms(True)


def is_sharded(model: torch.nn.Module) -> bool:
    """Says whether this worker holds only a share of the model."""
    return isinstance(model, FSDPModule)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole of the workers' shares on rank 0's CPU, and an empty tensor elsewhere.

    All workers call this; a tensor that is not sharded is returned as it is.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)


def share(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns a worker's share of a tensor, laid out like another and on its device."""
    whole = whole.to(like.device)
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
