"""The bridge between an encoder of ours and mteb, which does the measuring.

Retrieval, ranking and every metric stay mteb's own, so that a figure can be held against the
leaderboard; only the encoding is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.text_encoder import Text, TextEncoder
from actors.vectors import BrokenVectors, shorten
from cluster.errors import UserError
from pipelines.evaluation.prompts import EvaluationPrompt, evaluation_prompt


def check_dimensions(asked: int | None, there: int | None) -> None:
    """Raises UserError where a model has fewer dimensions than its vectors are to be cut to."""
    if asked and there and asked > there:
        raise UserError(
            f"{asked} dimensions are asked for: the model has {there} dimensions; ask for no more"
        )


class TextVectors:
    """Encodes each distinct text once, long ones first so that batches are of one length.

    Attributes:
        num_texts: Encoded so far.
        seconds_s: Spent in encoding those.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        keep: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Wraps an encoder.

        Args:
            encoder: The model.
            keep: Remember the vectors, for texts that come again.
            on_progress: Called with the number of texts just encoded.
        """
        self.encoder = encoder
        self._keep = keep
        self._known: dict[Text, np.ndarray] = {}
        self._on_progress = on_progress or (lambda num_texts: None)
        self.num_texts = 0
        self.seconds_s = 0.0

    def __call__(self, texts: Sequence[Text]) -> np.ndarray:
        """Returns float32 ``[texts, dimensions]``, in the order given."""
        new = sorted({each for each in texts if each not in self._known}, key=_length, reverse=True)
        self._on_progress(len(texts) - len(new))
        started = time.perf_counter()
        for chunk, vectors in self.encoder.encode_chunks(new):
            self._known |= zip(chunk, vectors, strict=True)
            self._on_progress(len(chunk))
        self.seconds_s += time.perf_counter() - started
        self.num_texts += len(new)
        vectors = np.stack([self._known[each] for each in texts])
        if not self._keep:
            self._known.clear()
        return vectors


def _length(text: Text) -> tuple[int, Text]:
    # The text itself makes the order, and so the batches, the same in every run.
    return len(text.text) + len(text.title or ""), text


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model a result is of.

    Attributes:
        name: Shown in tables.
        revision: Hash of weights, tokenizer and prompts; None where that cannot be known.
        num_parameters: None where that cannot be known.
        training_sets: Names of the data sets that it was trained on.
    """

    name: str
    revision: str | None = None
    num_parameters: int | None = None
    training_sets: tuple[str, ...] = ()


class MtebEncoder:
    """An encoder as mteb's ``EncoderProtocol`` wants it.

    Attributes:
        dimensions: Length of the vectors; 0 before the first are made.
        mteb_model_meta: mteb's description of the model.
    """

    def __init__(
        self,
        vectors: TextVectors,
        *,
        model: ModelIdentity,
        prompt: EvaluationPrompt | None = None,
        dimensions: int | None = None,
        experiment: Mapping[str, object] | None = None,
    ) -> None:
        """Wraps an encoder.

        Args:
            vectors: Of the encoder.
            model: What mteb's results say of it.
            prompt: Gecko's for the benchmark if None.
            dimensions: Cut the vectors to these and make them of unit length again.
            experiment: What of the evaluation, other than the model, changes the scores.
        """
        from mteb.models.model_meta import ModelMeta

        self._vectors = vectors
        self._prompt = prompt
        self._cut = dimensions
        self.dimensions = 0
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": model.name if "/" in model.name else f"tokay/{model.name}",
                "revision": model.revision or "unknown",
                "n_parameters": model.num_parameters,
                "embed_dim": dimensions,
                "training_datasets": set(model.training_sets) or None,
                "experiment_kwargs": dict(experiment) if experiment else None,
            }
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
        """Embeds the texts of a data loader: float32 ``[texts, dimensions]``.

        Raises:
            UserError: The vectors are too short to be cut, or no numbers (`BrokenVectors`).
        """
        prompt = self._prompt or evaluation_prompt(task_metadata.type, task_metadata.name)
        as_passages = prompt_type is not None and prompt_type.value == "document"
        texts: list[Text] = []
        for batch in inputs:
            if prompt.symmetric or not as_passages:
                texts += [Text(text, prompt.task) for text in batch["text"]]
            else:
                bodies = batch.get("body", batch["text"])
                titles = batch.get("title", [""] * len(bodies))
                texts += [
                    Text(body, None, title) for body, title in zip(bodies, titles, strict=True)
                ]
        vectors = self._vectors(texts)
        check_dimensions(self._cut, vectors.shape[1])
        if not np.isfinite(vectors).all():
            raise BrokenVectors(
                f"the model {self.mteb_model_meta.name} gives vectors that are no numbers (NaN or "
                "infinite): its weights are broken, or overflow in this precision"
            )
        if self._cut is not None:
            vectors = shorten(vectors, self._cut)
        self.dimensions = vectors.shape[1]
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Returns the cosines ``[n, m]`` of unit-length ``[n, d]`` and ``[m, d]``."""
        first, second = (np.atleast_2d(np.asarray(each)) for each in (embeddings1, embeddings2))
        return np.asarray(first @ second.T)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Returns the cosines ``[n]`` of unit-length ``[n, d]`` and ``[n, d]``."""
        return np.asarray((np.asarray(embeddings1) * np.asarray(embeddings2)).sum(-1))
