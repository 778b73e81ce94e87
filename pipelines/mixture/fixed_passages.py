"""The mixture of a training of queries alone: their lists hold passages' vectors, and no texts.

The passages keep the vectors that the retriever gave them, which lie in `embeddings`; a query is
trained towards those of its candidates. In every batch some passages stand too, to be held to their
own vectors, so that the index that there is stays nearly valid.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact, Json
from cluster.errors import UserError
from cluster.exchange import Shared, run_exchange
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.shard_groups import shard_groups
from cluster.steps import StepContext
from cluster.storage import Storage, write_table
from pipelines.mixture.config import MixtureConfig
from pipelines.mixture.fixed_lists import (
    BESIDE,
    FIRST_BESIDE,
    LISTS,
    LISTS_PER_SHARD,
    VECTORS,
    WriteLists,
    find_vectors,
    float16_column,
    write_lists,
)
from pipelines.mixture.formats import Format
from pipelines.mixture.passage_draw import Draw, DrawnPassages, drawn_passages
from pipelines.mixture.sampling import Rows, draw_batches
from pipelines.mixture.sources import Source, batches_in_order, draw_rows, hold_out, without
from pipelines.mixture.stored_rows import (
    Batches,
    Places,
    part,
    read_keys,
    write_rows,
    write_validation,
)


def make_fixed_mixture(
    config: MixtureConfig,
    *,
    format_: Format,
    batch_size: int,
    epochs: float,
    context: StepContext,
) -> dict[str, Json]:
    """Draws the batches of queries and of passages beside them, tokenises and writes them.

    The driver holds what lists are drawn by, 32 bytes each, 16 for each of their places, and 8 for
    each passage that may stand beside them.

    Raises:
        UserError: No example is left, or the student's vectors have another length.
    """
    fixed = config.fixed_passages
    assert fixed is not None
    context.log.resume()  # so that what is held out does not begin it anew
    dimensions = context.input("student").manifest.metrics["dimensions"]
    assert isinstance(dimensions, int)
    lists = write_lists(
        context.input("fret"), config.fret_only_tasks, format_, part(context, LISTS)
    )
    (keys,) = read_keys(lists.rows, 1)
    keys = draw_rows(keys, config.fret_max_rows, "fret", config.seed)
    if not len(keys):
        raise UserError(
            "no training example is left: every generated query was dropped (see the fret step's"
            " manifest); write more seeds or loosen fret"
        )
    uniform = config.fret_tasks == "uniform"
    source = Source(name="fret", weight=len(keys), keys=keys, uniform_tasks=uniform)
    (held_out,) = hold_out([source], config)
    source = without(source, held_out)
    num_batches = max(1, round(epochs * len(source) / batch_size))
    num_beside = round(fixed.anchor_share * batch_size)
    batches = list(draw_batches([source.rows()], batch_size, num_batches, config.seed))
    in_order = batches_in_order([len(held_out)], batch_size)
    places = Places.of(batches, [source.keys["row"]])
    vectors = find_vectors(
        lists,
        np.unique(np.concatenate([places.rows, held_out.keys["row"]])),
        places.times,
        context.input("embeddings"),
        dimensions,
        part(context, VECTORS),
    )
    sources = [(VECTORS, group) for group in shard_groups(vectors)]

    def exchange(places: Places, batches: Batches, beside: Places | None = None) -> WriteLists:
        size = max(len(rows) for _, rows in batches)
        per_shard = max(1, LISTS_PER_SHARD // size)
        return WriteLists.of(
            batches,
            per_shard,
            places,
            beside=Shared.of(beside) if beside else None,
            dimensions=dimensions,
            format_=format_,
        )

    if in_order:
        of_held_out = Places.of(in_order, [held_out.keys["row"]])
        groups = [(LISTS, group) for group in of_held_out.sources(lists.rows)]
        write_validation(exchange(of_held_out, in_order), [*groups, *sources], context)
    sources += [(LISTS, group) for group in places.sources(lists.rows)]
    beside = None
    if num_beside:
        passages = _write_passages(fixed.max_passages, config.seed, format_, dimensions, context)
        numbers = np.arange(passages.num_rows)
        drawn = Rows(name="passages", weight=1, keys=numbers[:, None])
        beside = Places.of(
            list(draw_batches([drawn], num_beside, num_batches, config.seed)),
            [numbers],
            FIRST_BESIDE,
        )
        sources += [(BESIDE, group) for group in beside.sources(passages)]
    run_exchange(exchange(places, batches, beside), sources, context)
    return {
        "num_batches": num_batches,
        "num_examples": len(source),
        "num_validation_examples": len(held_out),
        "num_anchored": len(np.unique(beside.rows)) if beside else 0,
        "sets": {"fret": len(source)},
        "batches": {"fret": num_batches},
    }


def _write_passages(
    max_passages: int, seed: int, format_: Format, dimensions: int, context: StepContext
) -> Artifact:
    """Has tasks write the passages that are drawn: their formatted texts, and their vectors."""
    embeddings, own = context.input("embeddings"), part(context, BESIDE)
    draw = Draw.of(embeddings, max_passages, seed)
    tasks = [
        (some, format_, dimensions, own.storage)
        for some in drawn_passages(draw, embeddings, context.input("passages"))
    ]
    return write_rows(_write_some, tasks, own)[0]


def _write_some(
    passages: DrawnPassages, format_: Format, dimensions: int, storage: Storage
) -> tuple[list[FileEntry], None]:
    encoder, written = format_.load().encoder, []
    for number, table in enumerate(passages.tables(), passages.vectors.number):
        texts = encoder.format_passages(table["text"].to_pylist(), table["title"].to_pylist())
        vectors = float16_column(table["embedding"], dimensions)
        rows = pa.table({"text": pa.array(texts, pa.string()), "vector": vectors})
        written.append(write_table(storage, shard_path(number), rows))
    return written, None
