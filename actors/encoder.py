"""One text encoder for training, mining, evaluation, export and serving.

The same few lines turn a text into a vector everywhere, so the model that is measured is the model
that was trained and the one that is served. A folder that it saves is a sentence-transformers
model, and reading that folder with sentence-transformers gives the same vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch.nn import functional

from actors.embedded import resolve_model
from actors.encoder_files import (
    device_and_dtype,
    load_tokenizer,
    load_transformer,
    local_folder,
    no_progress_bars,
    num_embeddings,
    read_max_tokens,
    read_projection,
    write_modules,
    write_settings,
)
from actors.encoder_fingerprint import encoder_fingerprint
from actors.encoder_folder import read_folder
from actors.encoder_settings import POOLINGS
from actors.encoder_templates import PromptTemplates
from actors.kernels.dropout import use_fast_dropout
from actors.kernels.linear import use_onednn
from actors.kernels.packing import (
    TokenRows,
    can_pack,
    cut_batches,
    packed_forward,
    pool_packed,
    send,
    use_packing,
)
from actors.text_encoder import TextEncoder
from actors.vectors import BrokenVectors
from cluster.errors import UserError

# Activations of 2048 tokens stay in a CPU's cache: 1.4 times the speed of 8192 for MiniLM.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ELSEWHERE = 16384
# Of an H200 without gradients: 1.5 times the speed of 16384 for MiniLM, a few percent for larger.
_ENCODE_TOKENS_ELSEWHERE = 32768


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tokenised texts.

    Attributes:
        rows: Token ids of each different text.
        order: Which of them each text is.
    """

    rows: list[list[int]]
    order: list[int]


