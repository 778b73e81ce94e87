"""Both scores of (query, passage) pairs from one prefill each, over vLLM's prefix cache.

vLLM keeps whole blocks of a prompt's beginning, and log-probabilities of prompt tokens come back
for what was not kept. Its two model runners return them differently, and V2 returns nothing where
more was kept than a request starts from. So what pairs share beyond their context, the rest of its
last block, is read by a request of its own, and what came back is always checked.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

_MAX_LABELS = 128  # vLLM's own limit of `logprob_token_ids`

Ask = Callable[[list[int], "SamplingParams"], Awaitable[Any]]
# A request's output and log P of the tokens it was asked for, None where they did not come back.
_Answer = tuple[Any, list[float] | None]


@dataclass(frozen=True, kw_only=True)
class ScoringPrompt:
    """One (query, passage) pair, laid out for both scores or one of them.

    The model reads ``context + query + question`` and answers with a label. The parts are
    tokenised apart, so a space between two parts belongs to the beginning of the later one.

    Attributes:
        context: Few-shot examples and the passage, ending right before the query.
        query: The text whose likelihood is measured, with its leading space.
        question: What follows the query, ending right before the label.
        labels: What may follow, with leading spaces, and the relevance in 0..1 that each stands
            for. Only a label's first token counts. None: the relevance is not asked for.
        likelihood: Whether the query's likelihood is asked for.
    """

    context: str
    query: str
    question: str = ""
    labels: tuple[tuple[str, float], ...] = ()
    likelihood: bool = True


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """The teacher's scores of one pair, natural logarithms.

    A score is None when it was not asked for, or ``error`` is set.

    The tokens that are not cached, added up over all pairs, are those that the engine computed.

    Attributes:
        ql: Mean log P(q_t | q_<t, context) over the query's tokens (Gecko, section 3).
        rc: log of the labels' mean relevance by their probabilities, P(label | context, query,
            question) normalised over the labels; of two labels with relevance 1 and 0 this is
            Gecko's log P(relevant).
    """

    ql: float | None = None
    rc: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None


def joined(scores: Sequence[PairScore]) -> PairScore:
    """Returns one pair's scores of several prompts as one; an error of any is the error of all."""
    error = next((score.error for score in scores if score.error), None)
    ql, rc = (
        None if error else next((each for each in found if each is not None), None)
        for found in ([score.ql for score in scores], [score.rc for score in scores])
    )
    return PairScore(
        ql=ql,
        rc=rc,
        num_prompt_tokens=sum(score.num_prompt_tokens for score in scores),
        num_cached_tokens=sum(score.num_cached_tokens for score in scores),
        error=error,
    )


