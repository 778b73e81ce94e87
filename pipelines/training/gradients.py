"""The loss and the gradients of one batch, all at once or with a gradient cache.

With a cache (GradCache, arXiv 2101.06983) the batch may be larger than memory: vectors are computed
without a graph, the loss gives each vector's gradient, and then each chunk of texts is computed
again, with its graph, and given its vectors' gradients. The last chunk keeps its first graph.

Where the weights are sharded, workers run the model equally often, each pass over one chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from pipelines.training.agreement import OutOfMemory, agree, highest
from pipelines.training.config import TrainerConfig, TrainingConfig
from pipelines.training.embedding_loss import embedding_loss
from pipelines.training.examples import Batch, Part, own_rows
from pipelines.training.loss import Vectors, contrastive_loss, related_examples
from pipelines.training.place import ALONE, Place
from pipelines.training.sharding import is_sharded

if TYPE_CHECKING:
    from actors.encoder import Encoder

_PASS_TOKENS = 16384  # on a GPU, and for a sharded model without a gradient cache


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A worker's part of one batch, and where everybody's examples are.

    Attributes:
        queries: Token ids of each.
        positives: As `queries`.
        negatives: As `queries`, of the examples' hard negatives, one example's after another's.
        num_negatives: int64 ``[examples]``.
        teacher_scores: ``[examples, 1 + max_negatives]`` with NaN where there are none, or None.
        sizes: Number of examples of each worker.
        rank: This worker's place among them.
        related: What :func:`pipelines.training.loss.related_examples` returned, or None.
        symmetric: Whether the batch is of a symmetric set.
        lists: ``[examples, list, dimensions]``, padded with zeros: the stored vectors of each
            query's passages, which then have no texts; or None.
        texts: As `queries`, of the texts that are to get the vectors of `embeddings`.
        embeddings: ``[texts, dimensions]``, or None.
        num_texts: Of the whole batch.
    """

    queries: Sequence[np.ndarray]
    positives: Sequence[np.ndarray]
    negatives: Sequence[np.ndarray]
    num_negatives: torch.Tensor
    teacher_scores: torch.Tensor | None
    sizes: list[int]
    rank: int
    related: torch.Tensor | None
    symmetric: bool
    lists: torch.Tensor | None = None
    texts: Sequence[np.ndarray] = ()
    embeddings: torch.Tensor | None = None
    num_texts: int = 0

    @property
    def rows(self) -> list[np.ndarray]:
        """All its texts, in the order of the loss: queries, positives, negatives, texts."""
        return [*self.queries, *self.positives, *self.negatives, *self.texts]


def slice_batch(batch: Batch, config: TrainerConfig, place: Place = ALONE) -> Slice:
    """Returns a worker's part of a batch that is whole, or was read for it; see `own_rows`."""
    part = batch.part or Part(
        num_queries=len(batch.queries),
        num_texts=len(batch.texts),
        queries=own_rows(len(batch.queries), place),
        texts=own_rows(len(batch.texts), place),
    )
    own = part.queries
    negatives, lists = batch.negatives[own], None
    width = 1 + max(map(len, negatives), default=0)
    if batch.lists is not None:
        lists = _padded(batch.lists[own], dimensions=batch.lists[0].shape[1])
        width = lists.shape[1]
    related = None
    masks = isinstance(config, TrainingConfig) and config.loss.mask_duplicates
    if masks and batch.lists is None:  # in whose loss no example is another's negative
        related = related_examples(batch.query_ids, batch.positive_ids)
    everybody = (replace(place, rank=rank) for rank in range(place.world))
    spans = [own_rows(part.num_queries, each) for each in everybody]
    return Slice(
        queries=batch.queries[own],
        positives=batch.positives[own],
        negatives=list(chain.from_iterable(negatives)),
        num_negatives=torch.tensor([len(rows) for rows in negatives], dtype=torch.int64),
        teacher_scores=_teacher_scores(batch.teacher_scores[own], width),
        sizes=[span.stop - span.start for span in spans],
        rank=place.rank,
        related=related,
        symmetric=batch.symmetric,
        lists=lists,
        texts=batch.texts[part.texts],
        num_texts=part.num_texts,
        embeddings=None if batch.embeddings is None else torch.tensor(batch.embeddings[part.texts]),
    )


