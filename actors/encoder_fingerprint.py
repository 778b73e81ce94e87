"""What identifies a model by its content, so that a result is not taken for another model's."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_NOT_CONTENT = ("_name_or_path", "transformers_version")
_COUNTS = ("num_tokens", "num_places")


def encoder_fingerprint(encoder: Any) -> str | None:
    """Returns a hash of an encoder's weights, tokenizer, pooling, cut and prompts.

    Args:
        encoder: An `actors.encoder.Encoder`; for anything else, such as an endpoint, the content
            cannot be known and the answer is None.
    """
    import torch

    if not isinstance(getattr(encoder, "model", None), torch.nn.Module):
        return getattr(encoder, "fingerprint", None)
    digest = hashlib.sha256()
    for name, value in sorted(vars(encoder).items()):
        if name in _COUNTS:
            continue
        digest.update(name.encode())
        if isinstance(value, torch.nn.Module):
            digest.update(_config(value).encode())
            for key, tensor in value.state_dict().items():
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy())
        elif name == "tokenizer":
            digest.update(_tokenizer(value).encode())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def _tokenizer(tokenizer: Any) -> str:
    """Returns what a tokenizer does, less how long the texts were that it was last given."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = json.loads(backend.to_str()) if backend else {"vocabulary": tokenizer.get_vocab()}
    told = {key: value for key, value in known.items() if key not in ("truncation", "padding")}
    return json.dumps(told, sort_keys=True)


def _config(module: Any) -> str:
    """Returns what a transformer's configuration says, less where it was read from."""
    config = getattr(module, "config", None)
    known = config.to_dict() if config is not None else {}
    told = {key: value for key, value in known.items() if key not in _NOT_CONTENT}
    return json.dumps(told, sort_keys=True, default=str)