@dataclass(frozen=True, kw_only=True)
class PairTokens:
    """A scoring prompt's tokens; `labels` are token ids with their relevance."""

    context: tuple[int, ...]
    query: tuple[int, ...]
    question: tuple[int, ...]
    labels: dict[int, float]
    likelihood: bool = True

    @property
    def all(self) -> list[int]:
        """The whole prompt."""
        return [*self.context, *self.query, *self.question]


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What a request for the beginning that pairs share has returned.

    Attributes:
        num_computed: How many of its tokens were not in the cache.
        log_p: Of its own tokens after the context, or None where they did not come back.
        following: log P of tokens that may follow it.
    """

    num_computed: int
    log_p: list[float] | None
    following: dict[int, float]


class PairScorer:
    """Scores pairs over a prefix cache, on either of vLLM's model runners."""

    def __init__(self, ask: Ask, *, on_v2: bool, block_size: int) -> None:
        """Takes `ask`, which sends prompt tokens with their parameters and returns vLLM's output.

        `block_size` counts the tokens in a block of its cache.
        """
        self._send = ask
        self._on_v2 = on_v2
        self._block_size = block_size

    async def score(self, pairs: Sequence[PairTokens]) -> list[PairScore]:
        """Scores pairs, given context by context, in one prefill each."""
        following: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for pair in (pair for pair in pairs if pair.likelihood):
            following[self._head(pair)] += pair.query[self._num_shared(pair) :][:1]
        readings: dict[tuple[int, ...], asyncio.Task[_Reading]] = {}
        scores: list[asyncio.Task[PairScore]] = []
        used: list[list[asyncio.Task[_Reading]]] = []
        # Requests reach the engine in this order; a pair finds its context in the cache even
        # when both run in one step.
        for pair in pairs:
            context, head = pair.context, self._head(pair)
            wanted: list[tuple[int, ...]] = []
            if pair.likelihood and not self._on_v2:
                # V1 would compute the log-probabilities of the whole context with its first pair.
                wanted.append(context)
            if pair.likelihood and (head == context or len(following[head]) > 1):
                wanted.append(head)
            for beginning in wanted:
                if beginning not in readings:
                    tokens = following[head] if beginning == head else []
                    reading = self._read(beginning, len(context), sorted(set(tokens)))
                    readings[beginning] = asyncio.create_task(reading)
            used.append([readings[beginning] for beginning in dict.fromkeys(wanted)])
            head_reading = readings[head] if head in wanted else None
            scores.append(asyncio.create_task(self._score(pair, head_reading)))
        await asyncio.gather(*readings.values(), *scores)
        return _with_readings([score.result() for score in scores], used)

    async def score_separately(self, pairs: Sequence[PairTokens]) -> list[PairScore]:
        """Scores pairs with a prompt for each score, and computes every token of both."""
        return list(await asyncio.gather(*map(self._score_separately, pairs)))

    def _num_shared(self, pair: PairTokens) -> int:
        """Returns how many of the query's tokens lie in one block with its context's last ones."""
        return min(-len(pair.context) % self._block_size, len(pair.query))

    def _head(self, pair: PairTokens) -> tuple[int, ...]:
        """Returns the tokens up to the first end of a block that is not within the context.

        A pair that shares its head with another finds it in the cache, but not the state that
        predicts the query's first tokens.
        """
        return pair.context + pair.query[: self._num_shared(pair)]

    async def _read(
        self, head: tuple[int, ...], num_context: int, following: list[int]
    ) -> _Reading:
        computed = 0
        log_p: list[float] | None = None
        by_token: dict[int, float] = {}
        for start in range(0, max(1, len(following)), _MAX_LABELS):
            labels = following[start : start + _MAX_LABELS]
            output, head_log_p = await self._ask(
                list(head), start=num_context, wanted=head[num_context:], labels=labels
            )
            log_p = head_log_p if start == 0 else log_p
            computed += len(head) - int(output.num_cached_tokens or 0)
            by_token |= {label: output.outputs[0].logprobs[0][label].logprob for label in labels}
        return _Reading(num_computed=computed, log_p=log_p, following=by_token)

    async def _score(self, pair: PairTokens, reading: asyncio.Task[_Reading] | None) -> PairScore:
        read: list[float] = []
        if reading is not None:
            shared, next_ = await reading, pair.query[self._num_shared(pair) :][:1]
            if shared.log_p is not None:
                read = shared.log_p + [shared.following[token] for token in next_]
        start, wanted = len(pair.context) + len(read), pair.query[len(read) :]
        if not pair.likelihood:
            wanted = ()
        # Nothing comes back where more was in the cache than the start (the same pair again, or a
        # request that was preempted). Then everything is computed.
        for cached in (True, False):
            output, log_p = await self._ask(
                pair.all, start=start, wanted=wanted, labels=list(pair.labels), cached=cached
            )
            if log_p is not None:
                break
        return _pair_score(pair, output, None if log_p is None else read + log_p)

    async def _score_separately(self, pair: PairTokens) -> PairScore:
        output, log_p, num_tokens = None, None, 0
        if pair.labels:
            output = await self._send(pair.all, _params(labels=list(pair.labels), cached=False))
            num_tokens += len(pair.all)
        if pair.likelihood:
            tokens = [*pair.context, *pair.query]
            params = _params(labels=[], cached=False, prompt_logprobs=True)
            alone = await self._send(tokens, params)
            num_tokens += len(tokens)
            # With nothing cached a row is a token's place; the fast way counts otherwise, and is
            # checked against this.
            flat = alone.prompt_logprobs
            if len(flat or ()) == len(tokens):
                log_p = [flat.logprobs[place] for place in flat.start_indices[len(pair.context) :]]
            output = output or alone
        return replace(_pair_score(pair, output, log_p), num_prompt_tokens=num_tokens)

    async def _ask(
        self,
        tokens: list[int],
        *,
        start: int,
        wanted: Sequence[int],
        labels: list[int],
        cached: bool = True,
    ) -> _Answer:
        """Asks for log P of the `wanted` tokens, which stand from `start` on, and of labels."""
        if self._on_v2:
            params = _params(labels=labels, cached=cached)
            if wanted:
                # The LM head computes nothing for the tokens before; -1 asks for nothing.
                rows = np.full((len(tokens) - start, 1), -1, np.int64)
                rows[: len(wanted), 0] = wanted
                params.prompt_logprob_token_ids, params.prompt_logprob_start = rows, start - 1
            output = await self._send(tokens, params)
            if not wanted:
                return output, []
            returned = output.prompt_token_id_logprobs
            return output, None if returned is None else returned[: len(wanted), 0].tolist()
        params = _params(labels=labels, cached=cached, prompt_logprobs=bool(wanted))
        output = await self._send(tokens, params)
        if not wanted:
            return output, []
        if (output.num_cached_tokens or 0) >= start:  # V1 returns uninitialised memory for them
            return output, None
        return output, _last_log_p(output.prompt_logprobs, wanted, len(tokens) - start)


