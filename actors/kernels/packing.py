"""Batches without padding: the tokens of all texts in one row, each text attending to itself.

Linear layers, norms and activations do not depend on where a text ends; only attention and
positions do. So a model's own code runs over ``[1, tokens]``, and its attention is replaced: on a
GPU by FlashAttention, which takes the places where the texts begin; on a CPU by one that attends
inside groups of equally long texts, where no mask is needed. Dropout, gradients and gradient
checkpointing stay the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional

from actors.kernels.dropout import draw_kept, scaled
from actors.kernels.flash import can_flash, flash_attention

ATTENTION = "tokay_packed"
# Kinds of transformers whose code hands keyword arguments down to the attention and whose
# attention knows nothing but a mask, causality and a window; with RoBERTa's, positions begin
# behind the padding token's number.
_ROBERTA = ("camembert", "roberta", "xlm-roberta")
_KINDS = (*_ROBERTA, "bert", "electra", "gemma3_text", "llama", "modernbert", "qwen2", "qwen3")
# Attention weights of so many texts at once that they stay in a core's cache.
_CACHED_WEIGHTS = 2**19
# oneDNN keeps half a MiB and spends a third of a millisecond for each shape that it meets, so texts
# in attention are filled up to multiples of this, and passes by at most a sixteenth. It made
# training 1.2 times as fast, in 0.7 of the memory.
_LENGTH_STEP = 16
# Products of a GPU like numbers of tokens that its tiles divide.
_GPU_TOKENS_STEP = 128

TokenRows = Sequence[Sequence[int] | np.ndarray]
Groups = list[tuple[int, int]]  # (number of texts, tokens in each), in the order of the tokens


def use_packing(model: Any) -> bool:
    """Lets a transformer take packed batches, if it is of a kind that can; says whether it is."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    own = type(model).__module__.startswith("transformers.models.")  # not code of the hub
    if not own or not isinstance(model, PreTrainedModel):
        return False
    config = model.config
    if config.model_type not in _KINDS or config._attn_implementation not in ("sdpa", ATTENTION):
        return False
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    return True


def can_pack(model: Any) -> bool:
    """Says whether a model that took :func:`use_packing` can be packed as it computes now."""
    return bool(model.device.type == "cpu") or can_flash(model)


def first_position(config: Any) -> int:
    """Returns the position of a text's first token: RoBERTa's kinds count the padding in."""
    return int(config.pad_token_id) + 1 if config.model_type in _ROBERTA else 0


def cut_batches(rows: TokenRows, batch_tokens: int, packed: bool) -> Iterator[TokenRows]:
    """Cuts rows, longest first, into passes of so many tokens, padding included if not packed."""
    start = tokens = 0
    for end, row in enumerate(rows):
        size = len(row) if packed else len(rows[start])
        if end > start and tokens + size > batch_tokens:
            yield rows[start:end]
            start, tokens = end, 0
            size = len(row)
        tokens += size
    yield rows[start:]


