"""Proof that an exported encoder gives the same vectors wherever it is run.

The trained encoder, the folder read by us, by sentence-transformers and by plain transformers, and
the passes of the endpoint are five ways through different code. Each must give the vectors of the
first, whole and cut to every Matryoshka dimension, for kinds of text that are known to go wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from actors.encoder import Encoder
from actors.encoder_files import no_progress_bars, read_projection
from actors.encoder_folder import read_folder
from actors.encoder_templates import PromptTemplates
from actors.vectors import unit

SERVED = "the endpoint's passes"
SENTENCE_TRANSFORMERS = "sentence-transformers"
TRANSFORMERS = "plain transformers"
EXPORT = "the export"
_SERVED_PASS_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class ParityText:
    """A text, the kind that errors name, and the role whose prompt it carries, if any."""

    kind: str
    text: str
    role: str | None = None  # query or document
    title: str | None = None  # of a document


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The lowest cosine between the trained encoder's vectors and another way's."""

    way: str
    kind: str
    dimensions: int
    cosine: float


DIFFICULT = (
    ParityText(kind="empty", text=""),
    ParityText(kind="blank", text=" \n "),
    ParityText(kind="long", text="The boundary layer separates behind the shock wave. " * 400),
    ParityText(kind="long", text="x" * 5000),
    ParityText(kind="non-English", text="雪が降る夜に猫が眠る。"),
    ParityText(kind="non-English", text="Größe über alles: naïve façade, déjà vu"),
    ParityText(kind="non-English", text="Съешь же ещё этих мягких французских булок"),
    ParityText(kind="non-English", text="مرحبا بالعالم 🦎 नमस्ते दुनिया"),
    ParityText(kind="prompt-carrying", text="how do lizards climb?", role="query"),
    ParityText(kind="prompt-carrying", text="Setae on their toes cling.", role="document"),
    ParityText(kind="prompt-carrying", text="", role="query"),
    ParityText(kind="prompt-carrying", text="", role="document"),
    ParityText(kind="titled", text="Setae cling.", role="document", title="Toes of lizards"),
)


def check_parity(
    folder: str | Path,
    texts: Sequence[ParityText] = DIFFICULT,
    *,
    dimensions: Sequence[int] = (),
    trained: Encoder | None = None,
    task: str = "search result",
    trust_remote_code: bool = False,
) -> list[Agreement]:
    """Embeds texts in every way there is and compares.

    Args:
        folder: An export of :meth:`Encoder.save`.
        texts: What to embed.
        dimensions: To cut the vectors to, beside their full length.
        trained: What was exported; the export itself if None.
        task: Of queries, where the template names one.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        One agreement for each way, kind of text and number of dimensions.
    """
    export = Encoder.load(str(folder), device="cpu", trust_remote_code=trust_remote_code)
    for size in dimensions:
        export.check_dimensions(size)
    trained = trained or export
    known = [(each, _written(each, trained.templates, task)) for each in texts]
    # A tokenizer without special tokens makes nothing of nothing, and each library its own of that.
    known = [
        (each, text) for each, text in known if export.tokenizer(text, verbose=False)["input_ids"]
    ]
    if not known:
        raise ValueError("check_parity was given no text: give it at least one")
    written = [text for _, text in known]
    with torch.no_grad():
        expected = trained.embed(written).cpu().numpy()
    by_way = {
        EXPORT: export.encode(written),
        SENTENCE_TRANSFORMERS: _by_sentence_transformers(folder, known, trust_remote_code),
        TRANSFORMERS: _by_transformers(folder, export.pooling, written, trust_remote_code),
        SERVED: _as_served(export, written),
    }
    kinds = np.array([each.kind for each, _ in known])
    return [
        Agreement(
            way=way,
            kind=kind,
            dimensions=size,
            cosine=float(_cosines(expected[:, :size], vectors[:, :size])[kinds == kind].min()),
        )
        for way, vectors in by_way.items()
        for kind in dict.fromkeys(kinds.tolist())
        for size in dict.fromkeys([export.dimensions, *dimensions])
    ]


def _written(text: ParityText, templates: PromptTemplates, task: str) -> str:
    if text.role == "query":
        return templates.format_query(text.text, task=task)
    if text.role == "document":
        return templates.format_passage(text.text, text.title)
    return text.text


def _cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.asarray((unit(ours) * unit(theirs)).sum(1))


def _as_served(encoder: Encoder, texts: list[str]) -> np.ndarray:
    with torch.inference_mode():
        rows = encoder.tokenize(texts)
        return encoder.embed_tokens(rows, batch_tokens=_SERVED_PASS_TOKENS).cpu().numpy()


def _by_sentence_transformers(
    folder: str | Path, known: Sequence[tuple[ParityText, str]], trust_remote_code: bool
) -> np.ndarray:
    """Embeds texts as they are written, and by the prompt's name where the folder has one.

    A prompt has no place for a title, which users of sentence-transformers write themselves.
    """
    from sentence_transformers import SentenceTransformer

    with no_progress_bars():
        model: Any = SentenceTransformer(
            str(folder), device="cpu", trust_remote_code=trust_remote_code
        )
    vectors = np.array(
        model.encode([text for _, text in known], prompt="", show_progress_bar=False)
    )
    for place, (each, _) in enumerate(known):
        if each.role and not each.title and model.prompts.get(each.role):
            vectors[place] = model.encode(each.text, prompt_name=each.role, show_progress_bar=False)
    return vectors


def _by_transformers(
    folder: str | Path, pooling: str, texts: list[str], trust_remote_code: bool
) -> np.ndarray:
    """Embeds as a person would who has transformers alone: pooling written out, eager attention."""
    from transformers import AutoModel, AutoTokenizer

    said = read_folder(Path(folder), trust_remote_code=trust_remote_code)
    path = said.transformer
    with no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(
            path,
            attn_implementation="eager",
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    model.eval()
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.inference_mode():
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        if pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        elif pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = hidden[torch.arange(len(texts)), mask.sum(1) - 1]
        projection = read_projection(said, hidden.shape[-1])
        if projection is not None:
            pooled = projection(pooled)
        return functional.normalize(pooled, dim=-1).numpy()
