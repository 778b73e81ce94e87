"""FlashAttention 2 over texts of any lengths in one row, on a GPU."""

from __future__ import annotations

from typing import Any, cast

import torch

_HEAD_STEP, _MAX_HEAD, _MAX_HEAD_ELSEWHERE = 8, 256, 192
_LARGE_HEADS = ((8, 0), (9, 0), (10, 0))  # compute capabilities of data centres' GPUs


def can_flash(model: Any) -> bool:
    """Says whether a transformer's attention can be this where and as it computes now.

    That needs an Ampere GPU or a later one, and half precision by the weights or by autocast.
    """
    device = model.device
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    able = torch.cuda.get_device_capability(device)
    return (
        able >= (8, 0)
        and _computed_in(device.type, model.dtype) in (torch.bfloat16, torch.float16)
        and size % _HEAD_STEP == 0
        and size <= (_MAX_HEAD if able in _LARGE_HEADS else _MAX_HEAD_ELSEWHERE)
    )


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    texts: tuple[torch.Tensor, int],
    *,
    scale: float,
    causal: bool,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """Attention inside each text, with a gradient.

    `torch.nn.attention.varlen` wraps the same function of PyTorch's, and leaves dropout out.

    Args:
        query: ``[1, heads, tokens, size]``.
        key: ``[1, key heads, tokens, size]``; fewer heads are shared.
        value: As `key`.
        texts: int32 ``[texts + 1]``, where each starts and the last one ends, on the GPU; and how
            long the longest is.
        scale: Factor of the products.
        causal: Whether a token sees only those before it.
        window: A token sees those nearer than this.
        dropout: Share of the weights that are dropped.

    Returns:
        ``[1, tokens, heads, size]``.
    """
    starts, longest = texts
    # Under autocast a norm gives float32, and FlashAttention has no part in autocast.
    dtype = _computed_in(query.device.type, value.dtype)
    rows = (each[0].transpose(0, 1).to(dtype) for each in (query, key, value))
    reach = -1 if window is None else window - 1
    attended = torch.ops.aten._flash_attention_forward(
        *rows,
        *(starts, starts, longest, longest),
        dropout,
        causal,
        False,
        scale=scale,
        window_size_left=reach,
        window_size_right=0 if causal else reach,
    )
    return cast(torch.Tensor, attended[0])[None]


def _computed_in(device: str, dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
