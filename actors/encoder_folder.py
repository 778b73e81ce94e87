"""An encoder folder, read against the allow-list of :mod:`actors.encoder_settings`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter

from actors.encoder_settings import (
    MODULE_NAMES,
    MODULES,
    POOLINGS,
    SETTINGS_FILES,
    ClassifierSettings,
    CrossEncoderSettings,
    Dense,
    Mode,
    Module,
    Normalize,
    OwnSettings,
    Pooling,
    Settings,
    TransformerSettings,
)
from actors.encoder_templates import PromptTemplates
from actors.model_files import brief, checked, read_checked, read_json, read_object
from cluster.errors import UserError

_REST: dict[str, type[Dense | Normalize]] = {"Dense": Dense, "Normalize": Normalize}
ROLE_PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}


@dataclass(frozen=True, kw_only=True)
class EncoderFolder:
    """What an encoder folder says, each part of it known to be done here.

    Attributes:
        transformer: Folder of the transformer and its tokenizer.
        listed: Whether ``modules.json`` is there; without it the folder is a plain model.
        pooling: None where the folder does not say.
        layers: What comes behind the pooling, in its order: the folder of each ``Dense`` with its
            configuration, None for each ``Normalize``.
        settings: Of the transformer.
        truncate_dim: How many dimensions are kept in the end; None for all.
        templates: Of ``tokay.json``, or made of sentence-transformers' prompts.
        max_tokens: Of ``tokay.json``.
    """

    transformer: Path
    listed: bool
    pooling: Mode | None
    layers: Sequence[tuple[Path, Dense] | None]
    settings: TransformerSettings
    truncate_dim: int | None
    templates: PromptTemplates
    max_tokens: int | None


def read_folder(folder: Path, *, trust_remote_code: bool = False) -> EncoderFolder:
    """Reads the configuration of an encoder folder; no weights and no tokenizer.

    Raises:
        UserError: It is broken or says what is not done here.
    """
    modules = read_modules(folder)
    kinds = [kind for kind, _ in modules]
    if modules and (kinds[:2] != ["Transformer", "Pooling"] or not {*kinds[2:]} <= _REST.keys()):
        raise UserError(
            f"{folder / 'modules.json'}: modules {brief(kinds, 100)}: accepted are a Transformer, a"
            " Pooling, and then any number of Dense and Normalize"
        )
    transformer = modules[0][1] if modules else folder
    check_transformer(transformer, trust_remote_code)
    named = next((name for name in SETTINGS_FILES if (transformer / name).is_file()), "")
    settings = read_checked(transformer / (named or SETTINGS_FILES[0]), TransformerSettings)
    pooling = _pooling(modules[1][1] / "config.json") if modules else None
    rest = [(path, read_checked(path / "config.json", _REST[kind])) for kind, path in modules[2:]]
    layers = [(path, read) if isinstance(read, Dense) else None for path, read in rest]
    path = folder / "config_sentence_transformers.json"
    shared = read_checked(path, Settings)
    scores_lengths = shared.similarity_fn_name not in (None, "cosine")
    if scores_lengths and (shared.truncate_dim or not layers or layers[-1] is not None):
        raise UserError(
            f"{path}: similarity_fn_name {shared.similarity_fn_name!r} without a Normalize at"
            " the end: vectors have length 1 here, so that it would give other scores; accepted is"
            " 'cosine'"
        )
    own = read_checked(folder / "tokay.json", OwnSettings)
    templates = _own_templates(folder, own) if own.templates else _prompts(path, shared)
    return EncoderFolder(
        transformer=transformer,
        listed=bool(modules),
        pooling=pooling,
        layers=layers,
        settings=settings,
        truncate_dim=shared.truncate_dim,
        templates=templates,
        max_tokens=own.max_tokens,
    )


def read_cross_encoder(folder: Path, *, trust_remote_code: bool = False) -> EncoderFolder:
    """Reads the configuration of a cross-encoder's folder; no weights and no tokenizer.

    Raises:
        UserError: It is broken, says what is not done here, or is no classifier with one output.
    """
    modules = read_modules(folder)
    kinds = [kind for kind, _ in modules]
    if modules and kinds != ["Transformer"]:
        raise UserError(
            f"{folder / 'modules.json'}: modules {brief(kinds, 100)}: accepted is a Transformer"
            " alone, which is a sequence classifier"
        )
    path = modules[0][1] if modules else folder
    check_transformer(path, trust_remote_code)
    config = read_object(path / "config.json")
    labels = config.get("id2label")
    num_outputs = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if num_outputs != 1:
        raise UserError(
            f"{path / 'config.json'}: a model with {brief(num_outputs, 20)} labels: accepted are"
            " cross-encoders, sequence classifiers with one (num_labels 1)"
        )
    named = next((name for name in SETTINGS_FILES if (path / name).is_file()), SETTINGS_FILES[0])
    read_checked(folder / "config_sentence_transformers.json", CrossEncoderSettings)
    return EncoderFolder(
        transformer=path,
        listed=True,  # as long as its positions allow, where nothing is said
        pooling=None,
        layers=(),
        settings=read_checked(path / named, ClassifierSettings),
        truncate_dim=None,
        templates=PromptTemplates(),
        max_tokens=None,
    )


_MODULE_LIST = TypeAdapter(list[Module])


def read_modules(folder: Path) -> list[tuple[str, Path]]:
    """Returns the kind and folder of each module; none where the folder is a plain model.

    Raises:
        UserError: A module is of an unknown kind, or lies elsewhere.
    """
    file = folder / "modules.json"
    given = read_json(file)
    if given is None and not file.exists():
        return []
    modules = checked(file, given, _MODULE_LIST)
    for module in modules:
        if module.type not in MODULES:
            raise UserError(
                f"{file}: type {brief(module.type, 100)}: accepted are {', '.join(MODULE_NAMES)} of"
                " sentence_transformers.models"
            )
    if not modules:
        raise UserError(f"{file}: it lists no module: fetch the model again")
    if len({module.name for module in modules}) < len(modules):
        raise UserError(f"{file}: two modules have one name: give each its own")
    return [(MODULES[module.type], _inside(folder, module, file)) for module in modules]


def _inside(folder: Path, module: Module, file: Path) -> Path:
    path = PurePosixPath(module.path)
    wrong = path.is_absolute() or ".." in path.parts or "\\" in module.path or "\0" in module.path
    if wrong or not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{file}: path {brief(module.path, 100)}: accepted is a folder inside the model's own"
        )
    return folder / path


def _pooling(path: Path) -> Mode:
    if not path.is_file():
        raise UserError(f"{path} is missing: fetch the model again")
    modes = read_checked(path, Pooling).modes
    if len(modes) > 1:
        raise UserError(
            f"{path}: it pools by {'+'.join(modes)}: accepted is one of {', '.join(POOLINGS)}"
        )
    return modes[0]


def check_transformer(folder: Path, trust_remote_code: bool) -> None:
    """Raises UserError where a transformer's configuration asks for what is not done here."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    config = read_object(path)
    if not config:
        raise UserError(f"{path} is missing or empty: give a folder that holds a whole model")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds adapters (adapter_config.json) of another model: merge them into it"
            " (merge_and_unload of peft) and give the merged model"
        )
    tokenizer = read_object(folder / "tokenizer_config.json")
    for name, given in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if given.get("auto_map") and not trust_remote_code:
            raise UserError(
                f"{folder / name}: auto_map {brief(given['auto_map'], 100)}: the model comes with"
                " Python code of its own, which runs only where trust_remote_code says so"
            )
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(
            f"{path}: model_type {brief(kind, 60)}: accepted is the name of a kind of model in"
            " transformers, such as 'bert'"
        )
    if kind not in CONFIG_MAPPING and not (trust_remote_code and config.get("auto_map")):
        raise UserError(
            f"{path}: model_type {brief(kind, 60)}: transformers knows no model of this kind"
        )
    # Other weights than those that are checked; code of the hub in place of attention.
    for key in ("transformers_weights", "_attn_implementation", "attn_implementation"):
        if config.get(key) not in (None, "eager", "sdpa", "flash_attention_2"):
            raise UserError(f"{path}: {key} {brief(config[key], 60)}: take this key out")
    limit = tokenizer.get("model_max_length")
    number = isinstance(limit, int | float) and not isinstance(limit, bool) and limit >= 1
    if limit is not None and not number:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: model_max_length {brief(limit, 60)}: accepted"
            " are whole numbers from 1"
        )


