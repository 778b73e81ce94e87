"""One large language model on vLLM's asynchronous engine: it writes, and it scores.

vLLM is driven directly because the two scores that the distillation needs, query likelihood and
relevance classification, come out of one prompt only when prompt log-probabilities are read
together with the next token's, over a cached prefix. The asynchronous engine is used because it
starts on the next batch while the last long request of this one still runs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.embedded import resolve_model
from actors.engine import EngineConfig, EngineLog, LlmConfig, start_engine
from actors.pair_scores import PairScore, PairScorer, PairTokens, ScoringPrompt
from actors.plain_text import PlainText
from cluster.errors import EngineDied, TokayError

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams


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


_BLOCK_SIZE = 16  # vLLM's own


class LanguageModel:
    """A running engine. Batches may be given concurrently; they share the engine's steps."""

    def __init__(
        self, engine: Any, tokenizer: Any, max_model_tokens: int, log: EngineLog | None = None
    ) -> None:
        """Wraps a started engine; use `load`."""
        self._engine = engine
        self._text = PlainText(tokenizer)
        self._max_model_tokens = max_model_tokens
        self._log = log
        self._ids = itertools.count()
        from vllm.platforms import current_platform

        self._on_cpu = bool(current_platform.is_cpu())

    @classmethod
    def load(cls, llm: LlmConfig, config: EngineConfig) -> LanguageModel:
        """Starts an engine in its own processes, which takes half a minute to a few minutes.

        Raises:
            UserError: The model does not exist, or vLLM refuses an option.
            TokayError: The engine does not start.
        """
        from transformers import AutoTokenizer

        engine, log = start_engine(llm, config)
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(llm.model), trust_remote_code=llm.trust_remote_code
        )
        return cls(engine, tokenizer, llm.max_model_tokens, log)

    async def close(self) -> None:
        """Stops the engine and its processes; await it in the loop that the prompts ran in.

        From elsewhere vLLM leaves the closing of its sockets to that loop. A loop that has ended
        never closes them, and whoever collects the garbage then waits for ever.
        """
        self._engine.shutdown()
        if self._log:
            self._log.delete()

    def truncate(self, text: str, max_tokens: int) -> str:
        """Cuts ``text`` to its first ``max_tokens`` tokens of this model's tokenizer."""
        return self._text.truncate(text, max_tokens)

    def control_tokens(self, text: str) -> list[str]:
        """Returns the control tokens that ``text`` spells out, which a prompt shows as text."""
        return self._text.control_tokens(text)

    async def generate(
        self,
        prompts: Sequence[str],
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        chat: bool = False,
    ) -> list[Generation]:
        """Continues each prompt.

        Args:
            prompts: Texts to continue. Control tokens that they spell out are text.
            sampling: Shared by all prompts.
            seeds: One for each prompt: a prompt's randomness depends on its own seed and not on
                what else is in the batch.
            chat: Make each prompt a user's turn, by the model's chat template if it has one.

        Returns:
            One generation for each prompt, in order. A prompt that does not fit the model is
            returned with ``error`` set.

        Raises:
            EngineDied: The engine is dead.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        async def one(prompt: str, seed: int) -> Generation:
            tokens = self._text.chat_ids(prompt) if chat else self._text.ids(prompt, special=True)
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
                    # own seed then applies, and what is written depends on the batch.
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
        """Scores each pair for query likelihood, relevance or both, in one prefill.

        Give the pairs passage by passage: what two neighbours' contexts share is computed once.

        Args:
            pairs: The pairs, in the order in which they should run.
            separate: Ask for each score with a prompt of its own and recompute every token: the
                obvious way, an order of magnitude slower, kept to check the fast one against.

        Returns:
            One score for each pair, in order. A pair that does not fit the model is returned with
            ``error`` set.

        Raises:
            EngineDied: The engine is dead.
        """
        scores: list[PairScore | None] = []
        fitting: list[PairTokens] = []
        for tokens in map(self._pair_tokens, pairs):
            error = self._misfit(len(tokens.all), 1) if tokens.query else "empty query"
            if error:
                scores.append(PairScore(error=error, num_prompt_tokens=len(tokens.all)))
            else:
                scores.append(None)
                fitting.append(tokens)
        config = getattr(self._engine, "vllm_config", None)
        # Not kept: the engine's sockets are closed in the right order only outside a cycle.
        scorer = PairScorer(
            self._request,
            on_v2=bool(config and config.use_v2_model_runner),
            block_size=(config and config.cache_config.block_size) or _BLOCK_SIZE,
        )
        computed = iter(await (scorer.score_separately if separate else scorer.score)(fitting))
        return [next(computed) if score is None else score for score in scores]

    @property
    def score_tolerance(self) -> float:
        """How far apart two ways to the same score may be, in natural logarithms.

        A logit between 8 and 16 is rounded to a sixteenth in bfloat16; a query's likelihood is a
        mean over its tokens.
        """
        model = self._engine.vllm_config.model_config
        if model.quantization is not None:
            return 0.3
        return 2e-3 if str(model.dtype) == "torch.float32" else 0.15

    def _pair_tokens(self, pair: ScoringPrompt) -> PairTokens:
        labels = {self._text.ids(label)[0]: weight for label, weight in pair.labels}
        if len(labels) < len(pair.labels):
            raise ValueError(f"labels {pair.labels} begin with the same token; choose others")
        return PairTokens(
            context=tuple(self._text.ids(pair.context, special=True)),
            query=tuple(self._text.ids(pair.query)),
            question=tuple(self._text.ids(pair.question)),
            labels=labels,
            likelihood=pair.likelihood,
        )

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
            why = f": {self._log.reason()} (its log: {self._log.where()})" if self._log else ""
            raise EngineDied(f"the vLLM engine died{why}") from error
        if output is None:
            raise TokayError("the vLLM engine ended a request without an answer")
        return output
