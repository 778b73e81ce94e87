"""Query likelihoods from what vLLM's two model runners return, with V2's own code on the CPU.

V2 needs Triton. Here its class for prompt log-probabilities works with its three kernels replaced
by torch, over a model whose logits depend on the last token alone, and vLLM's own processor makes
of its tensors what a request gets. V1's rows are made by hand in the shape that it returns.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import vllm.v1.worker.gpu.sample.prompt_logprob as v2
from vllm.logprobs import create_prompt_logprobs
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from actors.language_model import LanguageModel
from actors.pair_scores import PairScore, PairScorer, ScoringPrompt, joined
from actors.score_check import check_scores
from cluster.errors import ScoresDiffer

VOCABULARY, BLOCK, YES, NO = 50, 16, 0, 1
# Log-probabilities of the next token, by the last one.
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(
    -1
)
LABELS = ((str(YES), 1.0), (str(NO), 0.0))


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton would compute, in torch."""

    def next_ids(num: int, starts: Any, mapping: Any, computed: Any, ids: Any) -> torch.Tensor:
        out = torch.empty(num, dtype=torch.int64)
        for place, row in enumerate(mapping.tolist()):
            start, end = int(starts[place]), int(starts[place + 1])
            first = int(computed[row]) + 1
            out[start:end] = ids[row, first : first + end - start]
        return out

    def scores(ids: torch.Tensor, hidden: torch.Tensor, logits_fn: Any, *_: Any) -> Any:
        ids = ids.unsqueeze(-1)
        found = logits_fn(hidden).log_softmax(-1).gather(-1, ids)
        return ids, found, torch.ones(len(ids), dtype=torch.int64)

    monkeypatch.setattr(v2, "get_prompt_logprobs_token_ids", next_ids)
    monkeypatch.setattr(v2, "compute_prompt_logprobs_with_chunking", scores)
    monkeypatch.setattr(
        v2, "compute_token_logprobs", lambda logits, ids: logits.log_softmax(-1).gather(-1, ids)
    )
    monkeypatch.setattr(
        v2,
        "async_tensor_h2d",
        lambda array, device, dtype=None: torch.from_numpy(array).to(dtype),
    )


class Engine:
    """A prefix cache in whole blocks, and one runner's way with prompt log-probabilities.

    Attributes:
        preempted_at: A prefill is thrown out after so many tokens, and resumed from the cache.
        computed: Tokens that went through the model.
        rows: Rows that the LM head computed for prompt log-probabilities.
    """

    def __init__(self, runner: str, preempted_at: int | None = None) -> None:
        self.vllm_config = SimpleNamespace(
            use_v2_model_runner=runner == "v2",
            cache_config=SimpleNamespace(block_size=BLOCK),
            model_config=SimpleNamespace(dtype=torch.float32, quantization=None),
        )
        self.preempted_at = preempted_at
        self.computed = self.rows = 0
        self._cache: set[tuple[int, ...]] = set()

    async def generate(self, prompt: Any, params: Any, _: str) -> AsyncIterator[Any]:
        tokens = list(prompt["prompt_token_ids"])
        cached = 0 if params.skip_reading_prefix_cache else self._num_cached(tokens)
        spans = [(cached, len(tokens))]
        if self.preempted_at is not None and cached < self.preempted_at < len(tokens):
            self._remember(tokens[: self.preempted_at])
            again = 0 if params.skip_reading_prefix_cache else self._num_cached(tokens)
            spans = [(cached, self.preempted_at), (again, len(tokens))]
        self._remember(tokens)
        self.computed += sum(end - start for start, end in spans)
        rows = prompt_logprobs = None
        if params.prompt_logprob_token_ids is not None:
            assert self.vllm_config.use_v2_model_runner  # V1 refuses them
            expected = max(len(tokens) - 1 - (params.prompt_logprob_start or 0), 0)
            assert len(params.prompt_logprob_token_ids) == expected > 0
        if self.vllm_config.use_v2_model_runner:
            rows, prompt_logprobs = self._v2(tokens, spans, params)
        elif params.prompt_logprobs is not None:
            prompt_logprobs = self._v1(tokens, cached)
        label = TABLE[tokens[-1]]
        asked = {
            id_: SimpleNamespace(logprob=float(label[id_]))
            for id_ in params.logprob_token_ids or []
        }
        yield SimpleNamespace(
            num_cached_tokens=cached,
            prompt_logprobs=prompt_logprobs,
            prompt_token_id_logprobs=rows,
            outputs=[SimpleNamespace(logprobs=[asked] if asked else None)],
        )

    def _num_cached(self, tokens: list[int]) -> int:
        """Whole blocks, never the whole prompt: its last token has to be computed."""
        ends = range(BLOCK, len(tokens), BLOCK)
        return max((end for end in ends if tuple(tokens[:end]) in self._cache), default=0)

    def _remember(self, tokens: list[int]) -> None:
        ends = range(BLOCK, len(tokens) + 1, BLOCK)
        self._cache |= {tuple(tokens[:end]) for end in ends}

    def _v2(self, tokens: list[int], spans: list[tuple[int, int]], params: Any) -> tuple[Any, Any]:
        worker = v2.PromptLogprobsWorker(1, torch.device("cpu"))
        ids = torch.tensor([[*tokens, 0]])
        lengths = np.array([len(tokens)])
        rows, tensors = {}, {}

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            self.rows += len(hidden)
            return hidden

        for start, end in spans:
            worker.remove_request("r")  # of a preempted request nothing is kept
            worker.add_request("r", 0, params)
            batch: Any = SimpleNamespace(
                idx_mapping_np=np.array([0]),
                idx_mapping=torch.tensor([0]),
                num_tokens=end - start,
                query_start_loc=torch.tensor([0, end - start]),
                query_start_loc_np=np.array([0, end - start]),
                req_ids=["r"],
                num_computed_prefill_tokens_np=np.array([start]),
                prefill_len_np=lengths,
                num_scheduled_tokens=np.array([end - start]),
            )
            hidden = TABLE[torch.tensor(tokens[start:end])]
            rows = worker.compute_prompt_token_id_logprobs(logits, hidden, batch, lengths)
            tensors = worker.compute_prompt_logprobs(
                logits, hidden, batch, ids, torch.tensor([start]), lengths
            )
        found = rows.get("r")
        return None if found is None else found.numpy(), _processed(tensors.get("r"), params)

    def _v1(self, tokens: list[int], cached: int) -> Any:
        """A row for every token; those of cached ones are uninitialised memory."""
        ids = torch.tensor(tokens[1:])
        log_p = TABLE[torch.tensor(tokens[:-1])].gather(-1, ids.unsqueeze(-1))
        log_p[:cached] = -1e30
        tensors = LogprobsTensors(ids.unsqueeze(-1), log_p, torch.ones(len(ids)))
        return _processed(tensors, SimpleNamespace(prompt_logprobs=0))