def _own_templates(folder: Path, own: OwnSettings) -> PromptTemplates:
    assert own.templates is not None
    try:
        return PromptTemplates(query=own.templates.query, passage=own.templates.passage)
    except ValueError as error:
        raise UserError(f"{folder / 'tokay.json'}: templates: {error}") from error


def _prompts(path: Path, shared: Settings) -> PromptTemplates:
    """Makes templates of prompts.

    ``encode`` of sentence-transformers puts the default prompt before every text, ``encode_query``
    and ``encode_document`` put none that is not named for them: where both could be meant, neither
    is guessed.
    """
    default = shared.default_prompt_name
    if default is not None and default not in {**shared.prompts, "query": "", "document": ""}:
        raise UserError(
            f"{path}: default_prompt_name {brief(default, 60)}: accepted is null or one of"
            f" {brief(sorted(shared.prompts), 200)}"
        )
    prompts = {
        role: next((prompt for name in names if (prompt := shared.prompts.get(name))), "")
        for role, names in ROLE_PROMPTS.items()
    }
    if default and default not in {name for names in ROLE_PROMPTS.values() for name in names}:
        if any(prompts.values()):
            raise UserError(
                f"{path}: default_prompt_name {brief(default, 60)} beside prompts named for queries"
                " or passages: accepted is one or the other"
            )
        prompts = dict.fromkeys(ROLE_PROMPTS, shared.prompts[default] or "")
    return PromptTemplates(
        **{
            role: prompt.replace("{", "{{").replace("}", "}}") + "{text}"
            for role, prompt in prompts.items()
        }
    )
