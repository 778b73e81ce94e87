"""One large language model on vLLM's asynchronous engine: it writes, and it scores.

vLLM is driven directly because the two scores that the distillation needs, query likelihood and
relevance classification, come out of one prompt only when prompt log-probabilities are read
together with the next token's, over a cached prefix. The asynchronous engine is used because it
starts on the next batch while the last long request of this one still runs.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from actors.embedded import resolve_model
from cluster.errors import EngineDied, TokayError, UserError

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine is started. What is None is left to vLLM.

    Attributes:
        model: Folder, hub id or ``embedded:NAME``.
        max_model_tokens: Longest prompt and answer together, in tokens.
        dtype: Weights and activations: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        enforce_eager: Do not compile: starts a minute sooner, runs slower.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take.
        tensor_parallel_size: GPUs (or groups of CPU cores) that share one copy of the model.
        kv_cache_gib: Size of the KV cache; on a CPU there is no sensible default.
        max_num_seqs: Most requests in one engine step.
        max_num_batched_tokens: Most tokens in one engine step.
        block_size: Tokens in one block of the KV cache; on a CPU a multiple of 32. Prefixes are
            shared in whole blocks.
        seed: The engine's own seed, for requests that bring none.
        trust_remote_code: Run code that comes with the model.
    """

    model: str
    max_model_tokens: int = 2048
    dtype: str = "auto"
    enforce_eager: bool = False
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    kv_cache_gib: float | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. ``temperature=0`` is greedy; ``stop`` strings are left out of the text."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model wrote for one prompt; ``error`` says why it wrote nothing."""

    text: str = ""
    cut: bool = False  # ended by max_tokens, not by a stop string or the end token
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class ScoringPrompt:
    """One (query, passage) pair, laid out for both scores.

    The model reads ``context + query + question`` and answers with a label. The parts are
    tokenised apart, so a blank between two parts belongs to the beginning of the later one.

    Attributes:
        context: Few-shot examples and the passage, ending right before the query.
        query: The text whose likelihood is measured, with its leading blank.
        question: What follows the query, ending right before the label.
        labels: What may follow, with leading blanks, and the relevance in 0..1 that each stands
            for. Of a label of several tokens the first counts.
    """

    context: str
    query: str
    question: str
    labels: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """The teacher's two scores of one pair, natural logarithms; None when ``error`` is set.

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


class LanguageModel:
    """A running engine. Batches may be given concurrently; they share the engine's steps."""

    def __init__(self, engine: Any, tokenizer: Any, max_model_tokens: int) -> None:
        """Wrap a started engine; use `load`."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_model_tokens = max_model_tokens
        self._ids = itertools.count()
        from vllm.platforms import current_platform

        self._on_cpu = bool(current_platform.is_cpu())

    @classmethod
    def load(cls, options: EngineOptions) -> LanguageModel:
        """Start an engine, in its own processes (half a minute to some minutes).

        Raises:
            UserError: If the model does not exist, or is longer than it can be.
            TokayError: If the engine does not start.
        """
        model = resolve_model(options.model)
        _set_environment(options)
        from transformers import AutoTokenizer
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        optional: dict[str, Any] = {
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "block_size": options.block_size,
        }
        if current_platform.is_cpu():
            # A seeded request whose prefill is cut in two kills the CPU engine
            # ("CPU Generator does not use offset"), so there every prefill runs whole.
            optional["enable_chunked_prefill"] = False
            optional["max_num_batched_tokens"] = max(
                options.max_num_batched_tokens or 0, options.max_model_tokens
            )
        if options.kv_cache_gib is not None:
            optional["kv_cache_memory_bytes"] = int(options.kv_cache_gib * 2**30)
        arguments = AsyncEngineArgs(
            model=model,
            max_model_len=options.max_model_tokens,
            dtype=cast(Any, options.dtype),
            enforce_eager=options.enforce_eager,
            gpu_memory_utilization=options.gpu_memory_utilization,
            tensor_parallel_size=options.tensor_parallel_size,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
            enable_prefix_caching=True,
            disable_log_stats=True,
            **{name: value for name, value in optional.items() if value is not None},
        )
        try:
            engine = AsyncLLM.from_engine_args(arguments)
        except ValueError as error:  # vLLM's word for options that do not fit the model
            line = str(error).strip().splitlines()[-1]
            raise UserError(f"vLLM refuses model {options.model!r}: {line}") from error
        except Exception as error:
            raise TokayError(f"vLLM did not start with model {options.model!r}: {error}") from error
        tokenizer = AutoTokenizer.from_pretrained(
            model, trust_remote_code=options.trust_remote_code
        )
        return cls(engine, tokenizer, options.max_model_tokens)

    def close(self) -> None:
        """Stop the engine and its processes."""
        self._engine.shutdown()

    def truncate(self, text: str, max_tokens: int) -> str:
        """Cut ``text`` to its first ``max_tokens`` tokens of this model's tokenizer."""
        return truncate(self._tokenizer, text, max_tokens)

    def chat(self, message: str) -> str:
        """Format ``message`` as a user's turn with the model's chat template, if it has one."""
        if not self._tokenizer.chat_template:
            return message
        return str(
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    async def generate(
        self, prompts: Sequence[str], *, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        """Continue each prompt.

        Args:
            prompts: Texts to continue.
            sampling: Shared by all prompts.
            seeds: One for each prompt: a prompt's randomness depends on its own seed and not on
                what else is in the batch.

        Returns:
            One generation for each prompt, in order. A prompt that does not fit the model comes
            back with ``error`` set.

        Raises:
            EngineDied: If the engine is dead.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        async def one(prompt: str, seed: int) -> Generation:
            tokens = self._tokenize(prompt, special=True)
            if error := self._misfit(len(tokens), sampling.max_tokens):
                return Generation(error=error, num_prompt_tokens=len(tokens))
            output = await self._request(
                tokens,
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    stop=list(sampling.stop),
                    # A request's seed together with top_p kills vLLM's CPU engine; the engine's
                    # own seed then rules, and what is written depends on the batch.
                    seed=None if self._on_cpu and sampling.top_p < 1 else seed,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
            answer = output.outputs[0]
            return Generation(
                text=answer.text,
                cut=answer.finish_reason == "length",
                num_prompt_tokens=len(tokens),
                num_cached_tokens=output.num_cached_tokens or 0,
                num_tokens=len(answer.token_ids),
            )

        requests = [one(*pair) for pair in zip(prompts, seeds, strict=True)]
        return list(await asyncio.gather(*requests))

    async def score(
        self, pairs: Sequence[ScoringPrompt], *, separate: bool = False
    ) -> list[PairScore]:
        """Score each pair for query likelihood and relevance, in one prefill.

        Give the pairs passage by passage: what two neighbours' contexts share is computed once.

        Args:
            pairs: The pairs, in the order in which they should run.
            separate: Ask for each score with a prompt of its own and compute every token anew: the
                obvious way, an order of magnitude slower, kept to check the fast one against.

        Returns:
            One score for each pair, in order. A pair that does not fit the model comes back with
            ``error`` set.

        Raises:
            EngineDied: If the engine is dead.
        """
        contexts: dict[str, list[int]] = {}
        requests: list[Coroutine[Any, Any, PairScore | int]] = []
        for pair in pairs:
            if pair.context not in contexts:
                contexts[pair.context] = self._tokenize(pair.context, special=True)
                if not separate:
                    requests.append(self._prefill(contexts[pair.context]))
            requests.append(self._score(pair, contexts[pair.context], separate=separate))
        # Requests reach the engine in this order; a pair finds its context in the cache even
        # when both run in one step.
        scores: list[PairScore] = []
        num_computed = 0
        for answer in await asyncio.gather(*requests):
            if isinstance(answer, int):
                num_computed = answer
                continue
            if num_computed:  # for all pairs of a context, and counted with the first
                cached = answer.num_cached_tokens - num_computed
                answer = replace(answer, num_cached_tokens=cached)
                num_computed = 0
            scores.append(answer)
        return scores

    async def _prefill(self, context: list[int]) -> int:
        """Put a context in the cache without the cost of its tokens' log-probabilities.

        Returns how many of its tokens were not there yet.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if self._misfit(len(context), 1):
            return 0
        output = await self._request(
            context,
            SamplingParams(
                temperature=0.0,
                max_tokens=1,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )
        return len(context) - int(output.num_cached_tokens or 0)

    async def _score(self, pair: ScoringPrompt, context: list[int], *, separate: bool) -> PairScore:
        query = self._tokenize(pair.query, special=False)
        question = self._tokenize(pair.question, special=False)
        labels = {self._tokenize(label, special=False)[0]: weight for label, weight in pair.labels}
        if len(labels) < len(pair.labels):
            raise ValueError(f"labels {pair.labels} begin with the same token; choose others")
        tokens = context + query + question
        if not query:
            return PairScore(error="empty query")
        if error := self._misfit(len(tokens), 1):
            return PairScore(error=error, num_prompt_tokens=len(tokens))
        output = await self._request(tokens, _scoring_params(list(labels), cached=not separate))
        if (output.num_cached_tokens or 0) >= len(context):
            # Log-probabilities are computed for uncached tokens only, and this query is partly
            # in the cache (the same pair again, or one that begins alike).
            output = await self._request(tokens, _scoring_params(list(labels), cached=False))
        prompt, answer = output.prompt_logprobs, output.outputs[0].logprobs[0]
        if separate:
            alone = await self._request(context + query, _scoring_params([], cached=False))
            prompt = alone.prompt_logprobs
        positions = prompt.start_indices[len(context) : len(context) + len(query)]
        ql = sum(prompt.logprobs[position] for position in positions) / len(query)
        rc = _mean_relevance([(answer[token].logprob, w) for token, w in labels.items()])
        if not (math.isfinite(ql) and math.isfinite(rc)):
            return PairScore(
                error=f"the model's log-probabilities are not finite (QL {ql}, RC {rc})",
                num_prompt_tokens=len(tokens),
            )
        return PairScore(
            ql=ql,
            rc=rc,
            num_prompt_tokens=len(tokens) + (len(context + query) if separate else 0),
            num_cached_tokens=output.num_cached_tokens or 0,
        )

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return cast(list[int], ids)

    def _misfit(self, num_prompt_tokens: int, num_new_tokens: int) -> str | None:
        if num_prompt_tokens + num_new_tokens <= self._max_model_tokens:
            return None if num_prompt_tokens else "empty prompt"
        return (
            f"prompt of {num_prompt_tokens} tokens and {num_new_tokens} to write exceed "
            f"max_model_tokens {self._max_model_tokens}"
        )

    async def _request(self, tokens: list[int], params: SamplingParams) -> Any:
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        output: RequestOutput | None = None
        try:
            request = self._engine.generate(tokens_input(tokens), params, str(next(self._ids)))
            async for part in request:
                output = part
        except EngineDeadError as error:
            raise EngineDied("the vLLM engine died; its own log says why") from error
        if output is None:
            raise TokayError("the vLLM engine ended a request without an answer")
        return output


def truncate(tokenizer: Any, text: str, max_tokens: int) -> str:
    """Cuts `text` to its first `max_tokens` tokens of a Hugging Face tokenizer."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return text if len(offsets) <= max_tokens else text[: offsets[max_tokens][0]].rstrip()


def _mean_relevance(labels: Sequence[tuple[float, float]]) -> float:
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


def _scoring_params(labels: list[int], *, cached: bool) -> SamplingParams:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        skip_reading_prefix_cache=not cached,  # vLLM's default is to recompute the whole prompt
        logprob_token_ids=labels or None,
        flat_logprobs=True,
        detokenize=False,  # the ids at cached positions are uninitialised memory
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _set_environment(options: EngineOptions) -> None:
    """Set what vLLM takes from the environment only; what the user has set stays."""
    from vllm.platforms import current_platform

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not current_platform.is_cpu():
        return
    cores = sorted(os.sched_getaffinity(0))
    size = options.tensor_parallel_size
    groups = [",".join(map(str, cores[rank::size])) for rank in range(size)]
    # vLLM's own choice leaves one core of two idle.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(groups))
    # One order of summation, however many requests share a step: the same numbers every time.
    os.environ.setdefault("VLLM_CPU_ATTN_SPLIT_KV", "0")
    if options.enforce_eager:
        # Eager vLLM still compiles a helper of prompt log-probabilities: 20 s, and a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