def packed_forward(
    model: Any, rows: TokenRows, options: dict[str, bool]
) -> tuple[torch.Tensor, Layout]:
    """Runs a model over token ids without padding.

    Args:
        model: One that :func:`use_packing` accepted.
        rows: Token ids of each text; equally long ones should be neighbours.
        options: Further arguments of the model.

    Returns:
        The last hidden states ``[tokens, hidden]`` of all texts in their order, then those of
        a filler; and where the texts are.
    """
    device = model.device
    first = first_position(model.config)
    groups = [(len(list(same)), length) for length, same in groupby(map(len, rows))]
    num_tokens = sum(map(len, rows))
    on_gpu = _is_gpu(device)
    step = _GPU_TOKENS_STEP if on_gpu else 1 << max(0, num_tokens.bit_length() - 5)
    layout = Layout(groups, filler=-num_tokens % step)
    given = np.zeros((2, num_tokens + layout.filler), dtype=np.int64)
    np.concatenate(rows, out=given[0, :num_tokens])
    np.concatenate([np.tile(np.arange(n), m) for m, n in groups], out=given[1, :num_tokens])
    given[1] += first
    ids, places = send(given, device)
    if on_gpu:
        layout.send_starts(device)
    # transformers leaves a mask of four dimensions as it is, and packed attention needs none.
    no_mask = torch.zeros(1, 1, 1, 1, device=device)
    output = model(
        position_ids=places[None],
        attention_mask=no_mask,
        packed_layout=layout,
        **_words(model, ids),
        **options,
    )
    return output.last_hidden_state[0], layout


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def send(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies to a device; to a GPU from pinned memory, so that nobody waits for the work there."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _words(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what a model is given for its tokens: in training, their embeddings."""
    table = model.get_input_embeddings()
    plain = type(table) is torch.nn.Embedding and table.max_norm is None
    if torch.is_grad_enabled() and plain and table.weight.requires_grad:
        return {"inputs_embeds": cast(torch.Tensor, _LookUp.apply(table.weight, ids, table))[None]}  # type: ignore[no-untyped-call]
    return {"input_ids": ids[None]}


class _LookUp(torch.autograd.Function):
    """An embedding whose gradient is added to the looked up rows alone.

    PyTorch's own makes a matrix of the whole vocabulary's size at every look-up, of which a batch
    that goes through the model in several passes has many.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, ids: torch.Tensor, table: torch.nn.Embedding
    ) -> torch.Tensor:
        ctx.table, ctx.ids = table, ids
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        weight, ids = ctx.table.weight, ctx.ids
        if ctx.table.padding_idx is not None:
            gradient = gradient.masked_fill((ids == ctx.table.padding_idx)[:, None], 0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, gradient.to(weight.dtype))
        return None, None, None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_layout: Layout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, inside each text of a packed batch.

    A batch that is not packed gets transformers' own attention.

    Args:
        module: The layer that asks.
        query: ``[1, heads, tokens, size]``.
        key: ``[1, key heads, tokens, size]``.
        value: ``[1, key heads, tokens, size]``.
        attention_mask: Not looked at in a packed batch.
        packed_layout: Where the texts are.
        dropout: Share of the weights that are dropped.
        scaling: Factor of the products.
        is_causal: Whether a token sees only those before it; the layer's own if None.
        sliding_window: How far a token sees.
        **others: What other implementations want.

    Returns:
        ``[1, tokens, heads, size]`` and no weights.
    """
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return cast(tuple[torch.Tensor, None], plain)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and is_causal is False:
        sliding_window += 1  # transformers' window of a decoder made bidirectional includes its end
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed_layout.starts is not None:
        attended = flash_attention(
            query,
            key,
            value,
            (packed_layout.starts, packed_layout.longest),
            scale=scale,
            causal=causal,
            window=sliding_window,
            dropout=dropout,
        )
        return attended, None
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
    on_cpu = query.device.type == "cpu" and not causal
    if on_cpu and (query.dtype == torch.bfloat16 or dropout):
        # Three to ten times the speed of PyTorch's fused kernel in bfloat16, forwards and
        # backwards; with dropout that kernel does the same, with more care.
        pieces = packed_layout.pieces(query.shape[1], sliding_window)
        attended = _Attention.apply(query, key, value, pieces, scale, dropout)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, attended), None
    groups = packed_layout.filled_groups
    sizes = [num_texts * length for num_texts, length in groups]
    parts = zip(*(torch.split(each, sizes, dim=2) for each in (query, key, value)), strict=True)
    outputs = []
    for (num_texts, length), part in zip(groups, parts, strict=True):
        mask = _window(length, causal, sliding_window, query.device)
        queries, keys, values = (_texts(each, num_texts) for each in part)
        attended = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scale,
        )
        outputs.append(attended.transpose(1, 2).reshape(-1, *attended.shape[1::2]))
    return torch.cat(outputs)[None], None


