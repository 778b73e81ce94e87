"""The step `passages`: the corpus cleaned, cut and deduplicated; what there is to search."""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.artifacts import Json, write_rejects, write_shards
from cluster.errors import DUPLICATE, DUPLICATES, NEAR_DUPLICATE, Reject, UserError
from cluster.steps import Step, StepContext
from pipelines.corpus.cutting import Passage, passages_of, reject_reason
from pipelines.corpus.near_duplicates import near_duplicates
from pipelines.datasets.corpus import Corpus
from pipelines.datasets.documents import Document
from pipelines.fingerprints import fingerprinted
from pipelines.records import PASSAGE

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

log = logging.getLogger(__name__)

TITLE = "clean, cut and deduplicate the corpus"
PASSAGES_PER_SHARD = 1024


def step(recipe: Recipe) -> Step:
    """Returns the step; raises UserError for a corpus that does not exist."""
    corpus, sample = Corpus(recipe.corpus), recipe.probe.sample
    config = {"corpus": fingerprinted(recipe.corpus), "version": corpus.version()}
    return Step(
        name="passages",
        config={**config, "sample": sample} if sample else config,
        inputs=(),
        work=lambda context: make_passages(corpus, context, sample),
        max_reject_share=recipe.corpus.max_reject_share,
    )


def make_passages(
    corpus: Corpus, context: StepContext, sample: int | None = None
) -> dict[str, Json]:
    """Cleans, cuts and deduplicates the corpus; duplicates are rejects that are no bad rows.

    With `sample` the passages are at most so many, of documents that are drawn by a hash.
    """
    import icu4py

    if corpus.passed_over and corpus.format == "auto":
        left = ", ".join(f"{count} {suffix}" for suffix, count in corpus.passed_over.most_common(5))
        log.warning("of corpus %s these files are not read: %s", corpus.config.path, left)
    passages, rejects, num_documents = cut_corpus(corpus, context.progress.update, sample)
    rows = {name: [getattr(passage, name) for passage in passages] for name in PASSAGE.names}
    table = pa.table(rows, schema=PASSAGE)
    context.log.append(write_shards(context.storage, table, PASSAGES_PER_SHARD))
    context.log.append(write_rejects(context.storage, rejects))
    return {
        "num_documents": num_documents,
        "num_passages": len(passages),
        "num_duplicates": sum(reason in DUPLICATES for _, reason, _ in rejects),
        "files_passed_over": dict(corpus.passed_over),
        "records_passed_over": dict(corpus.records_passed_over),
        "icu_version": icu4py.icu_version,  # its dictionaries decide where words end
    }


def cut_corpus(
    corpus: Corpus,
    progress: Callable[[float, float | None, str], None] = lambda *_: None,
    sample: int | None = None,
) -> tuple[list[Passage], list[Reject], int]:
    """Returns a corpus's passages in their order, what was refused, and how many documents it has.

    With `sample` there are at most so many passages, of whole documents but for the last one.

    Raises:
        UserError: No passage is left.
    """
    config = corpus.config
    passages: list[Passage] = []
    rejects: list[Reject] = []
    ids: set[str] = set()
    num_documents = 0
    documents = corpus.documents()
    for document in drawn(documents, sample) if sample else documents:
        num_documents += 1
        if isinstance(document, tuple):
            rejects.append(document)
            continue
        cut = passages_of(document, max_words=config.max_words, min_words=config.min_words)
        if not cut:
            rejects.append((document.name, "empty", document.text[:200]))
        for passage in cut:
            reason = reject_reason(passage.text)
            if reason is None and passage.id in ids:
                reason = DUPLICATE
            if reason is None:
                ids.add(passage.id)
                passages.append(passage)
            else:
                rejects.append((passage.source, reason, passage.text[:200]))
        if sample and len(passages) >= sample:
            del passages[sample:]
            break
        if num_documents % 100 == 0:
            progress(num_documents, None, f"{len(passages)} passages")
    if config.near_duplicate_threshold is not None:
        progress(num_documents, None, "near-duplicates")
        drop = near_duplicates([p.text for p in passages], config.near_duplicate_threshold)
        rejects += [
            (passages[r].source, NEAR_DUPLICATE, passages[r].text[:200]) for r in sorted(drop)
        ]
        passages = [passage for row, passage in enumerate(passages) if row not in drop]
    if not passages:
        raise UserError(
            f"corpus {config.path} gave no passage: {len(rejects)} rejects, the first because"
            f" {rejects[0][1]!r}"
            if rejects
            else f"corpus {config.path} holds no documents"
        )
    return passages, rejects, num_documents


def drawn(documents: Iterable[Document | Reject], num: int) -> list[Document | Reject]:
    """Returns some documents, drawn by a hash of their names, so that more contain the fewer."""

    def draw(document: Document | Reject) -> bytes:
        name = document[0] if isinstance(document, tuple) else document.name
        return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()

    return heapq.nsmallest(num, documents, key=draw)