def _with_readings(
    scores: list[PairScore], used: list[list[asyncio.Task[_Reading]]]
) -> list[PairScore]:
    """Counts what each reading computed with the first pair that used it."""
    counted: set[asyncio.Task[_Reading]] = set()
    rows = []
    for score, readings in zip(scores, used, strict=True):
        new = [reading for reading in readings if reading not in counted]
        counted.update(new)
        computed = sum(reading.result().num_computed for reading in new)
        rows.append(replace(score, num_cached_tokens=score.num_cached_tokens - computed))
    return rows


def _pair_score(pair: PairTokens, output: Any, log_p: list[float] | None) -> PairScore:
    num_tokens = len(pair.all)
    ql = rc = None
    if pair.likelihood:
        if log_p is None:
            return PairScore(
                error="the engine returned no log-probabilities of the query's tokens",
                num_prompt_tokens=num_tokens,
            )
        ql = sum(log_p) / len(pair.query)
    if pair.labels:
        answer = output.outputs[0].logprobs[0]
        rc = mean_relevance([(answer[token].logprob, w) for token, w in pair.labels.items()])
    if not all(math.isfinite(score) for score in (ql, rc) if score is not None):
        return PairScore(
            error=f"the model's log-probabilities are not finite (QL {ql}, RC {rc})",
            num_prompt_tokens=num_tokens,
        )
    return PairScore(
        ql=ql,
        rc=rc,
        num_prompt_tokens=num_tokens,
        num_cached_tokens=output.num_cached_tokens or 0,
    )


def mean_relevance(labels: Sequence[tuple[float, float]]) -> float:
    """Returns log sum(w P) - log sum(P) over (log P, w), exact however small a P is."""
    highest = max(log_p for log_p, _ in labels)
    weighted = [log_p + math.log(weight) for log_p, weight in labels if weight > 0]
    if not weighted or not math.isfinite(highest):
        return -math.inf
    top = max(weighted)
    return (
        top
        + math.log(sum(math.exp(value - top) for value in weighted))
        - highest
        - math.log(sum(math.exp(log_p - highest) for log_p, _ in labels))
    )


def _last_log_p(prompt: Any, wanted: Sequence[int], rest: int) -> list[float] | None:
    """Reads log P of some of a prompt's tokens from its rows, counted from their end.

    V1 returns a row for every token, V2 one for each that was not cached; both end with the last
    token. The row at the very beginning stands for a token that nothing predicts.

    Args:
        prompt: vLLM's flat log-probabilities of a prompt.
        wanted: The tokens.
        rest: How many tokens the prompt has from the first of them to its end.

    Returns:
        One for each token, or None where they did not come back.
    """
    first = len(prompt or ()) - rest
    if first < 1:
        return None
    places = prompt.start_indices[first : first + len(wanted)]
    if [prompt.token_ids[place] for place in places] != list(wanted):
        return None
    return [prompt.logprobs[place] for place in places]


def _params(*, labels: list[int], cached: bool, prompt_logprobs: bool = False) -> SamplingParams:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0 if prompt_logprobs else None,
        skip_reading_prefix_cache=not cached,  # vLLM's default is to recompute the whole prompt
        logprob_token_ids=labels or None,
        flat_logprobs=True,
        detokenize=False,  # the ids at cached positions are uninitialised memory
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