def _processed(tensors: LogprobsTensors | None, params: Any) -> Any:
    if params.prompt_logprobs is None:
        return None
    processor = LogprobsProcessor(
        tokenizer=None,
        logprobs=None,
        prompt_logprobs=create_prompt_logprobs(True),
        cumulative_logprob=None,
        num_logprobs=None,
        num_prompt_logprobs=0,
    )
    if tensors is not None:
        processor._update_prompt_logprobs(tensors)
    return processor.prompt_logprobs


class Numbers:
    """A tokenizer of texts that are their ids; other words are 1."""

    chat_template = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) if word.isdigit() else 1 for word in text.split()]}


def words(ids: Any) -> str:
    return " ".join(map(str, ids))


def draw(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(2, VOCABULARY, count).tolist()


def pairs_of(num_context: int, num_query: int = 8, num_pairs: int = 4) -> list[ScoringPrompt]:
    """Pairs of one context; the last query is the first one again."""
    rng = np.random.default_rng(num_context)
    context, question = draw(rng, num_context), draw(rng, 12)
    queries = [draw(rng, num_query) for _ in range(num_pairs - 1)]
    return [
        ScoringPrompt(
            context=words(context), query=words(query), question=words(question), labels=LABELS
        )
        for query in [*queries, queries[0]]
    ]


def exact(pair: ScoringPrompt) -> tuple[float, float]:
    context, query, question = (
        [int(word) for word in part.split()] for part in (pair.context, pair.query, pair.question)
    )
    tokens = context + query
    log_p = [float(TABLE[tokens[i - 1], tokens[i]]) for i in range(len(context), len(tokens))]
    yes, no = (float(TABLE[question[-1], label]) for label in (YES, NO))
    return sum(log_p) / len(query), yes - float(np.logaddexp(yes, no))


def score(engine: Engine, pairs: list[ScoringPrompt], **options: bool) -> list[PairScore]:
    llm = LanguageModel(engine, Numbers(), 4096)
    return asyncio.run(llm.score(pairs, **options))


def assert_exact(scores: list[PairScore], pairs: list[ScoringPrompt]) -> None:
    for found, pair in zip(scores, pairs, strict=True):
        assert found.error is None
        assert (found.ql, found.rc) == pytest.approx(exact(pair), abs=1e-5)


# Less than a block, one block, a little more, several, and several with a rest.
CONTEXTS = (10, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK - 1, 5 * BLOCK, 200)
both_runners = pytest.mark.parametrize("runner", ["v1", "v2"])


@both_runners
@pytest.mark.parametrize("num_context", CONTEXTS)
@pytest.mark.parametrize("separate", [False, True])
def test_scores_are_exact(runner: str, num_context: int, separate: bool):
    engine, pairs = Engine(runner), pairs_of(num_context)
    scores = score(engine, pairs, separate=separate)
    assert_exact(scores, pairs)
    cached = any(each.num_cached_tokens > 0 for each in scores)
    assert not cached if separate else cached or num_context < BLOCK
    assert_exact(score(engine, pairs, separate=separate), pairs)  # now the queries are cached, too


@both_runners
@pytest.mark.parametrize("num_query", [1, 2])
@pytest.mark.parametrize("num_context", [BLOCK, BLOCK + 1])
def test_short_queries_are_exact(runner: str, num_query: int, num_context: int):
    pairs = pairs_of(num_context, num_query=num_query)
    assert_exact(score(Engine(runner), pairs), pairs)


@pytest.mark.parametrize("num_context", CONTEXTS)
@pytest.mark.parametrize("preempted_at", [BLOCK, 40, 5 * BLOCK, 205, 215])
@pytest.mark.parametrize("separate", [False, True])
def test_requests_that_v2_preempts_are_exact(num_context: int, preempted_at: int, separate: bool):
    pairs = pairs_of(num_context)
    assert_exact(score(Engine("v2", preempted_at), pairs, separate=separate), pairs)


@both_runners
@pytest.mark.parametrize("num_context", [5 * BLOCK - 1, 5 * BLOCK, 5 * BLOCK + 1])
def test_a_context_is_computed_once(runner: str, num_context: int):
    engine, pairs = Engine(runner), pairs_of(num_context, num_pairs=20)[:-1]
    scores = score(engine, pairs)
    assert_exact(scores, pairs)
    rest = num_context % BLOCK
    if runner == "v2":  # whose LM head computes queries and questions alone
        assert engine.rows <= len(pairs) * (8 + 12)
    # Of the context everything once; of each pair what lies behind the last whole block; and where
    # queries begin alike, the block that they share.
    assert engine.computed <= num_context + len(pairs) * (rest + 8 + 12) + 2 * BLOCK
    assert engine.computed == sum(s.num_prompt_tokens - s.num_cached_tokens for s in scores)


@both_runners
@pytest.mark.parametrize("num_context", [5 * BLOCK - 3, 5 * BLOCK - 1, 5 * BLOCK])
def test_queries_that_begin_alike_are_not_computed_anew(runner: str, num_context: int):
    pairs = [
        replace(pair, query=f"7 8 9 {pair.query}")
        for pair in pairs_of(num_context, num_pairs=12)[:-1]
    ]
    engine = Engine(runner)
    assert_exact(score(engine, pairs), pairs)
    assert engine.computed <= num_context + BLOCK + len(pairs) * (BLOCK + 11 + 12)


def apart(pairs: list[ScoringPrompt]) -> tuple[list[ScoringPrompt], list[ScoringPrompt]]:
    """The same pairs, asked for their likelihood and for their relevance alone."""
    return (
        [replace(pair, question="", labels=()) for pair in pairs],
        [replace(pair, likelihood=False) for pair in pairs],
    )


@both_runners
@pytest.mark.parametrize("num_context", CONTEXTS)
@pytest.mark.parametrize("separate", [False, True])
def test_scores_asked_for_apart_are_those_of_one_prompt(
    runner: str, num_context: int, separate: bool
):
    pairs = pairs_of(num_context)
    for number, part in enumerate(apart(pairs)):
        engine = Engine(runner)
        for _ in range(2):  # now the queries are cached, too
            scores = score(engine, part, separate=separate)
            for found, pair in zip(scores, pairs, strict=True):
                expected: list[Any] = [None, None]
                expected[number] = pytest.approx(exact(pair)[number], abs=1e-5)
                assert [found.ql, found.rc, found.error] == [*expected, None]


@both_runners
@pytest.mark.parametrize("num_context", [5 * BLOCK - 1, 5 * BLOCK, 5 * BLOCK + 1])
def test_a_context_is_computed_once_for_scores_asked_for_apart(runner: str, num_context: int):
    pairs = pairs_of(num_context, num_pairs=20)[:-1]
    for number, part in enumerate(apart(pairs)):
        engine = Engine(runner)
        scores = score(engine, part)
        rest, question = num_context % BLOCK, 12 * number
        expected = num_context + len(pairs) * (rest + 8 + question) + 2 * BLOCK
        assert engine.computed <= expected
        assert engine.computed == sum(s.num_prompt_tokens - s.num_cached_tokens for s in scores)
        if number:  # the LM head computes the label's row alone
            assert engine.rows == 0


@both_runners
def test_prompts_of_both_kinds_may_be_mixed(runner: str):
    pairs = pairs_of(5 * BLOCK + 3)
    mixed = [prompt for both in zip(*apart(pairs), strict=True) for prompt in both]
    scores = score(Engine(runner), mixed)
    whole = [joined(scores[place : place + 2]) for place in range(0, len(mixed), 2)]
    assert_exact(whole, pairs)
    assert sum(s.num_prompt_tokens for s in whole) == sum(s.num_prompt_tokens for s in scores)
    assert sum(s.num_cached_tokens for s in whole) == sum(s.num_cached_tokens for s in scores) > 0


def test_pair_of_which_one_prompt_fails_has_no_score():
    scored = PairScore(ql=-1.0, num_prompt_tokens=5)
    both = joined([scored, PairScore(error="too long", num_prompt_tokens=7)])
    assert both == PairScore(error="too long", num_prompt_tokens=12)


def test_more_first_tokens_than_one_request_may_ask_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actors.pair_scores._MAX_LABELS", 3)
    pairs = pairs_of(2 * BLOCK, num_pairs=12)
    assert_exact(score(Engine("v2"), pairs), pairs)


@both_runners
def test_rows_that_do_not_come_back_are_an_error_and_no_number(runner: str):
    class Silent(Engine):
        async def generate(self, *given: Any) -> AsyncIterator[Any]:
            async for output in super().generate(*given):
                output.prompt_token_id_logprobs = None
                output.prompt_logprobs = create_prompt_logprobs(True)
                yield output

    for found in score(Silent(runner), pairs_of(40)):
        assert found.ql is None
        assert "no log-probabilities" in (found.error or "")


@both_runners
def test_the_check_finds_fast_scores_equal(runner: str):
    llm = LanguageModel(Engine(runner), Numbers(), 4096)
    assert asyncio.run(check_scores(llm, pairs_of(200))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_the_check_stops_a_run_whose_rows_are_shifted(runner: str, monkeypatch: pytest.MonkeyPatch):
    """As if the slice were wrong by one: the numbers are those of other tokens."""
    original = PairScorer._ask

    async def shifted(self: PairScorer, tokens: list[int], **asked: Any) -> Any:
        output, log_p = await original(self, tokens, **asked)
        return output, log_p and [-1.0, *log_p[:-1]]

    monkeypatch.setattr(PairScorer, "_ask", shifted)
    llm = LanguageModel(Engine(runner), Numbers(), 4096)
    for pairs in (pairs_of(200), apart(pairs_of(200))[0]):
        with pytest.raises(ScoresDiffer, match=r"accepted is 0\.002.*separate_prompts"):
            asyncio.run(check_scores(llm, pairs))
    relevances = apart(pairs_of(200))[1]  # which no row of a prompt's tokens is read for
    assert asyncio.run(check_scores(llm, relevances)) == pytest.approx(0, abs=1e-5)


@both_runners
def test_the_check_stops_a_run_whose_relevances_are_wrong(
    runner: str, monkeypatch: pytest.MonkeyPatch
):
    class Wrong(Engine):
        async def generate(self, prompt: Any, params: Any, name: str) -> AsyncIterator[Any]:
            async for output in super().generate(prompt, params, name):
                if output.num_cached_tokens and output.outputs[0].logprobs:
                    output.outputs[0].logprobs[0][YES].logprob += 1
                yield output

    llm = LanguageModel(Wrong(runner), Numbers(), 4096)
    with pytest.raises(ScoresDiffer, match=r"they are RC -?[\d.]+, and computed separately RC"):
        asyncio.run(check_scores(llm, apart(pairs_of(200))[1]))


def test_the_check_shows_nothing_where_nothing_was_cached():
    llm = LanguageModel(Engine("v2"), Numbers(), 4096)
    assert asyncio.run(check_scores(llm, pairs_of(5, num_query=3)[:3])) is None


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [(torch.float32, None, 2e-3), (torch.bfloat16, None, 0.15), (torch.bfloat16, "fp8", 0.3)],
)
def test_the_tolerance_is_that_of_the_precision(
    dtype: torch.dtype, quantization: str | None, expected: float
):
    engine = Engine("v2")
    engine.vllm_config.model_config = SimpleNamespace(dtype=dtype, quantization=quantization)
    assert LanguageModel(engine, Numbers(), 4096).score_tolerance == expected


def test_rows_of_other_tokens_are_an_error_and_no_number():
    class Shifted(Engine):
        def _v1(self, tokens: list[int], cached: int) -> Any:
            return super()._v1([tokens[-1], *tokens[:-1]], cached)

    assert all(found.ql is None for found in score(Shifted("v1"), pairs_of(40)))
