"""The files of an encoder: a sentence-transformers folder, its weights read, and written.

What sentence-transformers computes from a folder is what we compute, or the folder is refused;
:mod:`actors.encoder_settings` says which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch.nn import functional

from actors.encoder_folder import EncoderFolder
from actors.encoder_settings import MAX_TOKENS, Activation, Dense
from actors.encoder_templates import PromptTemplates
from actors.kernels.linear import native_bfloat16
from actors.kernels.packing import first_position
from actors.model_files import (
    brief,
    check_no_pointer,
    check_safetensors,
    check_weights,
    read_object,
)
from cluster.errors import UserError

# Of a plain model that does not say how long its texts may be.
_PLAIN_TOKENS = 256
_ACTIVATIONS = {name: getattr(torch.nn, name.rpartition(".")[2]) for name in get_args(Activation)}
# The keys of sentence-transformers 2 to 5, which 6 reads too.
_POOLING_KEYS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}


class UnitLength(torch.nn.Module):
    """Makes vectors ``[..., dimensions]`` of length 1: a ``Normalize`` that others follow."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns them divided by their lengths."""
        return functional.normalize(vectors, dim=-1)


def local_folder(resolved: str, *, trust_remote_code: bool = False) -> Path:
    """Returns the folder of a model, fetched from the hub unless it is one already."""
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    # Weights in pickles are left where they are, and so is code that will not run.
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    patterns += ["*.py"] if trust_remote_code else []
    try:
        return Path(snapshot_download(resolved, allow_patterns=patterns))
    except Exception as error:  # the hub's client has no common ancestor for its errors
        reason = " ".join(str(error).split())
        raise UserError(
            f"encoder {resolved!r} is no folder here and the hub did not give it: {reason}"
        ) from error


def device_and_dtype(device: str | None, dtype: str) -> tuple[str, torch.dtype]:
    """Returns where a model computes and in what; see :meth:`actors.encoder.Encoder.load`."""
    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise UserError(f"dtype {dtype!r}: accepted are float32, bfloat16, float16 and auto")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16(torch.device(chosen)) else "float32"
    return chosen, getattr(torch, dtype)