def backward(encoder: Encoder, part: Slice, config: TrainerConfig) -> float:
    """Adds the whole batch's gradients to the weights and returns its loss.

    Raises:
        OutOfMemory: A worker has run out of memory, and the gradients are of no use.
        torch.OutOfMemoryError: This worker has, and the model is sharded: the others wait for it.
    """
    several, sharded = len(part.sizes) > 1, is_sharded(encoder.model)
    try:
        total = _own_backward(encoder, part, config)
        if several and not sharded:
            weights = encoder.model.parameters()
            _add_up_gradients([weight for weight in weights if weight.requires_grad])
    except torch.OutOfMemoryError:
        if sharded:
            raise
    else:
        if several:
            dist.all_reduce(total)
        return float(total)
    if several:  # after the error, which held on to activations
        agree(encoder.device, ran_out=True)
    raise OutOfMemory


def batch_loss(embedded: torch.Tensor, part: Slice, config: TrainerConfig) -> torch.Tensor:
    """Returns this worker's share of the loss of the texts of `part`.

    `embedded` is ``[queries + positives + negatives + texts, dimensions]``, unit length. With fixed
    passages it is the divergence over the stored lists, and `anchor_weight` times the distance of
    the texts from their vectors.
    """
    if not isinstance(config, TrainingConfig):
        return _distance(embedded, part)
    if part.lists is None:
        return _text_loss(embedded, part, config)
    queries, texts = torch.tensor_split(embedded, [len(part.queries)])
    loss = _list_loss(queries, part.lists.to(embedded.device), part, config)
    if part.embeddings is not None:
        loss = loss + config.loss.anchor_weight * _distance(texts, part)
    return loss


def _distance(vectors: torch.Tensor, part: Slice) -> torch.Tensor:
    assert part.embeddings is not None
    return embedding_loss(vectors, part.embeddings.to(vectors.device), num_texts=part.num_texts)


def _list_loss(
    queries: torch.Tensor, lists: torch.Tensor, part: Slice, config: TrainingConfig
) -> torch.Tensor:
    scores = part.teacher_scores
    vectors = Vectors(
        queries=queries,
        positives=lists[:, 0],
        negatives=lists[:, 1:],
        has_negative=lists[:, 1:].any(dim=2),
        teacher_scores=None if scores is None else scores.to(queries.device),
    )
    return contrastive_loss(vectors, config.loss, sizes=part.sizes, rank=part.rank)


def _text_loss(embedded: torch.Tensor, part: Slice, config: TrainingConfig) -> torch.Tensor:
    queries, positives, flat = torch.split(
        embedded, [len(part.queries), len(part.positives), len(part.negatives)]
    )
    counts = part.num_negatives.to(embedded.device)
    places = torch.arange(int(counts.max()) if len(counts) else 0, device=embedded.device)
    has_negative = places < counts[:, None]
    negatives = queries.new_zeros(*has_negative.shape, queries.shape[1])
    negatives[has_negative] = flat
    scores = part.teacher_scores
    vectors = Vectors(
        queries=queries,
        positives=positives,
        negatives=negatives,
        has_negative=has_negative,
        teacher_scores=None if scores is None else scores.to(embedded.device),
    )
    return contrastive_loss(
        vectors,
        config.loss,
        sizes=part.sizes,
        rank=part.rank,
        related=part.related,
        symmetric=part.symmetric,
    )


def evaluation_loss(encoder: Encoder, part: Slice, config: TrainerConfig) -> float:
    """Returns the whole batch's loss, without gradients."""
    with torch.inference_mode():
        loss = batch_loss(_embed_all(encoder, part.rows, config), part, config)
        if len(part.sizes) > 1:
            dist.all_reduce(loss)
    return float(loss)


