"""Which parts of a recipe fit their GPUs: the bytes needed, and the memory there is.

How vLLM fills its share is left to vLLM, which profiles itself; counted here are the weights that
it must hold in any case. What is not known is called unknown, and only certain misfits are refused.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from actors.embedded import find_model
from cluster.errors import UserError
from pipelines.mixture.config import (
    FixedPassagesConfig,
    MixtureConfig,
    SetsConfig,
    TextsConfig,
)
from pipelines.recipe.recipe import GpuUser, Recipe
from pipelines.recipe.sizes import GIB, ModelSize, read_size
from pipelines.training.config import TrainerConfig, TrainingConfig
from pipelines.training.embedding_distillation import TEACHER

ERROR = 0.2  # of the activations, which are estimated
CUDA_BYTES = 1.0 * GIB  # for CUDA itself and the kernels' work
FAISS_BYTES = 2.0 * GIB  # beside the vectors
LEXICAL_BYTES = 26  # a word of the corpus, measured; a sixth of it stays once the index is built
OF_TEACHER = ("embedding_distillation_mixture",)
SHORT = 4  # texts may be this many times shorter than the longest that are allowed

Fits = Literal["yes", "no", "perhaps", "unknown", ""]


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a part of a run needs of one GPU, or of the host where it has none.

    Attributes:
        steps: The steps that need it.
        what: The part.
        parts: Bytes by their use.
        have: Bytes of the GPU that it may use; None: unknown, or it runs on CPUs.
        whole: Bytes of the GPU, where `have` is a share that nothing enforces.
        gpu: Whether it runs on a GPU.
        least: Bytes that it certainly cannot do without.
        margin: The allowance made in `least`, in words.
        unknown: Why the bytes are not known, else empty.
        note: What else there is to say.
        remedy: The keys to change where it does not fit.
    """

    steps: tuple[str, ...]
    what: str
    parts: dict[str, float] = field(default_factory=dict)
    have: float | None = None
    whole: float | None = None
    gpu: bool = False
    least: float = 0.0
    margin: str = ""
    unknown: str = ""
    note: str = ""
    remedy: str = ""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> Fits:
        """Whether it fits the GPU; empty where it needs none."""
        if not self.gpu:
            return ""
        if self.have is None:
            return "unknown"
        if self.least > (self.whole or self.have):
            return "no"
        if self.unknown:
            return "unknown"
        return "yes" if self.total <= self.have else "perhaps"


Memory = dict[str, float | None]  # bytes of a GPU, by its GpuUser


def gpu_needs(recipe: Recipe, num_passages: int | None = None, *, here: bool = True) -> list[Need]:
    """Returns what each part of a run needs, in the order of the steps; starts and fetches nothing.

    `num_passages` is the size of the corpus, None if unknown. What runs `here` has this machine's
    GPUs, unless a resource names other nodes.
    """
    memory = _memory(recipe, here)
    teachers = [TEACHER] if TEACHER in recipe.models else []
    judges = ["cross_encoder"] if "cross_encoder" in recipe.models else []
    of_student = ("gate", "index") if recipe.gate else ("index",)
    return [
        _llm(recipe, memory["llm"]),
        _encoder(recipe, memory["encoder"], ("embeddings", "candidates"), "retriever"),
        _candidates(recipe, memory["index"], num_passages),
        *([_lexical(recipe, num_passages)] if recipe.candidates.lexical else []),
        *(_encoder(recipe, memory["encoder"], ("cross_scores",), each) for each in judges),
        *(_encoder(recipe, memory["encoder"], OF_TEACHER, each) for each in teachers),
        *(_training(recipe, memory["training"], prefix) for prefix in recipe.stages),
        _encoder(recipe, memory["encoder"], of_student, "student"),
        *([_evaluation(recipe, memory["encoder"])] if recipe.evaluation else []),
    ]


def refuse_unfit(
    recipe: Recipe, *, here: bool = True, needless: Callable[[str], bool] = lambda step: False
) -> None:
    """Stops before anything starts where a part of a run certainly does not fit.

    A part is left out if all its steps are `needless`, that is, need not run.

    Raises:
        UserError: Which part, what it needs, what there is, and which keys to change.
    """
    for need in gpu_needs(recipe, here=here):
        have = need.whole or need.have
        if need.fits == "no" and have is not None and not all(map(needless, need.steps)):
            raise UserError(
                f"recipe {recipe.name}: {need.what} ({' and '.join(need.steps)}) needs at least"
                f" {need.least / GIB:,.1f} GiB{need.margin} of a GPU that has"
                f" {have / GIB:,.1f} for it: {need.remedy}"
            )


