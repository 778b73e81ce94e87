"""The model behind the endpoint: it reads requests' texts, checks them, and batches them.

It knows nothing of HTTP or Ray, so that a test, a notebook and the Serve replica use the same one.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from actors.encoder import Encoder
from actors.encoder_files import num_embeddings
from actors.plain_text import special_tokens
from serving.batching import QueueFull, TokenBatcher
from serving.corpus import Corpus, ServedPassage
from serving.metrics import Metrics
from serving.protocol import ApiError, RequestLimits, Role

# A core has no use for a wide pass, and padding costs: of passes of 256 to 4096 tokens over texts
# of mixed length, 512 took the least processor time for each text and 4096 a quarter more.
_CPU_PASS_TOKENS = 512

_NO_TOKEN_IDS = (
    "input holds token ids, and this server takes texts: ids of another tokenizer would give wrong"
    " vectors. In LangChain, set OpenAIEmbeddings(check_embedding_ctx_length=False). For clients"
    " with this model's own tokenizer, the operator may start the server with --allow-token-ids"
)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Vectors float32 `[texts, dimensions]` and the tokens that were read for them."""

    vectors: np.ndarray
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """Passages with their scores, best first, and the tokens of the query."""

    hits: list[tuple[ServedPassage, float]]
    num_tokens: int