def pool_packed(hidden: torch.Tensor, layout: Layout, pooling: str) -> torch.Tensor:
    """Returns one vector ``[texts, hidden]`` for each text of ``[tokens, hidden]``."""
    starts = layout.starts
    if starts is not None:  # one kernel for all lengths; the filler's is cut off
        starts = starts[: len(starts) - bool(layout.filler)]
        if pooling == "mean":
            texts = hidden[: len(hidden) - layout.filler]
            return torch.segment_reduce(texts, "mean", lengths=starts.diff(), unsafe=True)
        return hidden.index_select(0, starts[1:] - 1 if pooling == "lasttoken" else starts[:-1])
    sizes = [num_texts * length for num_texts, length in layout.groups]
    pooled = []
    parts = torch.split(hidden, [*sizes, layout.filler])
    for (num_texts, length), part in zip(layout.groups, parts, strict=False):
        texts = part.view(num_texts, length, -1)
        if pooling == "mean":
            pooled.append(texts.mean(1))
        else:
            pooled.append(texts[:, -1 if pooling == "lasttoken" else 0])
    return torch.cat(pooled)


def _window(
    length: int, causal: bool, size: int | None, device: torch.device
) -> torch.Tensor | None:
    """Returns which tokens see which, None where the window is wider than the text."""
    if size is None or size >= length:
        return None
    ahead = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    near = ahead.abs() < size
    return near & (ahead >= 0) if causal else near