def _llm(recipe: Recipe, have: float | None) -> Need:
    resources, engine = recipe.resources.llm, recipe.resources.engine
    name, gpu = recipe.llm.model, resources.num_gpus > 0
    size = _size(recipe, name)
    parts, unknown, note = {}, _unknown(name), ""
    if size is not None:
        unknown = ""
        parts["weights"] = size.weights_bytes(recipe.llm.dtype) / engine.tensor_parallel_size
    if engine.kv_cache_gib is not None:
        parts["KV cache"] = engine.kv_cache_gib * GIB
    elif gpu and have is not None:
        have *= engine.gpu_memory_utilization
        if not unknown:
            left = max(0.0, have - parts["weights"])
            note = f"leaves {left / GIB:.1f} to vLLM, most of it KV cache"
    return Need(
        steps=(
            "queries",
            *(["probe"] if recipe.has_probe else []),
            *(["scores"] if recipe.fret.asks_llm else []),
        ),
        what="LLM",
        parts=parts,
        have=have,
        gpu=gpu,
        least=sum(parts.values()),
        unknown=unknown,
        note=note,
        remedy="choose a smaller or quantised llm.model, raise resources.engine."
        "tensor_parallel_size or correct resources.gpu_memory_gib",
    )


def _encoder(recipe: Recipe, whole: float | None, steps: tuple[str, ...], which: str) -> Need:
    resources = recipe.resources.encoder
    config = recipe.models[which]
    size = _student(recipe) if which == "student" else _size(recipe, config.model)
    gpu = resources.num_gpus > 0
    parts = {"weights": size.weights_bytes(config.dtype)} if size else {}
    least = sum(parts.values())
    if gpu and size:
        parts["CUDA itself"] = CUDA_BYTES
    return Need(
        steps=steps,
        what=which,
        parts=parts,
        have=whole and whole * min(1.0, resources.num_gpus),
        whole=whole,
        gpu=gpu,
        least=least,
        unknown="" if size else _unknown(config.model),
        remedy=f"choose a smaller {which}.model or correct resources.gpu_memory_gib",
    )


def _evaluation(recipe: Recipe, whole: float | None) -> Need:
    """The retriever, and the student before the first stage and after each: all at once."""
    retriever, student = (
        _encoder(recipe, whole, ("evaluation",), which) for which in ("retriever", "student")
    )
    need = replace(
        retriever,
        what="retriever and students",
        unknown=retriever.unknown or student.unknown,
        remedy="choose a smaller retriever.model or student.model, or correct"
        " resources.gpu_memory_gib",
    )
    if need.unknown:
        return replace(need, parts={})
    weights = retriever.least + (1 + len(recipe.stages)) * student.least
    return replace(need, parts=retriever.parts | {"weights": weights}, least=weights)


def _candidates(recipe: Recipe, have: float | None, num_passages: int | None) -> Need:
    """The vectors that a FAISS actor searches; beyond the room on its GPU it uses the CPU."""
    resources = recipe.resources.index
    size, gpu = _size(recipe, recipe.retriever.model), resources.num_gpus > 0
    dimensions = size.hidden_size if size else None
    note, parts, unknown = "searched on CPUs", {}, ""
    if gpu and have is not None:
        have *= min(1.0, resources.num_gpus)
        note = "searched on CPUs if there are more"
        if dimensions:
            room = (have - FAISS_BYTES) / 4 / (dimensions + 1) * resources.num_actors
            note = f"room for {room / 1e6:,.1f} million passages, else searched on CPUs"
    if num_passages is None:
        unknown = "the passages are not counted yet"
        if dimensions:
            unknown += f"; {4e6 * dimensions / GIB:.1f} GiB per million"
    elif dimensions is None:
        unknown = _unknown(recipe.retriever.model)
    else:
        parts["vectors"] = 4.0 * num_passages * dimensions / resources.num_actors
        if gpu:
            parts["FAISS"] = FAISS_BYTES
    return Need(
        steps=("candidates",),
        what="vectors of an index actor",
        parts=parts,
        have=have,
        gpu=gpu,
        unknown=unknown,
        note=note,
    )


