"""The files of an encoder: a sentence-transformers folder, read and written.

What sentence-transformers computes from a folder is what we compute, or the folder is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from actors.templates import PromptTemplates
from cluster.errors import UserError

POOLINGS = ("mean", "cls", "lasttoken")
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_LEGACY_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": torch.nn.Identity,
    "torch.nn.modules.activation.Tanh": torch.nn.Tanh,
}


def local_folder(resolved: str) -> Path:
    """Returns the folder of a model, fetched from the hub unless it is one already."""
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    # Weights in pickles are left where they are.
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]
    try:
        return Path(snapshot_download(resolved, allow_patterns=patterns))
    except Exception as error:  # the hub's client has no common ancestor for its errors
        reason = " ".join(str(error).split())
        raise UserError(
            f"encoder {resolved!r} is no folder here and the hub did not give it: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object, empty where the file is missing."""
    return (
        cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    )


def read_pooling(folder: Path, model: str, config: Any) -> str:
    """Returns how a folder's vectors are pooled: one of ``POOLINGS``.

    Raises:
        UserError: It is done in another way, or there are modules that we do not know.
    """
    if not (folder / "modules.json").exists():
        decoder = any("CausalLM" in name for name in config.architectures or [])
        return "lasttoken" if decoder and getattr(config, "is_causal", True) else "mean"
    settings: dict[str, Any] = {}
    for kind, path in _modules(folder):
        if kind not in _MODULES:
            raise UserError(
                f"encoder {model!r} has a module {kind!r}: accepted are {', '.join(_MODULES)}"
            )
        if kind == "Pooling":
            settings = read_json(path / "config.json")
    pooling = settings.get("pooling_mode") or [
        _LEGACY_POOLINGS.get(name, name)
        for name, value in settings.items()
        if name.startswith("pooling_mode_") and value is True
    ]
    if isinstance(pooling, list):
        pooling = "+".join(pooling)
    if pooling not in POOLINGS:
        raise UserError(
            f"encoder {model!r} pools by {pooling or 'nothing'!r}: accepted are "
            f"{', '.join(POOLINGS)}"
        )
    return str(pooling)


def read_projection(folder: Path, model: str) -> torch.nn.Sequential | None:
    """Returns the ``Dense`` modules of a folder as layers, None where it has none.

    Raises:
        UserError: A module does more than a product and a known activation.
    """
    from safetensors.torch import load_file

    layers: list[torch.nn.Module] = []
    for kind, path in _modules(folder):
        if kind != "Dense":
            continue
        config = read_json(path / "config.json")
        activation = _ACTIVATIONS.get(config.get("activation_function", ""))
        plain = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
        if activation is None or not plain or config.get("use_residual"):
            raise UserError(
                f"encoder {model!r}: its {path.name} is no plain projection; accepted is a product"
                f" of the pooled vector with activation {' or '.join(_ACTIVATIONS)}"
            )
        if not (path / "model.safetensors").is_file():
            raise UserError(f"encoder {model!r}: its {path.name} has no safetensors weights")
        layer = torch.nn.Linear(
            config["in_features"], config["out_features"], bias=config.get("bias", True)
        )
        weights = load_file(path / "model.safetensors")
        layer.load_state_dict({name.removeprefix("linear."): w for name, w in weights.items()})
        layers += [layer, activation()]
    return torch.nn.Sequential(*layers) if layers else None


def read_templates(folder: Path) -> PromptTemplates:
    """Returns the templates of ``tokay.json``, or those that are sentence-transformers' prompts."""
    own = read_json(folder / "tokay.json")
    if "templates" in own:
        return PromptTemplates(**own["templates"])
    prompts = read_json(folder / "config_sentence_transformers.json").get("prompts", {})
    found = {}
    for role, names in (("query", ["query"]), ("passage", ["document", "passage", "corpus"])):
        prefix = next((prompts[name] for name in names if prompts.get(name)), "")
        found[role] = prefix.replace("{", "{{").replace("}", "}}") + "{text}"
    return PromptTemplates(**found)


def write_modules(
    folder: Path, *, projection: torch.nn.Sequential | None, pooling: str, dimensions: int
) -> None:
    """Writes what comes after the transformer: pooling, projection and normalisation.

    Args:
        folder: Holds the transformer's own files.
        projection: Layers and activations in turns.
        pooling: One of ``POOLINGS``.
        dimensions: Of the pooled vector.
    """
    from safetensors.torch import save_file

    documents: list[tuple[str, str, dict[str, Any]]] = [
        ("", "Transformer", {}),
        (
            "1_Pooling",
            "Pooling",
            {
                "word_embedding_dimension": dimensions,
                **{name: kind == pooling for name, kind in _LEGACY_POOLINGS.items()},
            },
        ),
    ]
    layers = list(projection or [])
    for layer, activation in zip(layers[::2], layers[1::2], strict=True):
        linear = cast(torch.nn.Linear, layer)
        path = f"{len(documents)}_Dense"
        kind = type(activation)
        config = {
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "bias": linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__name__}",
        }
        documents.append((path, "Dense", config))
        (folder / path).mkdir(exist_ok=True)
        weights = {f"linear.{name}": w.contiguous() for name, w in linear.state_dict().items()}
        save_file(weights, folder / path / "model.safetensors")
    documents.append((f"{len(documents)}_Normalize", "Normalize", {}))
    for path, _, config in documents[1:]:
        write_json(folder / path / "config.json", config)
    # The spellings of sentence-transformers 2 are those that every later version reads.
    prefix = "sentence_transformers.models."
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": prefix + kind}
        for index, (path, kind, _) in enumerate(documents)
    ]
    write_json(folder / "modules.json", modules)


def write_settings(
    folder: Path, *, templates: PromptTemplates, max_tokens: int, task: str | None
) -> None:
    """Writes the prompts and limits, in our words and in those of sentence-transformers."""
    import sentence_transformers
    import transformers

    limits = {"max_seq_length": max_tokens, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limits)
    versions = {
        "sentence_transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "pytorch": torch.__version__,
    }
    settings = {
        "__version__": versions,
        "model_type": "SentenceTransformer",
        "prompts": templates.prefixes(task),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", settings)
    own = {"templates": asdict(templates), "max_tokens": max_tokens}
    write_json(folder / "tokay.json", own)


def write_json(path: Path, document: object) -> None:
    """Writes a JSON file and the folder that it is in."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _modules(folder: Path) -> list[tuple[str, Path]]:
    path = folder / "modules.json"
    modules = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [(module["type"].rsplit(".", 1)[-1], folder / module["path"]) for module in modules]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps the bars of transformers, one for each file, off the console."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
