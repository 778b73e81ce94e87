"""Batches across requests, and the bound on work that waits.

Requests differ in size by a factor of thousands, so both the batch and the queue are counted in
tokens. Batches are not timed: while the model is busy, whatever arrives is the next batch, so an
idle server answers at once and a busy one fills its batches. Requests take turns text by text, so
a search does not wait behind a bulk upload.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

Rows = Sequence[Sequence[int]]


class QueueFull(Exception):
    """The queue has no room for this request now."""

    def __init__(self, retry_after_s: int, queued_tokens: int) -> None:
        super().__init__(f"{queued_tokens} tokens are waiting")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Waiting:
    """A request whose rows are not all embedded: `order` is what is left, longest row last."""

    rows: Rows
    order: list[int]
    done: "asyncio.Future[None]"
    vectors: np.ndarray
    num_missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_missing = len(self.rows)


class TokenBatcher:
    """Runs one embedding function, one batch at a time, for many concurrent requests.

    All methods belong to one event loop at a time; `embed_rows` runs in a thread of its own.
    """

    def __init__(
        self,
        embed_rows: Callable[[Rows], np.ndarray],
        *,
        dimensions: int,
        batch_tokens: int,
        max_queued_tokens: int,
        on_batch: Callable[[int, int], None] = lambda texts, tokens: None,
    ) -> None:
        """Makes an idle batcher.

        Args:
            embed_rows: Token ids of texts -> float32 `[texts, dimensions]`.
            dimensions: Length of a vector.
            batch_tokens: Tokens in one call of `embed_rows`; a single longer text goes alone.
            max_queued_tokens: Tokens that may wait; one request over it is taken by an idle server.
            on_batch: Told the texts and tokens of each finished batch.
        """
        self._embed_rows = embed_rows
        self._dimensions = dimensions
        self._batch_tokens = batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._on_batch = on_batch
        self._turns: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")
        self._running: asyncio.Task[None] | None = None
        self._tokens_per_s = 1000.0
        self.queued_tokens = 0

    async def embed(self, rows: Rows) -> np.ndarray:
        """Embeds the rows of one request: float32 `[rows, dimensions]`, in their order.

        Raises:
            QueueFull: Other requests hold the queue.
        """
        tokens = sum(len(row) for row in rows)
        if self.queued_tokens and self.queued_tokens + tokens > self._max_queued_tokens:
            wait_s = math.ceil(self.queued_tokens / self._tokens_per_s)
            raise QueueFull(min(max(wait_s, 1), 60), self.queued_tokens)
        if not rows:
            return np.zeros((0, self._dimensions), np.float32)
        waiting = _Waiting(
            rows=rows,
            # Neighbours in length share a batch, which saves padding.
            order=sorted(range(len(rows)), key=lambda row: len(rows[row])),
            done=asyncio.get_running_loop().create_future(),
            vectors=np.empty((len(rows), self._dimensions), np.float32),
        )
        self._turns.append(waiting)
        self.queued_tokens += tokens
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            await waiting.done
        finally:
            self._withdraw(waiting)
        return waiting.vectors

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        # One turn of the loop lets requests that arrived together share the first batch.
        await asyncio.sleep(0)
        while batch := self._take():
            rows = [waiting.rows[row] for waiting, row in batch]
            tokens = sum(len(row) for row in rows)
            began = time.perf_counter()
            try:
                vectors = await loop.run_in_executor(self._thread, self._embed_rows, rows)
                # All before the first is given out: where one is missing, nobody knows which.
                embedded = list(zip(batch, vectors, strict=True))
                speed = tokens / max(time.perf_counter() - began, 1e-6)
                self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * speed
                self._on_batch(len(rows), tokens)
                for (waiting, row), vector in embedded:
                    waiting.vectors[row] = vector
                    waiting.num_missing -= 1
                    if not waiting.num_missing and not waiting.done.done():
                        waiting.done.set_result(None)
            except Exception as error:
                for waiting, _ in batch:
                    if not waiting.done.done():
                        waiting.done.set_exception(error)
            finally:
                self.queued_tokens -= tokens

    def _take(self) -> list[tuple[_Waiting, int]]:
        """Takes the next batch off the queue: one text of each request in turn."""
        batch: list[tuple[_Waiting, int]] = []
        tokens = 0
        while self._turns:
            waiting = self._turns[0]
            size = len(waiting.rows[waiting.order[-1]])
            if batch and tokens + size > self._batch_tokens:
                break
            batch.append((waiting, waiting.order.pop()))
            tokens += size
            self._turns.popleft()
            if waiting.order:
                self._turns.append(waiting)
        return batch

    def _withdraw(self, waiting: _Waiting) -> None:
        """Forgets what is left of a request whose caller is gone."""
        if waiting in self._turns:
            self._turns.remove(waiting)
            self.queued_tokens -= sum(len(waiting.rows[row]) for row in waiting.order)
