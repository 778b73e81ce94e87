import asyncio
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from serving.batching import QueueFull, TokenBatcher

Rows = Sequence[Sequence[int]]


class Recorder:
    """Embeds a row as [its sum, its length], and notes each batch."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []

    def __call__(self, rows: Rows) -> np.ndarray:
        self.batches.append([list(row) for row in rows])
        if any(-1 in row for row in rows):
            raise RuntimeError("bad row")
        return np.array([[sum(row), len(row)] for row in rows], np.float32)


def batcher(embed: Recorder, batch_tokens: int = 10, max_queued_tokens: int = 1000) -> TokenBatcher:
    return TokenBatcher(
        embed, dimensions=2, batch_tokens=batch_tokens, max_queued_tokens=max_queued_tokens
    )


def test_rows_come_back_in_their_order() -> None:
    async def run() -> np.ndarray:
        return await batcher(Recorder()).embed([[1], [2, 3, 4, 5], [6, 7], [8] * 30, [9]])

    expected = [[1, 1], [14, 4], [13, 2], [240, 30], [9, 1]]
    np.testing.assert_array_equal(asyncio.run(run()), expected)


def test_concurrent_requests_share_batches_within_the_token_budget() -> None:
    embed = Recorder()

    async def run() -> list[np.ndarray]:
        ours = batcher(embed)
        return await asyncio.gather(*(ours.embed([[n, n]]) for n in range(12)))

    answers = asyncio.run(run())
    assert [answer[0, 0] for answer in answers] == [2 * n for n in range(12)]
    assert [len(batch) for batch in embed.batches] == [5, 5, 2]


def test_text_over_the_budget_goes_alone() -> None:
    embed = Recorder()

    async def run() -> None:
        await batcher(embed).embed([[1] * 3, [2] * 25, [3] * 3])

    asyncio.run(run())
    assert [[len(row) for row in batch] for batch in embed.batches] == [[25], [3, 3]]


def test_small_request_does_not_wait_behind_a_large_one() -> None:
    embed = Recorder()
    finished: list[str] = []

    async def ask(ours: TokenBatcher, name: str, rows: Rows) -> None:
        await ours.embed(rows)
        finished.append(name)

    async def run() -> None:
        ours = batcher(embed)
        large = asyncio.create_task(ask(ours, "large", [[1] * 5] * 100))
        await asyncio.sleep(0)
        await asyncio.gather(large, ask(ours, "small", [[2] * 5]))

    asyncio.run(run())
    assert finished == ["small", "large"]
    assert any(2 in row for batch in embed.batches[:2] for row in batch)


def test_full_queue_refuses_but_an_idle_server_takes_any_size() -> None:
    async def run() -> tuple[object, np.ndarray, int]:
        ours = batcher(Recorder(), max_queued_tokens=20)
        first = asyncio.create_task(ours.embed([[1] * 10] * 5))
        await asyncio.sleep(0)
        (late,) = await asyncio.gather(ours.embed([[1]]), return_exceptions=True)
        return late, await first, ours.queued_tokens

    late, vectors, left = asyncio.run(run())
    assert isinstance(late, QueueFull)
    assert late.retry_after_s >= 1
    assert vectors.shape == (5, 2)
    assert left == 0


@pytest.mark.parametrize(
    ("queued", "retry_after_s"), [(1, 1), (1000, 1), (1001, 2), (59_001, 60), (10**6, 60)]
)
def test_refused_request_is_told_when_the_queue_may_be_empty(
    queued: int, retry_after_s: int
) -> None:
    async def run() -> object:
        ours = batcher(Recorder(), max_queued_tokens=1)
        first = asyncio.create_task(ours.embed([[1] * queued]))
        await asyncio.sleep(0)
        (late,) = await asyncio.gather(ours.embed([[1]]), return_exceptions=True)
        await first
        return late

    late = asyncio.run(run())
    assert isinstance(late, QueueFull)
    assert (late.retry_after_s, str(late)) == (retry_after_s, f"{queued} tokens are waiting")


def test_time_to_wait_follows_the_speed_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("serving.batching.time.perf_counter", lambda: next(clock) / 10)

    async def run() -> object:
        ours = batcher(Recorder(), max_queued_tokens=1)
        await ours.embed([[1] * 400])  # 4000 a second; a fifth of that counts: 1600
        first = asyncio.create_task(ours.embed([[1] * 4801]))
        await asyncio.sleep(0)
        (late,) = await asyncio.gather(ours.embed([[1]]), return_exceptions=True)
        await first
        return late

    late = asyncio.run(run())
    assert isinstance(late, QueueFull) and late.retry_after_s == 4


def test_queue_takes_as_many_tokens_as_it_may_hold() -> None:
    async def run() -> list[object]:
        ours = batcher(Recorder(), max_queued_tokens=10)
        tasks = [asyncio.create_task(ours.embed([[n] * 5])) for n in (1, 2)]
        await asyncio.sleep(0)
        assert ours.queued_tokens == 10
        return await asyncio.gather(*tasks, ours.embed([[3]]), return_exceptions=True)

    first, second, third = asyncio.run(run())
    np.testing.assert_array_equal([first, second], [[[5, 5]], [[10, 5]]])  # type: ignore[arg-type]
    assert isinstance(third, QueueFull)


def test_finished_batches_are_told_and_vectors_are_float32() -> None:
    finished: list[tuple[int, int]] = []

    async def run() -> np.ndarray:
        ours = TokenBatcher(
            Recorder(),
            dimensions=2,
            batch_tokens=6,
            max_queued_tokens=100,
            on_batch=lambda texts, tokens: finished.append((texts, tokens)),
        )
        return await ours.embed([[1] * 2, [1] * 4, [1] * 3, [1]])

    vectors = asyncio.run(run())
    assert finished == [(1, 4), (3, 6)]
    assert (vectors.dtype, vectors.tolist()) == (np.float32, [[2, 2], [4, 4], [3, 3], [1, 1]])


def test_cancelled_request_leaves_the_queue() -> None:
    embed = Recorder()

    async def run() -> int:
        ours = batcher(embed)
        gone = asyncio.create_task(ours.embed([[7] * 10] * 50))
        stays = asyncio.create_task(ours.embed([[1]]))
        await asyncio.sleep(0)
        gone.cancel()
        np.testing.assert_array_equal(await stays, [[1, 1]])
        await asyncio.sleep(0.05)
        return ours.queued_tokens

    assert asyncio.run(run()) == 0
    assert sum(7 in row for batch in embed.batches for row in batch) <= 1


def test_failing_batch_fails_its_requests_and_no_others() -> None:
    async def run() -> tuple[object, object, np.ndarray, int]:
        ours = batcher(Recorder())
        bad = asyncio.create_task(ours.embed([[-1] * 10] * 3))
        good = asyncio.create_task(ours.embed([[1] * 10]))
        answers = await asyncio.gather(bad, good, return_exceptions=True)
        return *answers, await ours.embed([[5]]), ours.queued_tokens

    bad, good, later, left = asyncio.run(run())
    assert isinstance(bad, RuntimeError)
    np.testing.assert_array_equal(good, [[10, 10]])  # type: ignore[arg-type]
    np.testing.assert_array_equal(later, [[5, 1]])
    assert left == 0


@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (2, 5)])
def test_vectors_of_another_shape_fail_the_requests_that_wait_for_them(
    shape: tuple[int, int],
) -> None:
    async def run() -> tuple[list[object], int]:
        ours = TokenBatcher(
            lambda rows: np.zeros(shape, np.float32),
            dimensions=2,
            batch_tokens=10,
            max_queued_tokens=100,
        )
        requests = asyncio.gather(ours.embed([[1]]), ours.embed([[2]]), return_exceptions=True)
        return await asyncio.wait_for(requests, 5), ours.queued_tokens

    answers, left = asyncio.run(run())
    assert [type(answer) for answer in answers] == [ValueError, ValueError]
    assert left == 0


def test_batcher_works_on_one_event_loop_after_another() -> None:
    ours = batcher(Recorder())
    for _ in range(2):
        np.testing.assert_array_equal(asyncio.run(ours.embed([[4, 4]])), [[8, 2]])


@pytest.mark.parametrize("rows", [[], ()])
def test_no_rows_give_no_vectors(rows: Rows) -> None:
    vectors = asyncio.run(batcher(Recorder()).embed(rows))
    assert (vectors.shape, vectors.dtype) == ((0, 2), np.float32)
