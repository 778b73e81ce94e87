"""What an encoder folder may say: an allow-list of files, keys and values.

Each is done as sentence-transformers 6 does it, and a test holds the vectors beside its own; the
values that accept one thing alone are what a folder says of itself when it wants nothing special.
Whatever else a folder says is refused by name, for it would give other vectors than its authors
meant. No class is imported and no file opened because a folder names it: its strings are compared
with those below. (Other people's folders: nothing here is trusted.)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from actors.encoder_templates import MAX_TEMPLATE_CHARS

Mode = Literal["mean", "cls", "lasttoken"]
POOLINGS: tuple[Mode, ...] = ("mean", "cls", "lasttoken")
MAX_TOKENS = 1_000_000  # more than any model takes

Size = Annotated[int, Field(ge=1, le=2**20)]
Limit = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Prompt = Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS // 2)]
Vector = Literal["sentence_embedding"]
Precision = Literal["auto", "float32", "float16", "bfloat16"]
Empty = Annotated[dict[str, Any], Field(max_length=0)]
Activation = Literal[
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.activation.Tanh",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.activation.Sigmoid",
]


class File(BaseModel):
    """What a file, or a part of it, may hold."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Module(File):
    """One of ``modules.json``'s list; ``type`` is one of ``MODULES``."""

    idx: int = 0
    name: str
    path: str
    type: str
    kwargs: Annotated[list[str], Field(max_length=0)] = []


# Each kind by the names of sentence-transformers 1 to 5, of 6 as it writes them, and for short.
MODULE_NAMES = {
    "Transformer": "base.modules.transformer.Transformer",
    "Pooling": "sentence_transformer.modules.pooling.Pooling",
    "Dense": "base.modules.dense.Dense",
    "Normalize": "base.modules.normalize.Normalize",
}
MODULES = {
    f"sentence_transformers.{name}": kind
    for kind, new in MODULE_NAMES.items()
    for name in (f"models.{kind}", new, f"sentence_transformer.modules.{kind}")
}


class _Text(File):
    method: Literal["forward"]
    method_output_name: Literal["last_hidden_state"]


class _Modalities(File):
    text: _Text


class _ModelArguments(File):
    # None of them changes the last layer's states, but for their precision; that is ours to say.
    trust_remote_code: bool = False  # sentence-transformers does not obey it either
    dtype: Precision | None = None
    torch_dtype: Precision | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    add_pooling_layer: bool = False


class _TokenizerArguments(File):
    trust_remote_code: bool = False
    padding_side: Literal["left", "right"] = "right"  # the same vectors


class _ConfigArguments(File):
    trust_remote_code: bool = False
    use_cache: bool = False


class TransformerSettings(File):
    """``sentence_bert_config.json``, beside the transformer's own files."""

    max_seq_length: Limit | None = None
    do_lower_case: bool = False
    transformer_task: Literal["feature-extraction"] = "feature-extraction"
    modality_config: _Modalities | None = None
    module_output_name: Literal["token_embeddings"] = "token_embeddings"
    processing_kwargs: Empty | None = None
    unpad_inputs: bool | None = None  # speed alone
    query_length: None = None
    document_length: None = None
    query_expansion: None = None
    tokenizer_name_or_path: None = None
    model_args: _ModelArguments | None = None
    model_kwargs: _ModelArguments | None = None
    tokenizer_args: _TokenizerArguments | None = None
    processor_kwargs: _TokenizerArguments | None = None
    config_args: _ConfigArguments | None = None
    config_kwargs: _ConfigArguments | None = None


SETTINGS_FILES = tuple(  # the first that is there, as in sentence-transformers
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


class _Logits(File):
    method: Literal["forward"]
    method_output_name: Literal["logits"]


class _LogitModalities(File):
    text: _Logits


class ClassifierSettings(TransformerSettings):
    """The same beside a cross-encoder, as sentence-transformers 6 writes it."""

    transformer_task: Literal["sequence-classification"] = "sequence-classification"  # type: ignore[assignment]
    modality_config: _LogitModalities | None = None  # type: ignore[assignment]
    module_output_name: Literal["scores"] = "scores"  # type: ignore[assignment]


class Pooling(File):
    """``N_Pooling/config.json``."""

    embedding_dimension: Size | None = None
    word_embedding_dimension: Size | None = None
    pooling_mode: Mode | None = None
    pooling_mode_mean_tokens: bool = False
    pooling_mode_cls_token: bool = False
    pooling_mode_lasttoken: bool = False
    pooling_mode_max_tokens: Literal[False] = False
    pooling_mode_mean_sqrt_len_tokens: Literal[False] = False
    pooling_mode_weightedmean_tokens: Literal[False] = False
    include_prompt: Literal[True] = True

    @field_validator("pooling_mode", mode="before")
    @classmethod
    def _one(cls, mode: Any) -> Any:
        return mode[0] if isinstance(mode, list) and len(mode) == 1 else mode

    @property
    def modes(self) -> list[Mode]:
        """What the old keys or the new one say; the mean if nothing does."""
        if self.pooling_mode is not None:
            return [self.pooling_mode]
        old = {
            "cls": self.pooling_mode_cls_token,
            "mean": self.pooling_mode_mean_tokens,
            "lasttoken": self.pooling_mode_lasttoken,
        }
        return [mode for mode in POOLINGS if old[mode]] or ["mean"]


class Dense(File):
    """``N_Dense/config.json``; its weights are ``N_Dense/model.safetensors``."""

    in_features: Size
    out_features: Size
    bias: bool = True
    activation_function: Activation = "torch.nn.modules.activation.Tanh"
    module_input_name: Vector = "sentence_embedding"
    module_output_name: Vector | None = None
    use_residual: Literal[False] = False


class Normalize(File):
    """``N_Normalize/config.json``, which need not be there."""

    module_input_name: Vector = "sentence_embedding"
    module_output_name: Vector | None = None


class Settings(File):
    """``config_sentence_transformers.json``."""

    version: dict[str, Any] = Field(default={}, alias="__version__")
    model_type: Literal["SentenceTransformer"] = "SentenceTransformer"
    prompts: dict[str, Prompt | None] = {}
    default_prompt_name: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean"] | None = None
    truncate_dim: Size | None = None
    requirements: Empty | None = None


class CrossEncoderSettings(File):
    """``config_sentence_transformers.json`` of a cross-encoder."""

    version: dict[str, Any] = Field(default={}, alias="__version__")
    model_type: Literal["CrossEncoder"] = "CrossEncoder"
    # None is put before a pair, unless there is a default. The activation comes after our scores.
    prompts: dict[str, Prompt | None] = {}
    default_prompt_name: None = None
    activation_fn: str | None = None
    keep_in_fp32_modules: Annotated[list[str], Field(max_length=0)] | None = None
    requirements: Empty | None = None


class _Templates(File):
    query: str = "{text}"
    passage: str = "{text}"


class OwnSettings(File):
    """``tokay.json``, which rules over the prompts of sentence-transformers."""

    templates: _Templates | None = None
    max_tokens: Limit | None = None


class Index(File):
    """``model.safetensors.index.json``."""

    metadata: dict[str, Any] = {}
    weight_map: dict[str, Annotated[str, Field(pattern=r"^[\w-][\w.-]*\.safetensors$")]]