def uses_bfloat16(config: TrainerConfig, device: torch.device) -> bool:
    """Says whether matrix products are bfloat16 on this device; ``auto`` asks the hardware."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    from actors.kernels.linear import native_bfloat16

    return native_bfloat16(device)


def _teacher_scores(scores: list[list[float]], width: int) -> torch.Tensor | None:
    if not any(scores):
        return None
    table = torch.full((len(scores), width), float("nan"))
    for place, row in enumerate(scores):
        table[place, : len(row)] = torch.tensor(row)
    return table


def _padded(lists: list[np.ndarray], *, dimensions: int) -> torch.Tensor:
    """Returns ``[lists, longest, dimensions]``; where there is no list, the longest has one."""
    table = torch.zeros(len(lists), max(map(len, lists), default=1), dimensions)
    for place, rows in enumerate(lists):
        table[place, : len(rows)] = torch.from_numpy(rows)
    return table


def embed(encoder: Encoder, rows: Sequence[np.ndarray], config: TrainerConfig) -> torch.Tensor:
    """Embeds texts in the training's precision, a sharded model's in one pass."""
    device = encoder.device
    batch_tokens = sys.maxsize if is_sharded(encoder.model) else None
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config, device)):
        return encoder.embed_tokens(rows, batch_tokens=batch_tokens)


def _embed_all(encoder: Encoder, rows: Sequence[np.ndarray], config: TrainerConfig) -> torch.Tensor:
    if not is_sharded(encoder.model):
        return embed(encoder, rows, config)
    filled, chunks = _plan(encoder, rows, _PASS_TOKENS)
    vectors = torch.cat([embed(encoder, [filled[row] for row in c], config) for c in chunks])
    places = torch.tensor(list(chain.from_iterable(chunks))).argsort()[: len(rows)]
    return vectors[places.to(vectors.device)]


def _plan(
    encoder: Encoder, rows: Sequence[np.ndarray], max_tokens: int
) -> tuple[Sequence[np.ndarray], list[list[int]]]:
    """Cuts the rows into chunks; of a sharded model's, every worker gets equally many.

    Returns:
        The rows, with a row of one token added for each missing chunk; and the chunks.
    """
    sharded = is_sharded(encoder.model)
    pass_tokens = sys.maxsize if sharded else _PASS_TOKENS
    chunks = _chunks([len(row) for row in rows], max_tokens, pass_tokens)
    if not sharded:
        return rows, chunks
    missing = highest(len(chunks), encoder.device) - len(chunks)
    fillers = [[len(rows) + number] for number in range(missing)]
    return [*rows, *[np.zeros(1, np.int64)] * missing], fillers + chunks


def _own_backward(encoder: Encoder, part: Slice, config: TrainerConfig) -> torch.Tensor:
    """Adds the gradients of this worker's texts and returns its share of the loss."""
    max_tokens = config.gradient_cache_tokens
    if isinstance(max_tokens, int):
        return _cached_backward(encoder, part, config, max_tokens)
    loss = batch_loss(_embed_all(encoder, part.rows, config), part, config)
    if loss.requires_grad:  # not where this worker has no example and needs no other's
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _cached_backward(
    encoder: Encoder, part: Slice, config: TrainerConfig, max_tokens: int
) -> torch.Tensor:
    num_rows = len(part.rows)
    rows, chunks = _plan(encoder, part.rows, max_tokens)
    passes = [_replayable(encoder, [rows[row] for row in chunk], config) for chunk in chunks]
    with torch.no_grad():
        vectors = [again() for again in passes[:-1]]
    last = [again() for again in passes[-1:]]
    order = torch.tensor([row for chunk in chunks for row in chunk], dtype=torch.long)
    embedded = torch.cat([*vectors, *last]) if rows else encoder.embed_tokens([])
    leaf = torch.empty_like(embedded)
    leaf[order.to(leaf.device)] = embedded.detach()
    leaf.requires_grad_()
    loss = batch_loss(leaf[:num_rows], part, config)
    loss.backward()  # type: ignore[no-untyped-call]
    if leaf.grad is not None and rows:
        sizes = [len(chunk) for chunk in chunks]
        gradients = torch.split(leaf.grad[order.to(leaf.device)], sizes)
        last[0].backward(gradients[-1])  # type: ignore[no-untyped-call]
        for again, gradient in zip(passes[:-1], gradients[:-1], strict=True):
            again().backward(gradient)  # type: ignore[no-untyped-call]
    return loss.detach()


def _chunks(lengths: Sequence[int], max_tokens: int, pass_tokens: int) -> list[list[int]]:
    """Cuts the rows, shortest first, into lists of at most `max_tokens` tokens.

    Padding within their passes is counted. The last and longest list keeps its graph, so that
    nothing long is computed twice without need.
    """
    chunks: list[list[int]] = []
    before = in_pass = last = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        length = lengths[row]
        if (in_pass + 1) * length > pass_tokens:
            before, in_pass = before + in_pass * last, 0
        if not chunks or before + (in_pass + 1) * length > max_tokens:
            chunks.append([])
            before = in_pass = 0
        chunks[-1].append(row)
        in_pass, last = in_pass + 1, length
    return chunks


def _replayable(
    encoder: Encoder, rows: Sequence[np.ndarray], config: TrainerConfig
) -> Callable[[], torch.Tensor]:
    """Returns a function that embeds the rows, with the same dropout each time it is called."""
    seed = int(torch.randint(2**62, ()).item())
    devices = [encoder.device] if encoder.device.type == "cuda" else []

    def again() -> torch.Tensor:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return embed(encoder, rows, config)

    return again


def _add_up_gradients(weights: Sequence[torch.nn.Parameter]) -> None:
    """Sums every weight's gradient over the workers, in one all-reduce."""
    gradients = [
        weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights
    ]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    agree(flat.device)
    dist.all_reduce(flat)
    parts = torch.split(flat, [weight.numel() for weight in weights])
    for weight, summed in zip(weights, parts, strict=True):
        weight.grad = summed.view_as(weight)
