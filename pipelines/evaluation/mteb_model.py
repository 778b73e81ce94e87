"""The bridge between an encoder of ours and mteb, which does the measuring.

Retrieval, ranking and every metric stay mteb's own, so that a figure can be held against the
leaderboard; only the encoding is ours.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from pipelines.evaluation.prompts import EvaluationPrompt, evaluation_prompt

# Texts between two calls of `on_progress`; many enough that sorting by length still pays.
CHUNK_TEXTS = 1024


class TextEncoder(Protocol):
    """What evaluation needs of a model: `actors.encoder.Encoder` or an `EndpointEncoder`."""

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        """Returns float32 ``[queries, dimensions]``, unit length."""

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Returns float32 ``[texts, dimensions]``, unit length."""


@contextmanager
def quiet_mteb() -> Iterator[ModuleType]:
    """Imports mteb and keeps it from everything but evaluating.

    mteb talks through logging, warnings and progress bars, makes ``~/.cache/mteb`` when imported
    and seeds the global random generators whenever it makes a task. Inside this block the console
    stays silent, no folder is made, and the generators are put back at the end, so that an
    evaluation in the middle of training does not change the training.

    Yields:
        The mteb module (its import takes about 4 s, hence not at the top of a file).
    """
    import torch
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    own_cache = "mteb" not in sys.modules and "MTEB_CACHE" not in os.environ
    if own_cache:
        os.environ["MTEB_CACHE"] = tempfile.gettempdir()
    try:
        import datasets
        import mteb
    finally:
        if own_cache:
            del os.environ["MTEB_CACHE"]
    loggers = [
        logging.getLogger(name)
        for name in ("mteb", "datasets", "huggingface_hub", "sentence_transformers")
    ]
    levels = [each.level for each in loggers]
    bars_were_off = datasets.are_progress_bars_disabled()
    # mteb seeds NumPy's old global generator, which therefore is the one to put back.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for each in loggers:
        each.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # Several of mteb's tasks show bars whatever they are told.
    tqdm_init = tqdm.__init__
    tqdm.__init__ = partialmethod(tqdm_init, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield mteb
    finally:
        tqdm.__init__ = tqdm_init
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        if not bars_were_off:
            datasets.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class MtebEncoder:
    """An encoder as mteb's ``EncoderProtocol`` wants it.

    Attributes:
        num_passages: Texts encoded as passages so far.
        passages_s: Seconds spent in encoding those, and in nothing else.
        mteb_model_meta: mteb's description of the model.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        name: str,
        prompt: EvaluationPrompt | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Wraps an encoder.

        Args:
            encoder: The model.
            name: Shown in mteb's results.
            prompt: Gecko's for the benchmark if None.
            on_progress: Called with the number of texts just encoded.
        """
        from mteb.models.model_meta import ModelMeta

        self._encoder = encoder
        self._prompt = prompt
        self._on_progress = on_progress or (lambda num_texts: None)
        self.num_passages = 0
        self.passages_s = 0.0
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"tokay/{name}", "revision": "local"}
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **encode_kwargs: Any,
    ) -> np.ndarray:
        """Embeds the texts of a data loader: float32 ``[texts, dimensions]``."""
        prompt = self._prompt or evaluation_prompt(task_metadata.type, task_metadata.name)
        as_passages = prompt_type is not None and prompt_type.value == "document"
        if prompt.symmetric or not as_passages:
            queries = [text for batch in inputs for text in batch["text"]]
            return self._in_chunks(
                len(queries),
                lambda part: self._encoder.encode_queries(queries[part], task=prompt.task),
            )
        titles: list[str] = []
        texts: list[str] = []
        for batch in inputs:
            body = batch.get("body", batch["text"])
            texts += body
            titles += batch.get("title", [""] * len(body))
        encode = self._passage_encoding(texts, titles)
        started = time.perf_counter()
        vectors = self._in_chunks(len(texts), encode)
        self.passages_s += time.perf_counter() - started
        self.num_passages += len(texts)
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Returns the cosines ``[n, m]`` of unit-length ``[n, d]`` and ``[m, d]``."""
        first, second = (np.atleast_2d(np.asarray(each)) for each in (embeddings1, embeddings2))
        return np.asarray(first @ second.T)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Returns the cosines ``[n]`` of unit-length ``[n, d]`` and ``[n, d]``."""
        return np.asarray((np.asarray(embeddings1) * np.asarray(embeddings2)).sum(-1))

    def _passage_encoding(
        self, texts: list[str], titles: list[str]
    ) -> Callable[[slice], np.ndarray]:
        templates = getattr(self._encoder, "templates", None)
        if templates is None or "{title}" in templates.passage:
            return lambda part: self._encoder.encode_passages(texts[part], titles[part])
        # mteb gives a model without a place for titles the title in front of the text.
        joined = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
        return lambda part: self._encoder.encode_passages(joined[part])

    def _in_chunks(self, num_texts: int, encode: Callable[[slice], np.ndarray]) -> np.ndarray:
        vectors = []
        for start in range(0, num_texts, CHUNK_TEXTS):
            vectors.append(encode(slice(start, start + CHUNK_TEXTS)))
            self._on_progress(len(vectors[-1]))
        return np.concatenate(vectors)
