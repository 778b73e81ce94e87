"""What identifies a model by its content, so that a result is not taken for another model's."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.encoder import Encoder

_NOT_CONTENT = ("_name_or_path", "transformers_version")


def encoder_fingerprint(encoder: Encoder) -> str:
    """Returns a hash of an encoder's weights, tokenizer, pooling, token limit and templates."""
    import torch

    digest = hashlib.sha256()
    for content in (
        _config(encoder.model),
        _tokenizer(encoder.tokenizer),
        encoder.pooling,
        str(encoder.max_tokens),
        repr(encoder.templates),
    ):
        digest.update(f"{len(content)} {content}".encode())
    for name, weight in encoder.model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        flat = weight.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _tokenizer(tokenizer: Any) -> str:
    """Returns what a tokenizer does, without the lengths of the texts that it was last given."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = json.loads(backend.to_str()) if backend else {"vocabulary": tokenizer.get_vocab()}
    lasting = {key: value for key, value in known.items() if key not in ("truncation", "padding")}
    return json.dumps(lasting, sort_keys=True)


def _config(model: Any) -> str:
    """Returns what a transformer's configuration says, without where it was read from."""
    config = model.config.to_dict()
    content = {key: value for key, value in config.items() if key not in _NOT_CONTENT}
    return json.dumps(content, sort_keys=True, default=str)
