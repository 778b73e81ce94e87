"""Tiny models of the kinds that a student may start from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TinyModel = Callable[..., Path]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SHARED_KEYS = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "use_cache": True}
TOKENS = {
    "pad_token_id": 0,
    "cls_token_id": 101,
    "bos_token_id": 101,
    "sep_token_id": 102,
    "eos_token_id": 102,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "max_position_embeddings": 64},
    "electra": {**SIZES, "embedding_size": 16, "max_position_embeddings": 64},
    "roberta": {**SIZES, "max_position_embeddings": 66, "pad_token_id": 1},
    "xlm-roberta": {**SIZES, "max_position_embeddings": 66, "pad_token_id": 1},
    "mpnet": {**SIZES, "max_position_embeddings": 66, "pad_token_id": 1},
    "modernbert": {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2},
    "qwen3": SHARED_KEYS,
    "gemma3_text": {**SHARED_KEYS, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "llama": SHARED_KEYS,
}


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """Writes a plain folder of a tiny random model of a kind, with MiniLM's tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from actors.embedded import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model("embedded:all-MiniLM-L6-v2"))
    tokenizer.model_max_length = 64

    def write(kind: str, folder: Path, **settings: Any) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, **{"vocab_size": len(tokenizer), **TOKENS, **SETTINGS[kind], **settings}
        )
        decoder = "num_key_value_heads" in SETTINGS[kind]
        model = (AutoModelForCausalLM if decoder else AutoModel).from_config(config)
        for name, weight in model.named_parameters():
            if "norm" not in name.lower():  # random weights of 0.02 hardly attend at all
                weight.data.mul_(6)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_classifier(tiny_model: TinyModel) -> Callable[..., Path]:
    """Writes a folder of a tiny random cross-encoder, with MiniLM's tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    def write(folder: Path, **settings: Any) -> Path:
        plain = tiny_model("bert", folder)
        config = AutoConfig.from_pretrained(plain, **{"num_labels": 1, **settings})
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        for name, weight in model.named_parameters():
            if "norm" not in name.lower():
                weight.data.mul_(6)
        model.save_pretrained(folder)
        return folder

    return write