def _lexical(recipe: Recipe, num_passages: int | None) -> Need:
    """BM25's index of all passages, while it is built; it is never on a GPU."""
    each = LEXICAL_BYTES * recipe.corpus.max_words
    need = Need(steps=("candidates",), what="the lexical index", note="one holds all passages")
    if num_passages is None:
        return replace(
            need,
            unknown=f"the passages are not counted yet; {each * 1e6 / GIB:.1f} GiB per million",
        )
    return replace(need, parts={"BM25": each * num_passages})


def _training(recipe: Recipe, have: float | None, prefix: str) -> Need:
    mixture, training = recipe.stages[prefix].mixture, recipe.stages[prefix].training
    key, gpu, size = f"{prefix}training", training.use_gpu, _student(recipe)
    need = Need(steps=(key.partition(".")[0],), what="student", have=have, gpu=gpu)
    if size is None:
        return replace(need, unknown=_unknown(recipe.student.model))
    bfloat16 = training.precision == "bfloat16" or (training.precision == "auto" and gpu)
    parts = _states(size, training, bfloat16, recipe.student.projection or 0)
    certain = parts["weights"] + parts["gradients"] + parts["AdamW"]
    remedy = f"set {key}.sharding: fsdp2 or {key}.lora, or choose a smaller student.model"
    parts["loss"] = _loss_bytes(size, training, _num_negatives(recipe, mixture), _fixed(mixture))
    if gpu:
        parts["CUDA itself"] = CUDA_BYTES
    per_token = size.kept_bytes(bfloat16=bfloat16, checkpointing=training.gradient_checkpointing)
    if per_token is None:
        what = f"activations of a {size.model_type or 'model without model_type'} were not counted"
        return replace(need, parts=parts, least=certain, unknown=what, remedy=remedy)
    longest, batch = _num_tokens(recipe, mixture, training)
    least, margin, less = certain, "", f"activations taken {ERROR:.0%} less than estimated"
    note = f"activations {per_token / 1024:,.0f} KiB per token"
    note += f", whole batch {batch * per_token / GIB:,.0f} GiB at the longest lengths"
    cache_tokens = training.gradient_cache_tokens
    if cache_tokens is None or (cache_tokens == "auto" and not gpu):
        tokens = batch
        least += (1 - ERROR) * per_token * batch / SHORT
        margin = f" ({less}, of texts 1/{SHORT} as long as they may be)"
    elif cache_tokens == "auto":
        tokens = longest
        if have is not None:
            left = (1 - ERROR) * (have - sum(parts.values())) / per_token
            if left >= longest:
                note += f"; room for about {min(batch, round(left, -2)):,.0f} tokens at a time"
    else:
        tokens = max(longest, min(batch, cache_tokens))
        least += (1 - ERROR) * per_token * min(tokens, batch / SHORT)
        margin = f" ({less})"
    if least > certain:
        remedy = f"set {key}.gradient_cache_tokens: auto"
    parts[f"activations of {tokens:,} tokens"] = tokens * per_token
    remedy += "; or correct resources.gpu_memory_gib"
    return replace(need, parts=parts, least=least, margin=margin, note=note, remedy=remedy)


def _states(
    size: ModelSize, training: TrainerConfig, bfloat16: bool, projection: int
) -> dict[str, float]:
    """Returns bytes of the weights, their gradients and AdamW's two moments, all float32."""
    matrices = size.layer_matrices() or {}
    num_layers = size.num_hidden_layers or 0
    trained = size.parameters
    if training.lora:
        target, rank = training.lora.target, training.lora.rank
        trained = float(projection * (size.hidden_size or 0)) + num_layers * sum(
            rank * (ins + outs)
            for name, (ins, outs) in matrices.items()
            if target == "all-linear" or name.endswith(tuple(target))
        )
    per_layer = size.layer_parameters()
    shares = training.num_workers if training.sharding == "fsdp2" else 1
    if shares > 1:  # the ends and two layers are gathered at a time
        gathered = size.parameters - max(0, num_layers - 2) * per_layer
        copies = gathered * (2 if bfloat16 else 4)
    else:  # autocast keeps one of each matrix for the backward pass
        copies = 2.0 * num_layers * per_layer if bfloat16 else 0.0
    states = {
        "weights": 4 * size.parameters / shares,
        "gradients": 4 * trained / shares,
        "AdamW": 8 * trained / shares,
    }
    return states | ({"copies of weights": copies} if copies else {})


def _fixed(mixture: SetsConfig | TextsConfig) -> FixedPassagesConfig | None:
    return mixture.fixed_passages if isinstance(mixture, MixtureConfig) else None