class ServedModel:
    """An encoder under one name, with its queue and perhaps a corpus."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        name: str,
        task: str,
        batch_tokens: int,
        max_queued_tokens: int,
        metrics: Metrics,
        corpus: Corpus | None = None,
        limits: RequestLimits | None = None,
    ) -> None:
        """Wraps a loaded encoder.

        Args:
            encoder: Loaded; from now on only this object may call it.
            name: What requests call the model.
            task: The task of queries that name none.
            batch_tokens: Tokens taken from the queue at once; a GPU embeds them in one pass.
            max_queued_tokens: Tokens that may wait before requests are refused.
            metrics: Where batches are counted.
            corpus: What searches answer from.
            limits: What one request may hold.
        """
        self.name = name
        self.limits = limits or RequestLimits()
        self.created = int(time.time())
        self.corpus = corpus
        self.metrics = metrics
        self.encoder = encoder
        self._task = task
        on_cpu = encoder.device.type == "cpu"
        self._pass_tokens = min(batch_tokens, _CPU_PASS_TOKENS) if on_cpu else batch_tokens
        self.batcher = TokenBatcher(
            self._embed_rows,
            dimensions=encoder.dimensions,
            batch_tokens=batch_tokens,
            max_queued_tokens=max_queued_tokens,
            on_batch=metrics.count_batch,
        )
        # One thread: a fast tokenizer must not be asked to truncate from two threads at once.
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def embed(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        role: Role | None = None,
        task: str | None = None,
        titles: Sequence[str] | None = None,
        truncate: bool = False,
        param: str = "input",
    ) -> Embedded:
        """Embeds texts, or token ids without special tokens.

        Args:
            inputs: One or more, none empty.
            role: The template to apply; None for texts as they are.
            task: The task of the query template; None for the served one.
            titles: Of the passages, one for each; empty for none.
            truncate: Cut what is too long.
            param: The request's field that errors name.

        Raises:
            ApiError: 400 for inputs that cannot be embedded, 429 when too much is waiting.
        """
        self._check_size(inputs, role, task, titles, param)
        rows = await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, lambda: self._read(inputs, role, task, titles, truncate, param)
        )
        try:
            vectors = await self.batcher.embed(rows)
        except QueueFull as error:
            raise ApiError(
                429,
                f"the server is busy ({error}): try again in {error.retry_after_s} s",
                code="rate_limit_exceeded",
                retry_after_s=error.retry_after_s,
            ) from error
        if not np.isfinite(vectors).all():
            raise ApiError(500, "the model gives no finite vector for this: tell its operator")
        return Embedded(vectors=vectors, num_tokens=sum(map(len, rows)))

    async def search(self, query: str, *, top_k: int, task: str | None = None) -> Found:
        """Finds the passages nearest to a query.

        Raises:
            ApiError: 404 without a corpus; 400 for a blank or over-long query; 429 when busy.
        """
        if self.corpus is None:
            raise ApiError(
                404,
                "no corpus is loaded: start the server with `tokay serve MODEL --corpus FOLDER`",
                code="corpus_not_found",
            )
        if not query.strip():
            raise ApiError(400, "query is blank: give at least one word", param="query")
        embedded = await self.embed([query], role="query", task=task, param="query")
        hits = await asyncio.to_thread(self.corpus.search, embedded.vectors[0], top_k)
        return Found(hits=hits, num_tokens=embedded.num_tokens)

    def _check_size(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        role: Role | None,
        task: str | None,
        titles: Sequence[str] | None,
        param: str,
    ) -> None:
        """Refuses what would be too much, before any of it is written out or tokenised."""
        limits = self.limits
        if not 0 < len(inputs) <= limits.max_texts:
            raise ApiError(
                400, f"{param} holds {len(inputs)} texts: give 1 to {limits.max_texts}", param=param
            )
        if titles is not None and role != "passage":
            raise ApiError(400, 'title needs input_type "passage"', param="title")
        if titles is not None and len(titles) != len(inputs):
            raise ApiError(
                400,
                f"title holds {len(titles)} titles and {param} {len(inputs)} texts: give one each",
                param="title",
            )
        texts = [item for item in inputs if isinstance(item, str)]
        if not texts:
            if limits.token_ids:
                return
            raise ApiError(400, _NO_TOKEN_IDS, param=param)
        templates, characters = self.encoder.templates, sum(map(len, texts))
        if role == "query":
            characters += len(texts) * templates.query_chars("", task=task or self._task)
        elif titles is not None:
            characters += sum(templates.passage_chars("", title) for title in titles)
        elif role == "passage":
            characters += len(texts) * templates.passage_chars("")
        if characters > limits.max_characters:
            raise ApiError(
                413,
                f"{param} has {characters} characters"
                f"{' in the template of a ' + role if role else ''}; accepted are"
                f" {limits.max_characters} in one request: send fewer texts at once",
                param=param,
            )

    def _read(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        role: Role | None,
        task: str | None,
        titles: Sequence[str] | None,
        truncate: bool,
        param: str,
    ) -> list[list[int]]:
        """Returns the token ids that the model will read, special tokens included."""
        if any(len(item) == 0 for item in inputs):
            raise ApiError(400, f"{param} holds an empty text: leave it out", param=param)
        texts = [item for item in inputs if isinstance(item, str)]
        if texts:
            rows = self._tokenize(self._format(texts, role, task, titles), param)
        else:
            ids = [list(item) for item in inputs if not isinstance(item, str)]
            rows = self._add_special_tokens(ids, role)
        limit = self.encoder.max_tokens
        for number, row in enumerate(rows):
            if len(row) <= limit:
                continue
            if not truncate:
                raise ApiError(
                    400,
                    f"{param} {number} has {len(row)} tokens and the model reads {limit}, special"
                    " tokens included: shorten it, or send truncate=true to embed its beginning",
                    param=param,
                    code="context_length_exceeded",
                )
            num_last = len(special_tokens(self.encoder.tokenizer)[1])
            rows[number] = row[: limit - num_last] + row[len(row) - num_last :]
        return rows

    def _format(
        self, texts: list[str], role: Role | None, task: str | None, titles: Sequence[str] | None
    ) -> list[str]:
        templates = self.encoder.templates
        if role == "query":
            return [templates.format_query(text, task=task or self._task) for text in texts]
        if task is not None:
            raise ApiError(400, 'task needs input_type "query"', param="task")
        if role == "passage":
            return self.encoder.format_passages(texts, titles)
        return texts

    def _tokenize(self, texts: list[str], param: str) -> list[list[int]]:
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ApiError(
                400,
                f"{param} holds half of a surrogate pair, which is no character: send Unicode text",
                param=param,
            ) from error
        return self.encoder.tokenize(texts, truncate=False)  # to know how long they are

    def _add_special_tokens(self, rows: list[list[int]], role: Role | None) -> list[list[int]]:
        if role is not None:
            raise ApiError(400, "input_type needs texts, not token ids", param="input_type")
        size = len(self.encoder.tokenizer)
        size = min(size, num_embeddings(self.encoder.model) or size)
        worst = max(max(row) for row in rows)
        if min(min(row) for row in rows) < 0 or worst >= size:
            raise ApiError(
                400,
                f"token ids must be 0 to {size - 1} of this model's own tokenizer (given:"
                f" {worst}): send texts; in LangChain, set check_embedding_ctx_length=False",
                param="input",
            )
        first, last = special_tokens(self.encoder.tokenizer)
        return [first + row + last for row in rows]

    def _embed_rows(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            vectors = self.encoder.embed_tokens(rows, batch_tokens=self._pass_tokens)
            return np.asarray(vectors.cpu().numpy())
