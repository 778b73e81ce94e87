"""Ray actors that hold a copy of one encoder each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np

from actors.text_encoder import CHUNK_TEXTS, Text, TextEncoder
from cluster.errors import UserError
from cluster.session import connect

# Chunks for each actor: more keep all busy to the end, fewer cost less on the way.
_CHUNKS_EACH = 8
_MIN_CHUNK_TEXTS = 16


class EncoderActors(TextEncoder):
    """Ray actors with a copy of an encoder each: a core, or a GPU where the cluster has any."""

    def __init__(self, load: Callable[[], TextEncoder], num_actors: int) -> None:
        """Starts actors that each `load`, on the cluster of RAY_ADDRESS or on this machine.

        Raises:
            UserError: The cluster has fewer cores or GPUs than actors.
        """
        import ray

        resources = connect()
        there, what = (
            (resources.num_gpus, "GPUs") if resources.num_gpus else (resources.num_cpus, "cores")
        )
        if not 1 <= num_actors <= there:
            raise UserError(
                f"{num_actors} actors: the cluster has {there} {what}; ask for 1 to {there}"
            )
        remote: Any = ray.remote(
            num_cpus=1,
            num_gpus=1 if resources.num_gpus else 0,
            max_restarts=2,
            max_task_retries=2,
        )(_EncoderActor)
        self._actors = [remote.remote(load) for _ in range(num_actors)]

    @cached_property
    def _description(self) -> dict[str, Any]:
        import ray

        described: dict[str, Any] = ray.get(self._actors[0].describe.remote())
        if reason := described.get("error"):
            raise UserError(reason)
        return described

    @property
    def fingerprint(self) -> str | None:
        """The encoder's."""
        return cast("str | None", self._description["fingerprint"])

    @property
    def dimensions(self) -> int | None:
        """The encoder's."""
        return cast("int | None", self._description["dimensions"])

    @property
    def num_parameters(self) -> int | None:
        """The encoder's."""
        return cast("int | None", self._description["num_parameters"])

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        """Returns float32 ``[queries, dimensions]``, unit length."""
        return self._encode([Text(query, task) for query in queries])

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Returns float32 ``[texts, dimensions]``, unit length."""
        pairs = zip(texts, titles or [None] * len(texts), strict=True)
        return self._encode([Text(text, None, title) for text, title in pairs])

    def encode_chunks(self, texts: Sequence[Text]) -> Iterator[tuple[Sequence[Text], np.ndarray]]:
        """Yields texts of one role and task with their vectors as an actor is done with them."""
        from ray.util import ActorPool

        share = math.ceil(len(texts) / (_CHUNKS_EACH * len(self._actors)))
        size = min(CHUNK_TEXTS, max(_MIN_CHUNK_TEXTS, share))
        chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
        results = ActorPool(self._actors).map_unordered(
            lambda actor, work: actor.encode.remote(*work), list(enumerate(chunks))
        )
        for number, vectors in results:
            yield chunks[number], np.array(vectors)  # a copy: the object store is small

    def close(self) -> None:
        """Ends the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _encode(self, texts: list[Text]) -> np.ndarray:
        vectors: dict[Text, np.ndarray] = {}
        for chunk, rows in self.encode_chunks(texts):
            vectors |= zip(chunk, rows, strict=True)
        return np.stack([vectors[text] for text in texts])


class _EncoderActor:
    """One copy of the encoder, on one core (what Ray gives it) or one GPU."""

    def __init__(self, load: Callable[[], TextEncoder]) -> None:
        import torch

        torch.set_num_threads(1)
        self._error = ""
        try:
            self._encoder = load()
        except UserError as error:  # `describe` gives it: of a constructor's, Ray keeps a traceback
            self._error = str(error)

    def describe(self) -> dict[str, Any]:
        if self._error:
            return {"error": self._error}
        return {
            name: getattr(self._encoder, name)
            for name in ("dimensions", "num_parameters", "fingerprint")
        }

    def encode(self, number: int, texts: Sequence[Text]) -> tuple[int, np.ndarray]:
        return number, self._encoder.encode_texts(texts)