def _loss_bytes(
    size: ModelSize, training: TrainerConfig, num_negatives: int, fixed: FixedPassagesConfig | None
) -> float:
    """Estimates three times what autograd saves of vectors and their similarities, float32."""
    batch, own = training.batch_size, -(-training.batch_size // training.num_workers)
    if not isinstance(training, TrainingConfig):  # texts, and the vectors to be learned
        return 4.0 * 2 * 2 * own * (size.hidden_size or 0)
    if fixed:  # lists, and queries and passages beside them
        vectors = own * (2 + num_negatives + fixed.anchor_share) * (size.hidden_size or 0)
        return 4.0 * (1 + len(training.loss.matryoshka_dimensions)) * 2 * vectors
    vectors = (2 * batch + own * (2 + num_negatives)) * (size.hidden_size or 0)
    return 4.0 * (1 + len(training.loss.matryoshka_dimensions)) * (2 * vectors + 6 * own * batch)


def _num_negatives(recipe: Recipe, mixture: SetsConfig | TextsConfig) -> int:
    """Returns the largest number of hard negatives of an example."""
    if isinstance(mixture, TextsConfig):
        return 0
    counts = [labelled.max_negatives for labelled in mixture.labelled]
    if isinstance(mixture, MixtureConfig) and mixture.fret_weight != 0:
        num_others = recipe.candidates.num_candidates - 1
        if recipe.fret.scores_pairs and not mixture.fixed_passages:
            num_others = min(recipe.scores.num_scored - 1, num_others)
        most = {"none": 0, "all": num_others}.get(recipe.fret.negative, recipe.fret.num_negatives)
        counts.append(min(most, num_others))
    return max(counts, default=0)


def _num_tokens(
    recipe: Recipe, mixture: SetsConfig | TextsConfig, training: TrainerConfig
) -> tuple[int, int]:
    """Returns the tokens of the longest text, and of a worker's part of the longest batch."""
    limit = recipe.student.max_tokens
    query, passage = min(limit, training.max_query_tokens), min(limit, training.max_passage_tokens)
    own = -(-training.batch_size // training.num_workers)
    longest = max(query, passage)
    if isinstance(mixture, TextsConfig):
        return longest, own * longest
    if fixed := _fixed(mixture):  # passages beside the lists are read in full
        passage = min(limit, recipe.retriever.max_tokens)
        beside = -(-round(fixed.anchor_share * training.batch_size) // training.num_workers)
        return max(query, passage), own * query + beside * passage
    example = query + (1 + _num_negatives(recipe, mixture)) * passage
    return longest, own * example


def _student(recipe: Recipe) -> ModelSize | None:
    size, student = _size(recipe, recipe.student.model), recipe.student
    if size is not None and student.layers is not None:
        size = size.with_layers(len(student.layers))
    if size is not None and student.projection and size.hidden_size:
        more = size.parameters + student.projection * size.hidden_size
        size = size.model_copy(update={"parameters": more})
    return size


def _size(recipe: Recipe, model: str) -> ModelSize | None:
    """Returns a model's size from its files on the disk, or else from the recipe."""
    folder = find_model(model)
    return (read_size(folder) if folder else None) or recipe.sizes.get(model)


def _unknown(model: str) -> str:
    return f"{model} is not on this disk: give its size in the recipe's `sizes`"


def _memory(recipe: Recipe, here: bool) -> Memory:
    """Returns the GPUs' memory by the recipe, and no more than this machine's own have."""
    resources, given = recipe.resources, recipe.resources.gpu_memory_gib
    nodes: dict[GpuUser, str | None] = {
        "llm": resources.llm.node_resource,
        "encoder": resources.encoder.node_resource,
        "index": resources.index.node_resource,
        "training": recipe.training.node_resource,
    }
    own = own_gpus() if here and not os.environ.get("RAY_ADDRESS") else ()
    memory: Memory = {}
    for user, node in nodes.items():
        gib = given.get(user) if isinstance(given, dict) else given
        gpus = [] if node else list(own)
        memory[user] = min([*gpus, *([gib * GIB] if gib else [])], default=None)
    return memory


@cache
def own_gpus() -> tuple[float, ...]:
    """Returns the bytes of each of this machine's GPUs as torch sees them, without importing it."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.reserved"]
    try:
        answer = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5
        )
        rows = [line.split(",") for line in answer.stdout.splitlines() if answer.returncode == 0]
        return tuple(
            (float(total) - (float(kept) if kept.strip().isdecimal() else 0)) * 2**20
            for total, kept in rows
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ()
