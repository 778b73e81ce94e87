"""One text encoder for training, mining, evaluation, export and serving.

The same few lines turn a text into a vector everywhere, so the model that is measured is the model
that was trained and the one that is served. A folder that it saves is a sentence-transformers
model, and reading that folder with sentence-transformers gives the same vectors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional

from actors.embedded import resolve_model
from cluster.errors import UserError

POOLINGS = ("mean", "cls", "lasttoken")
# Activations of 2048 tokens stay in a CPU's cache: 1.4 times the speed of 8192 for MiniLM.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ELSEWHERE = 16384
_MODULES = ("Transformer", "Pooling", "Normalize")
_LEGACY_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}
_NO_TITLE = "none"


@dataclass(frozen=True, kw_only=True)
class PromptTemplates:
    """What surrounds a text before it is embedded, by its role.

    Gecko's format (arXiv 2403.20327, section 4) is ``task: {task} | query: {text}`` and
    ``title: {title} | text: {text}``.

    Attributes:
        query: Template with ``{text}`` and perhaps ``{task}``.
        passage: Template with ``{text}`` and perhaps ``{title}``.
    """

    query: str = "{text}"
    passage: str = "{text}"

    def __post_init__(self) -> None:
        for name, other in (("query", "task"), ("passage", "title")):
            template = getattr(self, name)
            fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
            if fields.count("text") != 1 or not set(fields) <= {"text", other}:
                raise ValueError(
                    f"{name} template {template!r}: it must hold {{text}} once and may hold "
                    f"{{{other}}}; write other braces twice"
                )

    def format_query(self, text: str, *, task: str) -> str:
        """Returns the query as the encoder reads it."""
        return self.query.format(text=text, task=task)

    def format_passage(self, text: str, title: str | None = None) -> str:
        """Returns the passage as the encoder reads it.

        A missing title reads ``none`` where the template names it (``title: {title}``), as in
        EmbeddingGemma, and is left out elsewhere.
        """
        missing = _NO_TITLE if "title:" in self.passage else ""
        # Only on the left: sentence-transformers' prompt is this of an empty text.
        return self.passage.format(text=text, title=title or missing).lstrip()

    def prefixes(self, task: str | None) -> dict[str, str]:
        """Returns sentence-transformers' prompts, for those templates that are a fixed prefix.

        Args:
            task: The task that a query has where nobody names one; None where there is none.
        """
        found = {}
        if self.query.endswith("{text}") and (task is not None or "{task}" not in self.query):
            found["query"] = self.format_query("", task=task or "")
        if self.passage.endswith("{text}"):
            found["document"] = self.format_passage("")
        return found


class Encoder:
    """A transformer, its tokenizer, a pooling and the prompts it was trained with.

    Make one with :meth:`load`.

    Attributes:
        model: The transformer, to be trained in place.
        tokenizer: Its tokenizer.
        pooling: ``mean``, ``cls`` or ``lasttoken``.
        max_tokens: Longer texts are cut to this many tokens.
        templates: What :meth:`encode_queries` and :meth:`encode_passages` put around a text.
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
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.templates = templates

    @property
    def num_parameters(self) -> int:
        """Weights of the transformer."""
        return sum(weights.numel() for weights in self.model.parameters())

    @classmethod
    def load(
        cls,
        model: str,
        *,
        max_tokens: int = 256,
        dtype: str = "float32",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> Encoder:
        """Reads a sentence-transformers or a plain Hugging Face model.

        Pooling comes from the sentence-transformers configuration; without one it is the last token
        for a decoder and the mean for everything else. Templates come from ``tokay.json``, or from
        sentence-transformers' prompts.

        Args:
            model: Folder, hub id, or ``embedded:NAME``.
            max_tokens: Cut texts here; a model that takes less lowers it.
            dtype: ``float32``, ``bfloat16``, ``float16``; or ``auto``, which is bfloat16 where the
                hardware multiplies it natively and float32 elsewhere.
            device: ``cpu``, ``cuda``, ``cuda:1``; the GPU where there is one if None.
            trust_remote_code: Run Python code that comes with the model.

        Raises:
            UserError: The model is missing, has no safetensors weights, or is of an unknown kind.
        """
        from transformers import AutoModel, AutoTokenizer

        if dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise UserError(f"dtype {dtype!r}: accepted are float32, bfloat16, float16 and auto")
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "bfloat16" if native_bfloat16(torch.device(chosen)) else "float32"
        folder = _local_folder(resolve_model(model))
        try:
            with _no_progress_bars():
                transformer = AutoModel.from_pretrained(
                    folder,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                )
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=trust_remote_code
                )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"encoder {model!r} cannot be loaded: {reason}") from error
        # The right side: the same positions in any batch; a decoder sees nothing behind a token.
        tokenizer.padding_side = "right"
        own = _read_json(folder / "tokay.json")
        sentence = _read_json(folder / "sentence_bert_config.json")
        limits = [
            max_tokens,
            tokenizer.model_max_length,
            getattr(transformer.config, "max_position_embeddings", None),
            sentence.get("max_seq_length"),
            own.get("max_tokens"),
        ]
        return cls(
            transformer.to(chosen).eval(),
            tokenizer,
            pooling=_read_pooling(folder, model, transformer.config),
            max_tokens=min(int(limit) for limit in limits if limit),
            templates=_read_templates(folder, own),
        )

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(cast(Any, self.model.config).hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def encode(self, texts: Sequence[str], *, batch_tokens: int | None = None) -> np.ndarray:
        """Embeds texts that are already formatted.

        Args:
            texts: Any number, in any order; sorted by length inside.
            batch_tokens: Tokens, padding included, in one pass; what suits the device if None.
                Changes speed and memory only.

        Returns:
            float32 ``[texts, dimensions]``, every row of length 1.
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                return self.embed(texts, batch_tokens=batch_tokens).float().cpu().numpy()
        finally:
            self.model.train(training)

    def encode_queries(self, queries: Sequence[str], *, task: str) -> np.ndarray:
        """Embeds queries of one task; see :meth:`encode`."""
        return self.encode([self.templates.format_query(query, task=task) for query in queries])

    def encode_passages(
        self, texts: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Embeds passages, with their titles where the template has a place for them."""
        pairs = zip(texts, titles or [None] * len(texts), strict=True)
        return self.encode([self.templates.format_passage(text, title) for text, title in pairs])

    def tokenize(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[list[int]]:
        """Returns the token ids of each text, cut to ``max_tokens`` and never empty."""
        if not texts:
            return []
        limit = min(max_tokens or self.max_tokens, self.max_tokens)
        rows = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=limit,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        # A decoder's tokenizer makes nothing of an empty text, and nothing has no vector.
        return [row or [self._pad_id] for row in rows]

    def embed(self, texts: Sequence[str], *, batch_tokens: int | None = None) -> torch.Tensor:
        """Embeds formatted texts with a gradient: ``[texts, dimensions]``, rows of length 1."""
        return self.embed_tokens(self.tokenize(texts), batch_tokens=batch_tokens)

    def embed_tokens(
        self, rows: Sequence[Sequence[int]], *, batch_tokens: int | None = None
    ) -> torch.Tensor:
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
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        parts = []
        start = 0
        while start < len(order):
            size = max(1, batch_tokens // len(rows[order[start]]))
            parts.append(self._forward([rows[row] for row in order[start : start + size]]))
            start += size
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[back.to(self.device)]

    def save(self, folder: str | Path, *, model_card: str, task: str | None = None) -> None:
        """Writes a sentence-transformers folder that :meth:`load` reads too.

        Args:
            folder: Made if missing; files of the same names are replaced.
            model_card: Text of its ``README.md``.
            task: The task in sentence-transformers' ``query`` prompt, where the template has one.
        """
        import sentence_transformers
        import transformers

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.tokenizer.model_max_length = self.max_tokens
        with _no_progress_bars():
            cast(Any, self.model).save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        # The spellings of sentence-transformers 2 are those that every later version reads.
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        prefix = "sentence_transformers.models."
        modules = [
            {"idx": index, "name": str(index), "path": where, "type": prefix + kind}
            for index, (where, kind) in enumerate(kinds)
        ]
        documents: dict[str, object] = {
            "modules.json": modules,
            "sentence_bert_config.json": {
                "max_seq_length": self.max_tokens,
                "do_lower_case": False,
            },
            "config_sentence_transformers.json": {
                "__version__": {
                    "sentence_transformers": sentence_transformers.__version__,
                    "transformers": transformers.__version__,
                    "pytorch": torch.__version__,
                },
                "model_type": "SentenceTransformer",
                "prompts": self.templates.prefixes(task),
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
            "1_Pooling/config.json": {
                "word_embedding_dimension": self.dimensions,
                **{name: kind == self.pooling for name, kind in _LEGACY_POOLINGS.items()},
            },
            "2_Normalize/config.json": {},
            "tokay.json": {"templates": asdict(self.templates), "max_tokens": self.max_tokens},
        }
        for name, document in documents.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (path / "README.md").write_text(model_card, encoding="utf-8")

    @property
    def _pad_id(self) -> int:
        tokenizer = self.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        lengths = np.array([len(row) for row in rows])
        attended = np.arange(lengths.max())[None, :] < lengths[:, None]
        ids = np.full(attended.shape, self._pad_id, dtype=np.int64)
        ids[attended] = np.concatenate([np.asarray(row) for row in rows])
        mask = torch.from_numpy(attended.astype(np.int64)).to(self.device)
        hidden = self.model(
            input_ids=torch.from_numpy(ids).to(self.device), attention_mask=mask
        ).last_hidden_state.float()
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        else:
            at = mask.sum(1) - 1 if self.pooling == "lasttoken" else torch.zeros_like(mask[:, 0])
            pooled = hidden[torch.arange(len(rows), device=hidden.device), at]
        return functional.normalize(pooled, dim=-1)


def native_bfloat16(device: torch.device) -> bool:
    """Says whether the device multiplies bfloat16 itself; others emulate it, slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def cut_layers(encoder: Encoder, layers: Sequence[int]) -> Encoder:
    """Returns a shallower copy that keeps some of an encoder's layers: a student's starting point.

    Args:
        encoder: BERT-like: its layers stand in ``model.encoder.layer``.
        layers: Indices of those to keep, rising, such as ``[0, 2, 5]``.

    Raises:
        ValueError: The model is of another kind, or the indices do not fit it.
    """
    stack = getattr(getattr(encoder.model, "encoder", None), "layer", None)
    if not isinstance(stack, torch.nn.ModuleList):
        kind = type(encoder.model).__name__
        raise ValueError(
            f"layers of a {kind} cannot be cut: accepted are BERT-like encoders "
            "(BERT, RoBERTa, XLM-RoBERTa, MPNet, ELECTRA); take a smaller model as it is"
        )
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(stack):
        raise ValueError(
            f"layers {kept}: give rising indices from 0 to {len(stack) - 1}, such as "
            f"{list(range(0, len(stack), 2))}"
        )
    model = cast(Any, copy.deepcopy(encoder.model))
    model.encoder.layer = torch.nn.ModuleList(model.encoder.layer[index] for index in kept)
    model.config.num_hidden_layers = len(kept)
    return Encoder(
        model,
        encoder.tokenizer,
        pooling=encoder.pooling,
        max_tokens=encoder.max_tokens,
        templates=encoder.templates,
    )


def check_parity(folder: str | Path, texts: Sequence[str]) -> float:
    """Returns the smallest cosine between our vectors of an export and sentence-transformers'."""
    from sentence_transformers import SentenceTransformer

    if not texts:
        raise ValueError("check_parity was given no text: give it at least one")
    ours = Encoder.load(str(folder), device="cpu").encode(texts)
    with _no_progress_bars():
        theirs = SentenceTransformer(str(folder), device="cpu").encode(
            list(texts), show_progress_bar=False
        )
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(1) / norms).min())


def _local_folder(resolved: str) -> Path:
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


def _read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object, empty where the file is missing."""
    return cast(dict[str, Any], json.loads(path.read_text())) if path.exists() else {}


def _read_pooling(folder: Path, model: str, config: Any) -> str:
    modules = folder / "modules.json"
    if not modules.exists():
        decoder = any("CausalLM" in name for name in config.architectures or [])
        return "lasttoken" if decoder else "mean"
    settings: dict[str, Any] = {}
    for module in json.loads(modules.read_text()):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind not in _MODULES:
            raise UserError(
                f"encoder {model!r} has a module {kind!r}: accepted are {', '.join(_MODULES)}"
            )
        if kind == "Pooling":
            settings = _read_json(folder / module["path"] / "config.json")
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


def _read_templates(folder: Path, own: dict[str, Any]) -> PromptTemplates:
    if "templates" in own:
        return PromptTemplates(**own["templates"])
    prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts", {})
    found = {}
    for role, names in (("query", ["query"]), ("passage", ["document", "passage", "corpus"])):
        prefix = next((prompts[name] for name in names if prompts.get(name)), "")
        found[role] = prefix.replace("{", "{{").replace("}", "}}") + "{text}"
    return PromptTemplates(**found)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps the bars of transformers, one for each file, off the console."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