def _texts(rows: torch.Tensor, num_texts: int) -> torch.Tensor:
    """Views ``[1, heads, tokens, size]`` as ``[texts, heads, length, size]``, of one length."""
    _, heads, tokens, size = rows.shape
    return rows.view(heads, num_texts, tokens // num_texts, size).transpose(0, 1)


@dataclass(frozen=True)
class _Piece:
    """Texts whose attention is computed together, each filled up to the same length.

    Attributes:
        tokens: Where they are.
        num_texts: How many.
        places: int64 ``[texts * length]``: which of the tokens stands where; where a text is filled
            up, the first of them. None: all texts have that length.
        real: int64 ``[tokens]``: the places that are not filled up.
        hidden: bool ``[texts or 1, length or 1, keys]``: which of the last keys a query does not
            see. None: it sees all.
    """

    tokens: slice
    num_texts: int
    places: torch.Tensor | None
    real: torch.Tensor
    hidden: torch.Tensor | None

    @classmethod
    def of(cls, start: int, lengths: np.ndarray, filled: int, window: int | None) -> _Piece:
        starts = np.cumsum(lengths) - lengths
        steps = np.arange(filled)
        missing = steps >= lengths[:, None]
        places = torch.from_numpy(np.where(missing, 0, starts[:, None] + steps).ravel())
        unseen = torch.from_numpy(missing[:, None])
        near = _window(filled, False, window, torch.device("cpu"))
        if near is None:
            hidden = unseen[:, :, -_LENGTH_STEP:]
        else:  # what is filled up sees itself, for a query has to see something
            hidden = (unseen & ~torch.eye(filled, dtype=torch.bool)) | ~near
        return cls(
            tokens=slice(start, start + int(lengths.sum())),
            num_texts=len(lengths),
            places=places if missing.any() else None,
            real=torch.from_numpy(np.flatnonzero(~missing)),
            hidden=hidden if bool(hidden.any()) else None,
        )

    def take(self, rows: torch.Tensor, *, zeros: bool = False) -> torch.Tensor:
        """Returns ``[heads, texts, length, size]`` of ``[1, heads, tokens, size]``."""
        part = rows[0, :, self.tokens]
        heads, _, size = part.shape
        if self.places is not None:
            if zeros:
                filled = part.new_zeros(heads, len(self.places), size)
                part = filled.index_copy_(1, self.real, part)
            else:
                part = part.index_select(1, self.places)
        return part.view(heads, self.num_texts, -1, size)

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Writes what :meth:`take` would take, but for what is filled."""
        part = values.flatten(1, 2)
        rows[0, :, self.tokens] = part if self.places is None else part.index_select(1, self.real)


@dataclass
class Layout:
    """Where the texts of a packed batch are.

    Attributes:
        groups: Numbers of texts and their length, in their order.
        filler: Tokens behind them that are no text.
        starts: int32 ``[texts + 1]`` on a GPU: where each text starts and the last one ends, the
            filler being one.
    """

    groups: Groups
    filler: int = 0
    starts: torch.Tensor | None = None
    _pieces: dict[tuple[int, int | None], list[_Piece]] = field(default_factory=dict)

    @property
    def filled_groups(self) -> Groups:
        """The groups, with the filler as one."""
        return [*self.groups, (1, self.filler)] if self.filler else self.groups

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(length for _, length in self.filled_groups)

    def send_starts(self, device: torch.device) -> None:
        """Lets the GPU know where the texts are."""
        ends = np.cumsum(self._lengths())
        self.starts = send(np.concatenate([[0], ends]).astype(np.int32), device)

    def _lengths(self) -> np.ndarray:
        return np.concatenate([np.full(num, length) for num, length in self.filled_groups])

    def pieces(self, num_heads: int, window: int | None) -> list[_Piece]:
        """Returns the texts in pieces whose weights stay in a core's cache."""
        if (num_heads, window) not in self._pieces:
            self._pieces[num_heads, window] = list(self._cut(num_heads, window))
        return self._pieces[num_heads, window]

    def _cut(self, num_heads: int, window: int | None) -> Iterator[_Piece]:
        lengths = self._lengths()
        filled = -(-lengths // _LENGTH_STEP) * _LENGTH_STEP
        start = 0
        for size, same in groupby(range(len(lengths)), key=lambda text: filled[text]):
            texts = list(same)
            max_texts = max(1, _CACHED_WEIGHTS // (num_heads * int(size) ** 2))
            while texts:
                count = 1 << (min(max_texts, len(texts)).bit_length() - 1)
                part = lengths[texts[0] : texts[0] + count]
                yield _Piece.of(start, part, int(size), window)
                start += int(part.sum())
                del texts[:count]


class _Attention(torch.autograd.Function):
    """Attention by plain products, a few texts at a time; its weights are computed twice, not kept.

    The gradients are those of FlashAttention (arXiv 2205.14135, section B.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pieces: list[_Piece],
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        masks = []
        for piece in pieces:
            queries, keys, values = (piece.take(each) for each in (query, key, value))
            weights = _weights(queries, keys, scale, piece.hidden)
            if dropout:
                masks.append(draw_kept(weights.shape, dropout))
                weights *= scaled(masks[-1], dropout, weights.dtype)
            piece.put(output.transpose(1, 2), weights @ values)
        ctx.pieces, ctx.scale, ctx.dropout = pieces, scale, dropout
        ctx.save_for_backward(query, key, value, *masks)
        return output

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        query, key, value, *masks = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(each) for each in (query, key, value))
        for number, piece in enumerate(ctx.pieces):
            queries, keys, values = (piece.take(each) for each in (query, key, value))
            of_out = piece.take(gradient.transpose(1, 2), zeros=True)
            weights = _weights(queries, keys, ctx.scale, piece.hidden)
            of_weights = of_out @ values.transpose(-1, -2)
            kept = weights
            if masks:
                factors = scaled(masks[number], ctx.dropout, weights.dtype)
                kept = weights * factors
                of_weights *= factors
            of_products = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_products *= ctx.scale
            piece.put(of_query, of_products @ keys)
            piece.put(of_key, of_products.transpose(-1, -2) @ queries)
            piece.put(of_value, kept.transpose(-1, -2) @ of_out)
        return of_query, of_key, of_value, None, None, None


def _weights(
    query: torch.Tensor, key: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> torch.Tensor:
    products = (query * scale) @ key.transpose(-1, -2)
    if hidden is not None:
        products[..., -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    return products.softmax(-1)