class Encoder(TextEncoder):
    """A transformer, its tokenizer, a pooling and the prompts it was trained with.

    Make one with :meth:`load`. What it was made with stays; the model's weights may be trained.

    Attributes:
        model: The transformer, to be trained in place; a projection is its part ``projection``.
        tokenizer: Its tokenizer.
        pooling: ``mean``, ``cls`` or ``lasttoken``.
        max_tokens: Longer texts are cut to this many tokens.
        templates: What :meth:`encode_queries` and :meth:`encode_passages` put around a text.
        packed: Whether batches go through the model without padding, where the device can do that
            in the precision asked for: a GPU in bfloat16 and float16.
        num_tokens: Tokens of texts that went through the model so far.
        num_places: The same with what filled the batches up.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        pooling: str,
        max_tokens: int,
        templates: PromptTemplates,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: accepted are {', '.join(POOLINGS)}")
        self.model: Final = model
        self.tokenizer: Final = tokenizer
        self.pooling: Final = pooling
        self.max_tokens: Final = max_tokens
        self.templates: Final = templates
        self.packed = use_packing(model)
        self.num_tokens = self.num_places = 0
        if self.device.type == "cpu":
            use_onednn(model)
            use_fast_dropout(model)

    @property
    def num_parameters(self) -> int:
        """Weights of the transformer and its projection."""
        return sum(weights.numel() for weights in self.model.parameters())

    @classmethod
    def load(
        cls,
        model: str,
        *,
        max_tokens: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        trust_remote_code: bool = False,
        pooling: str | None = None,
        query_template: str | None = None,
        passage_template: str | None = None,
    ) -> Encoder:
        """Reads a sentence-transformers or a plain Hugging Face model.

        What a folder says is done as sentence-transformers does it, or refused
        (:mod:`actors.encoder_settings`). A plain model is pooled at the last token if it is a
        decoder and by the mean otherwise. Templates that are not given come from ``tokay.json``, or
        from the prompts of sentence-transformers.

        Args:
            model: Folder, hub id, or ``embedded:NAME``.
            max_tokens: Cut texts here; a model that takes less lowers it. None: where the model's
                folder says, or 256 for a plain model.
            dtype: ``float32``, ``bfloat16``, ``float16``; or ``auto``, which is bfloat16 where the
                hardware multiplies it natively and float32 elsewhere.
            device: ``cpu``, ``cuda``, ``cuda:1``; the GPU where there is one if None.
            trust_remote_code: Run Python code that comes with the model.
            pooling: ``mean``, ``cls`` or ``lasttoken``; the model's own if None.
            query_template: As in :class:`PromptTemplates`; the model's own if None.
            passage_template: As in :class:`PromptTemplates`; the model's own if None.

        Raises:
            UserError: The model is missing, broken, of an unknown kind, or has no safetensors
                weights; its folder means what is not done here.
        """
        chosen, precision = device_and_dtype(device, dtype)
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"max_tokens {max_tokens}: accepted are whole numbers from 1")
        trust = trust_remote_code
        path = local_folder(resolve_model(model), trust_remote_code=trust)
        folder = read_folder(path, trust_remote_code=trust)
        transformer = load_transformer(folder, dtype=precision, trust_remote_code=trust)
        tokenizer = load_tokenizer(folder, transformer, trust_remote_code=trust)
        config = transformer.config
        projection = read_projection(folder, config.hidden_size)
        if projection is not None:
            transformer.add_module("projection", projection.to(precision))
        decoder = any("CausalLM" in name for name in config.architectures or [])
        last = decoder and getattr(config, "is_causal", True)
        return cls(
            transformer.to(chosen).eval(),
            tokenizer,
            pooling=pooling or folder.pooling or ("lasttoken" if last else "mean"),
            max_tokens=read_max_tokens(folder, transformer, tokenizer, max_tokens),
            templates=PromptTemplates(
                query=query_template or folder.templates.query,
                passage=passage_template or folder.templates.passage,
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer, pooling, token limit and templates, as they are now."""
        return encoder_fingerprint(self)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        layers = list(self._projection or [])
        size = layers[-2].out_features if layers else cast(Any, self.model.config).hidden_size
        return int(cast(int, size))

    def check_dimensions(self, dimensions: int) -> None:
        """Raises UserError unless vectors can be cut to this number of dimensions."""
        if not 1 <= dimensions <= self.dimensions:
            raise UserError(f"dimensions {dimensions}: accepted are 1 to {self.dimensions}")

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def encode(self, texts: Sequence[str], *, batch_tokens: int | None = None) -> np.ndarray:
        """Embeds texts that are already formatted.

        Args:
            texts: Any number, in any order; sorted by length inside, equal ones embedded once.
            batch_tokens: Tokens, padding included, in one pass; what suits the device if None.
                Changes speed and memory only.

        Returns:
            float32 ``[texts, dimensions]``, every row of length 1.
        """
        return self.encode_prepared(self.prepare(texts), batch_tokens=batch_tokens)

    def prepare(self, texts: Sequence[str]) -> Prepared:
        """Tokenises formatted texts for :meth:`encode_prepared`, equal ones once.

        A thread may do this while another is embedding.
        """
        places: dict[str, int] = {}
        order = [places.setdefault(text, len(places)) for text in texts]
        return Prepared(rows=self.tokenize(list(places)), order=order)

    def encode_prepared(self, texts: Prepared, *, batch_tokens: int | None = None) -> np.ndarray:
        """Embeds texts that are already tokenised; see :meth:`encode`."""
        if batch_tokens is None and self.device.type not in _BATCH_TOKENS:
            batch_tokens = _ENCODE_TOKENS_ELSEWHERE
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.inference_mode():
                vectors = self.embed_tokens(texts.rows, batch_tokens=batch_tokens).cpu().numpy()
        finally:
            for module, training in modes:
                module.training = training
        if not np.isfinite(vectors).all():
            raise BrokenVectors(
                f"the encoder {cast(Any, self.model.config).name_or_path!r} gives vectors that are"
                f" no numbers in {self.model.dtype}: its weights are broken, or too large for it"
            )
        return vectors if len(texts.rows) == len(texts.order) else vectors[texts.order]

    def set_training(self, *, dropout: bool, checkpointing: bool = False) -> None:
        """Sets the model to train.

        Args:
            dropout: Drop as the model's configuration says; nothing if false.
            checkpointing: Keep each layer's input alone and compute the layer again for its
                gradient: less memory, a third more work, the same gradients.

        Raises:
            UserError: The model has no layers that can be computed again.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        model = cast(Any, self.model)
        model.train(dropout)
        if not checkpointing:
            model.gradient_checkpointing_disable()
            return
        if not model.supports_gradient_checkpointing:
            raise UserError(f"a {type(model).__name__} has no gradient checkpointing: leave it out")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # a layer is computed again where it is said to train
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        """Embeds queries of one task; see :meth:`encode`."""
        return self.encode([self.templates.format_query(query, task=task) for query in queries])

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Embeds passages, with their titles where the template has a place for them."""
        return self.encode(self.format_passages(texts, titles))

    def format_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> list[str]:
        """Returns what :meth:`encode_passages` embeds."""
        pairs = zip(texts, titles or [None] * len(texts), strict=True)
        return [self.templates.format_passage(text, title) for text, title in pairs]

    def tokenize(
        self, texts: Sequence[str], *, max_tokens: int | None = None, truncate: bool = True
    ) -> list[list[int]]:
        """Returns the token ids of each text, cut to ``max_tokens`` and never empty."""
        if not texts:
            return []
        rows = self.tokenizer(
            list(texts),
            truncation=truncate,
            max_length=min(max_tokens or self.max_tokens, self.max_tokens) if truncate else None,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        known = num_embeddings(self.model)
        if known and len(self.tokenizer) > known:  # added tokens, such as an image's, have none
            rows = [[id_ if id_ < known else self._unknown_id for id_ in row] for row in rows]
        # A decoder's tokenizer makes nothing of an empty text, and nothing has no vector.
        return [row or [self._pad_id] for row in rows]

    def embed(self, texts: Sequence[str], *, batch_tokens: int | None = None) -> torch.Tensor:
        """Embeds formatted texts with a gradient: ``[texts, dimensions]``, rows of length 1."""
        return self.embed_tokens(self.tokenize(texts), batch_tokens=batch_tokens)

    def embed_tokens(self, rows: TokenRows, *, batch_tokens: int | None = None) -> torch.Tensor:
        """Embeds tokenised texts with a gradient; see :meth:`tokenize`.

        Returns:
            float32 ``[texts, dimensions]`` on the model's device, every row of length 1.
        """
        if batch_tokens is None:
            batch_tokens = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS_ELSEWHERE)
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens}: it must be at least 1")
        if not rows:
            return torch.zeros(0, self.dimensions, device=self.device)
        self.num_tokens += sum(map(len, rows))
        packed = self.packed and can_pack(self.model)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        batches = list(cut_batches([rows[row] for row in order], batch_tokens, packed))
        if packed:
            vectors = self._embed_packed(batches)
        else:
            vectors = torch.cat([self._embed_padded(batch) for batch in batches])
        return vectors[send(np.argsort(order), self.device)]

    def save(self, folder: str | Path, *, model_card: str, task: str | None = None) -> None:
        """Writes a sentence-transformers folder that :meth:`load` reads too.

        Args:
            folder: Made if missing; files of the same names are replaced.
            model_card: Text of its ``README.md``.
            task: The task in sentence-transformers' ``query`` prompt, where the template has one.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.tokenizer.model_max_length = self.max_tokens
        model = cast(Any, self.model)
        weights = {
            name: weight
            for name, weight in model.state_dict().items()
            if not name.startswith("projection.")
        }
        with no_progress_bars():
            model.save_pretrained(path, state_dict=weights)
            self.tokenizer.save_pretrained(path)
        write_modules(
            path,
            projection=self._projection,
            pooling=self.pooling,
            dimensions=model.config.hidden_size,
        )
        write_settings(
            path,
            tokenizer=self.tokenizer,
            templates=self.templates,
            max_tokens=self.max_tokens,
            task=task,
        )
        (path / "README.md").write_text(model_card, encoding="utf-8")

    @property
    def _projection(self) -> torch.nn.Sequential | None:
        return cast("torch.nn.Sequential | None", getattr(self.model, "projection", None))

    @property
    def _options(self) -> dict[str, bool]:
        # A decoder would keep keys and values for a next token.
        return {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}

    @property
    def _pad_id(self) -> int:
        return self._known(self.tokenizer.pad_token_id) or 0

    @property
    def _unknown_id(self) -> int:
        unknown = self._known(self.tokenizer.unk_token_id)
        return self._pad_id if unknown is None else unknown

    def _known(self, token_id: int | None) -> int | None:
        size = num_embeddings(self.model)
        return None if token_id is None or (size and token_id >= size) else int(token_id)

    def _embed_packed(self, batches: Sequence[TokenRows]) -> torch.Tensor:
        pooled = []
        for batch in batches:
            hidden, layout = packed_forward(self.model, batch, self._options)
            self.num_places += len(hidden)
            pooled.append(pool_packed(hidden.float(), layout, self.pooling))
        return self._finish(torch.cat(pooled))

    def _embed_padded(self, rows: TokenRows) -> torch.Tensor:
        lengths = np.array([len(row) for row in rows])
        attended = np.arange(lengths.max())[None, :] < lengths[:, None]
        ids = np.full(attended.shape, self._pad_id, dtype=np.int64)
        self.num_places += ids.size
        ids[attended] = np.concatenate([np.asarray(row) for row in rows])
        given = send(np.stack([ids, attended]), self.device)
        mask = given[1]
        hidden = self.model(
            input_ids=given[0], attention_mask=mask, **self._options
        ).last_hidden_state.float()
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            return self._finish((hidden * weights).sum(1) / weights.sum(1))
        at = mask.sum(1) - 1 if self.pooling == "lasttoken" else torch.zeros_like(mask[:, 0])
        return self._finish(hidden[torch.arange(len(rows), device=hidden.device), at])

    def _finish(self, pooled: torch.Tensor) -> torch.Tensor:
        if self._projection is not None:
            pooled = self._projection(pooled.to(next(self._projection.parameters()).dtype)).float()
        return functional.normalize(pooled, dim=-1)