def load_transformer(folder: EncoderFolder, *, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Loads the transformer of a folder, with every weight that it computes with, as `dtype`.

    Raises:
        UserError: Weights are missing or broken, or it makes no states of tokens.
    """
    from transformers import AutoModel

    path = folder.transformer
    # Nothing is computed with a pooler.
    transformer = load_weights(
        AutoModel, path, dtype=dtype, trust_remote_code=trust_remote_code, unused=("pooler.",)
    )
    _try(transformer, path)
    return transformer


def load_weights(
    kind: Any,
    path: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    unused: tuple[str, ...] = (),
) -> Any:
    """Loads a model with all its weights, but for those whose names begin with `unused`.

    Args:
        kind: One of the classes of transformers that load by a folder's config.json.
        path: The folder.
        dtype: Of the weights.
        trust_remote_code: Run Python code that comes with the model.
        unused: Beginnings of names.

    Raises:
        UserError: Weights are missing or broken, or the model decodes what an encoder has read.
    """
    from transformers import AutoConfig

    check_weights(path)
    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if config.is_encoder_decoder:
            raise _other_kind(path, config)
        with no_progress_bars():
            model, loading = kind.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below
            )
    except UserError:
        raise
    except Exception as error:  # transformers has none of its own, and the files are anybody's
        raise UserError(f"encoder {path} cannot be loaded: {brief(error)}") from error
    # transformers draws at random what it does not find.
    other = [f"{name} of shape {list(shape)}" for name, shape, _ in loading["mismatched_keys"]]
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(unused))
    if other or missing:
        raise UserError(
            f"{path}: its weights are not those of the model that config.json describes:"
            f" {len(missing)} are missing and {len(other)} have other shapes, such as"
            f" {[*missing, *other][0]}: fetch the model again"
        )
    return model.eval()


def _try(transformer: Any, path: Path) -> None:
    """Raises UserError unless a model makes a state of a token."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    try:
        with torch.inference_mode():
            output = transformer(input_ids=ids, attention_mask=torch.ones_like(ids))
        shape = tuple(output.last_hidden_state.shape)
        whole = shape == (1, 1, transformer.config.hidden_size)
    except Exception as error:  # whatever a model of images says to tokens
        raise _other_kind(path, transformer.config) from error
    if not whole:
        raise _other_kind(path, transformer.config)


def _other_kind(path: Path, config: Any) -> UserError:
    return UserError(
        f"{path / 'config.json'}: model_type {brief(config.model_type)}: accepted are encoders"
        " (BERT and its like) and decoders (Qwen, Llama, Gemma) of texts"
    )


def load_tokenizer(folder: EncoderFolder, transformer: Any, *, trust_remote_code: bool) -> Any:
    """Loads a folder's tokenizer, and sees that it is the transformer's.

    Raises:
        UserError: It is missing or broken, or of another model.
    """
    from transformers import AutoTokenizer

    path = folder.transformer
    for name in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"):
        check_no_pointer(path / name)
    for file in path.glob("*.model"):
        check_no_pointer(file)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        vocabulary = tokenizer.get_vocab()
    except Exception as error:  # as above; tokenizers raises plain Exception
        raise UserError(f"the tokenizer of {path} cannot be loaded: {brief(error)}") from error
    added = tokenizer.get_added_vocab()
    highest = max((id_ for token, id_ in vocabulary.items() if token not in added), default=-1)
    rows = num_embeddings(transformer) or MAX_TOKENS
    # Added tokens without an embedding are known by the tokenizer's length, as they come last.
    scattered = len(tokenizer) <= rows <= max(added.values(), default=-1)
    if highest < 0 or highest >= rows or scattered:
        raise UserError(
            f"the tokenizer of {path} has ids up to {highest} and its model has {rows} embeddings:"
            " give the model its own tokenizer"
        )
    # The right side: the same positions in any batch; a decoder sees nothing behind a token.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # some decoders'; libraries want one to fill a batch
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if folder.settings.do_lower_case and not lowers_case(tokenizer):
        _lower_case(tokenizer, path)
    _check_tokens(tokenizer, path)
    return tokenizer


def _check_tokens(tokenizer: Any, path: Path) -> None:
    """Raises UserError where a tokenizer's files do not say what becomes of a text."""
    given = tokenizer("a", return_token_type_ids=True)
    types = given.get("token_type_ids") or [0]
    if any(types) and "token_type_ids" in tokenizer.model_input_names:
        raise UserError(
            f"the tokenizer of {path} gives token types {brief(types, 60)}: accepted are zeros"
        )
    file = path / "tokenizer_config.json"
    said = read_object(file)
    for key, token in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        added = getattr(tokenizer, f"{token}_id") in given["input_ids"]
        if said.get(key) is True and not added:
            raise UserError(
                f"{file}: {key} true: the tokenizer adds no {getattr(tokenizer, token)!r}: write"
                " the post_processor of its tokenizer.json anew, or take this key out"
            )


def read_max_tokens(
    folder: EncoderFolder, transformer: Any, tokenizer: Any, asked: int | None
) -> int:
    """Returns where texts are cut.

    Args:
        folder: What it says holds; a plain model that says nothing takes 256 tokens.
        transformer: Its number of positions is a limit.
        tokenizer: Its own limit holds too.
        asked: No more than these.

    Raises:
        UserError: Nothing of a text would be left.
    """
    said = [limit for limit in (folder.settings.max_seq_length, folder.max_tokens) if limit]
    longest = min([MAX_TOKENS, tokenizer.model_max_length, *_num_positions(transformer), *said])
    if asked is None and not said and not folder.listed:
        asked = _PLAIN_TOKENS
    limit = int(min(longest, asked)) if asked is not None else int(longest)
    special = tokenizer.num_special_tokens_to_add()
    if limit <= special:
        key = "max_tokens" if asked is not None and asked <= special else "max_seq_length"
        raise UserError(
            f"encoder {folder.transformer}: {key} {limit}: its tokenizer adds {special} tokens to a"
            f" text, so accepted are whole numbers from {special + 1}"
        )
    return limit


def read_projection(folder: EncoderFolder, hidden_size: int) -> torch.nn.Sequential | None:
    """Returns what is done to a pooled vector before it is made of length 1, None for nothing.

    Raises:
        UserError: Weights are missing, broken, or of another shape.
    """
    size = hidden_size
    layers: list[torch.nn.Module] = []
    for described in folder.layers:
        if described is None:
            layers.append(UnitLength())
            continue
        path, dense = described
        if dense.in_features != size:
            raise UserError(
                f"{path / 'config.json'}: in_features {dense.in_features}: what comes before it"
                f" gives {size} dimensions"
            )
        size = dense.out_features
        layers.append(_linear(path / "model.safetensors", dense))
        layers.append(_ACTIVATIONS[dense.activation_function]())
    if folder.truncate_dim is not None and folder.truncate_dim < size:
        first = torch.nn.Linear(size, folder.truncate_dim, bias=False)
        torch.nn.init.eye_(first.weight)
        layers += [first, torch.nn.Identity()]
    while layers and isinstance(layers[-1], UnitLength):  # we end so ourselves
        layers.pop()
    return torch.nn.Sequential(*layers) if layers else None


def write_modules(
    folder: Path, *, projection: torch.nn.Sequential | None, pooling: str, dimensions: int
) -> None:
    """Writes what comes after the transformer: pooling, projection and normalisation.

    Each layer of the projection has its activation behind it, but for ``UnitLength``. A pooled
    vector has so many `dimensions`.
    """
    from safetensors.torch import save_file

    documents: list[tuple[str, str, dict[str, Any]]] = [
        ("", "Transformer", {}),
        (
            "1_Pooling",
            "Pooling",
            {
                "word_embedding_dimension": dimensions,
                **{name: kind == pooling for name, kind in _POOLING_KEYS.items()},
            },
        ),
    ]
    layers = iter(projection or [])
    for layer in layers:
        if isinstance(layer, UnitLength):
            documents.append((f"{len(documents)}_Normalize", "Normalize", {}))
            continue
        linear, activation = cast(torch.nn.Linear, layer), type(next(layers))
        path = f"{len(documents)}_Dense"
        config = {
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "bias": linear.bias is not None,
            "activation_function": f"{activation.__module__}.{activation.__name__}",
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
    folder: Path, *, tokenizer: Any, templates: PromptTemplates, max_tokens: int, task: str | None
) -> None:
    """Writes the prompts and limits, in our words and in those of sentence-transformers."""
    import sentence_transformers
    import transformers

    limits = {"max_seq_length": max_tokens, "do_lower_case": lowers_case(tokenizer)}
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


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps the bars of transformers, one for each file, and its reports off the console."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def num_embeddings(transformer: Any) -> int | None:
    """Returns how many token ids a transformer knows, None for code that does not say."""
    try:
        table = transformer.get_input_embeddings()
    except NotImplementedError:  # of models that bring their own code
        return None
    return getattr(table, "num_embeddings", None)


def lowers_case(tokenizer: Any) -> bool:
    """Says whether a step of its own makes every text lower case."""
    from tokenizers.normalizers import Lowercase, Sequence

    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    steps = [*cast(Any, normalizer)] if isinstance(normalizer, Sequence) else [normalizer]
    return any(isinstance(step, Lowercase) for step in steps)


def _lower_case(tokenizer: Any, path: Path) -> None:
    """Lets a tokenizer lower the case first, where sentence-transformers has it done."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{path}: do_lower_case true: the model's tokenizer cannot do it")
    normalizer = backend.normalizer
    steps = [*cast(Any, normalizer)] if isinstance(normalizer, Sequence) else [normalizer]
    backend.normalizer = Sequence([Lowercase(), *(step for step in steps if step is not None)])


def _num_positions(transformer: Any) -> list[int]:
    """Returns how many tokens a transformer has positions for, as often as it says so."""
    said = getattr(transformer.config, "max_position_embeddings", None)
    counts = (
        [said - first_position(transformer.config)] if isinstance(said, int) and said > 0 else []
    )
    for module in transformer.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            # RoBERTa's kinds, MPNet too, count from behind the padding token's number.
            padding = getattr(module, "padding_idx", None)
            first = padding + 1 if isinstance(padding, int) else 0
            counts.append(table.num_embeddings - first)
    return counts


def _linear(file: Path, dense: Dense) -> torch.nn.Linear:
    from safetensors.torch import load_file

    check_safetensors(file)
    weights = load_file(file)
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    expected = {"linear.weight": [dense.out_features, dense.in_features]}
    if dense.bias:
        expected["linear.bias"] = [dense.out_features]
    if shapes != expected:
        raise UserError(f"{file} holds {brief(shapes)}: its config.json asks for {brief(expected)}")
    layer = torch.nn.Linear(dense.in_features, dense.out_features, bias=dense.bias, device="meta")
    parameters = {name.removeprefix("linear."): weight for name, weight in weights.items()}
    layer.load_state_dict(parameters, assign=True)
    return layer
