"""A cross-encoder: reads a query and a passage together and says how relevant the passage is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from actors.embedded import resolve_model
from actors.encoder_files import (
    device_and_dtype,
    load_tokenizer,
    load_weights,
    local_folder,
    num_embeddings,
    read_max_tokens,
)
from actors.encoder_folder import read_cross_encoder
from actors.kernels.linear import use_onednn
from actors.kernels.packing import cut_batches, send
from cluster.errors import UserError

# What suits an encoder of the same size: see `actors.encoder`.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ELSEWHERE = 32768


@dataclass(frozen=True, kw_only=True)
class PreparedPairs:
    """Tokenised pairs.

    Attributes:
        ids: Token ids of each pair.
        types: Which of the two texts each token is of; None where the model does not ask.
    """

    ids: list[list[int]]
    types: list[list[int]] | None


class CrossEncoder:
    """A sequence classifier with one output, and its tokenizer; make one with :meth:`load`.

    Attributes:
        model: The classifier.
        tokenizer: Its tokenizer.
        max_tokens: Longer pairs are cut to this many tokens, the longer text first.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int) -> None:
        self.model: Final = model
        self.tokenizer: Final = tokenizer
        self.max_tokens: Final = max_tokens
        if model.device.type == "cpu":
            use_onednn(model)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        max_tokens: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> CrossEncoder:
        """Reads a cross-encoder of sentence-transformers, or any classifier with one output.

        Args:
            model: Folder or hub id.
            max_tokens: Cut pairs here; a model that takes less lowers it.
            dtype: As in :meth:`actors.encoder.Encoder.load`, and so are the next two.
            device: As there.
            trust_remote_code: As there.

        Raises:
            UserError: The model is missing or broken, has no safetensors weights, or is of another
                kind.
        """
        from transformers import AutoModelForSequenceClassification

        chosen, precision = device_and_dtype(device, dtype)
        path = local_folder(resolve_model(model), trust_remote_code=trust_remote_code)
        folder = read_cross_encoder(path, trust_remote_code=trust_remote_code)
        classifier = load_weights(
            AutoModelForSequenceClassification,
            folder.transformer,
            dtype=precision,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(folder, classifier, trust_remote_code=trust_remote_code)
        known = num_embeddings(classifier)
        if known and len(tokenizer) > known:
            raise UserError(
                f"the tokenizer of {folder.transformer} has {len(tokenizer)} tokens and its model"
                f" {known} embeddings: give the model its own tokenizer"
            )
        if classifier.config.pad_token_id is None:  # a decoder finds a text's end by it
            classifier.config.pad_token_id = tokenizer.pad_token_id
        return cls(
            classifier.to(chosen),
            tokenizer,
            max_tokens=read_max_tokens(folder, classifier, tokenizer, max_tokens),
        )

    def score(
        self, pairs: Sequence[tuple[str, str]], *, batch_tokens: int | None = None
    ) -> np.ndarray:
        """Scores pairs of a query and a passage.

        Args:
            pairs: Any number, in any order; sorted by length inside.
            batch_tokens: Tokens, padding included, in one pass; what suits the device if None.
                Changes speed and memory only.

        Returns:
            float32 ``[pairs]``: the model's output, before any activation function; higher is more
            relevant.
        """
        return self.score_prepared(self.prepare(pairs), batch_tokens=batch_tokens)

    def prepare(self, pairs: Sequence[tuple[str, str]]) -> PreparedPairs:
        """Tokenises pairs for :meth:`score_prepared`; another thread may do this meanwhile."""
        if not pairs:
            return PreparedPairs(ids=[], types=None)
        queries, passages = zip(*pairs, strict=True)
        rows = self.tokenizer(
            list(queries),
            list(passages),
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        return PreparedPairs(ids=rows["input_ids"], types=rows.get("token_type_ids"))

    def score_prepared(
        self, pairs: PreparedPairs, *, batch_tokens: int | None = None
    ) -> np.ndarray:
        """Scores tokenised pairs; see :meth:`score`."""
        if not pairs.ids:
            return np.zeros(0, dtype=np.float32)
        if batch_tokens is None:
            batch_tokens = _BATCH_TOKENS.get(self.model.device.type, _BATCH_TOKENS_ELSEWHERE)
        order = sorted(range(len(pairs.ids)), key=lambda pair: -len(pairs.ids[pair]))
        outputs, start = [], 0
        with torch.inference_mode():
            for batch in cut_batches([pairs.ids[pair] for pair in order], batch_tokens, False):
                places = order[start : (start := start + len(batch))]
                outputs.append(self._logits(pairs, places).float())
        scores = np.empty(len(order), dtype=np.float32)
        scores[order] = torch.cat(outputs).cpu().numpy()
        return scores

    def _logits(self, pairs: PreparedPairs, places: Sequence[int]) -> torch.Tensor:
        """Returns the output for each of some pairs, ``[places]``."""
        lengths = np.array([len(pairs.ids[place]) for place in places])
        attended = np.arange(lengths.max())[None, :] < lengths[:, None]
        padding = self.tokenizer.pad_token_id or 0
        given = [_filled(attended, [pairs.ids[place] for place in places], padding), attended]
        if pairs.types is not None:
            given.append(_filled(attended, [pairs.types[place] for place in places], 0))
        tensors = send(np.stack(given), self.model.device)
        names = ("input_ids", "attention_mask", "token_type_ids")
        logits: torch.Tensor = self.model(**dict(zip(names, tensors, strict=False))).logits
        return logits[:, 0]


def _filled(attended: np.ndarray, rows: Sequence[Sequence[int]], padding: int) -> np.ndarray:
    filled = np.full(attended.shape, padding, dtype=np.int64)
    filled[attended] = np.concatenate([np.asarray(row) for row in rows])
    return filled
