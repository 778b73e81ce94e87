"""Whole training steps of students of 110 M to 0.6 B: throughput and share of the GPU's peak.

    python benchmarks/training_steps.py [--device cuda] [--batch 64] [--steps 10] [--students ...]

The students have random weights in the shapes of BERT-base, of ModernBERT-base, which the recipes
for GPUs train, and of Qwen3-0.6B with bidirectional attention; all pool by the mean. A batch is of
random token ids: query, positive and one hard negative per example, as long as the questions and
answers of stackexchange-answers after a task. A step is `train_batch`: encoding, equation 3 at two
sizes, gradients, clipping and AdamW. It is measured in float32 (no TF32) and in bfloat16; plain,
with a gradient cache, and with gradient checkpointing. With `--modes auto` a batch is the largest
of the recipes, 512 examples of 96, 384 and 384 tokens, and the gradient cache as large as a trial
finds, smaller after a step that runs out of memory.
The first three steps of each do not count; medians. FLOPs are the model's, as in PaLM (arXiv
2204.02311, appendix B): 6 per weight and token, embeddings left out, and for attention 12 x layers
x width x length per token, a window's length where there is one; what is padded or computed twice
adds nothing to them. The share of the peak is that of bfloat16.

Needs no Ray, no vLLM and no download; of the packages only torch, transformers, pydantic and
pyarrow. Without a GPU, try `--layers 2 --hidden 128 --batch 8`. Each measurement goes to stderr
as it is taken; prints one JSON line.
"""

import argparse
import copy
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from cluster.plain_json import dump_json

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project is not installed

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from pipelines.training.agreement import OutOfMemory
from pipelines.training.config import LossConfig, TrainingConfig
from pipelines.training.examples import Batch
from pipelines.training.gradients import slice_batch
from pipelines.training.layers import make_bidirectional
from pipelines.training.memory import fit, use_growing_segments
from pipelines.training.optimizer import train_batch, train_fitting

PRECISIONS = ("float32", "bfloat16")
MODES = ("plain", "gradient_cache", "gradient_checkpointing", "auto")
# Dense products in bfloat16, in TFLOP/s, by words of the device's name: NVIDIA's data sheets of
# H100, H200, A100 and L4, halved where they count on sparsity.
PEAK_TFLOPS = {
    ("H100", "NVL"): 835,
    ("H100", "PCIe"): 756,
    ("H100",): 989,
    ("H200", "NVL"): 835,
    ("H200",): 989,
    ("A100",): 312,
    ("L4",): 121,
}
MAX_TOKENS = 256
BATCH_SIZE = 64
RECIPE_BATCH_SIZE, RECIPE_QUERY_TOKENS, RECIPE_PASSAGE_TOKENS = 512, 96, 384
WARM_UP_STEPS = 3


def bert(layers: int = 12, hidden: int = 768) -> Any:
    """Returns the configuration of BERT-base, or of a smaller model of its shape."""
    return transformers.BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )


def modernbert(layers: int = 22, hidden: int = 768) -> Any:
    """Returns the configuration of ModernBERT-base, or of a smaller model of its shape."""
    return transformers.ModernBertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=3 * hidden // 2,
    )


def qwen3(layers: int = 28, hidden: int = 1024) -> Any:
    """Returns the configuration of Qwen3-0.6B, or of a smaller model of its shape."""
    return transformers.Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=128,
        intermediate_size=3 * hidden,
    )


STUDENTS = {"bert-110m": bert, "modernbert-149m": modernbert, "qwen3-0.6b": qwen3}


def make_model(config: Any, device: str) -> Any:
    """Returns a model with random weights, the same each time on one device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)
    if hasattr(model, "pooler"):
        model.pooler = None  # BERT's, over the first token, is no part of a mean
    return model


def make_student(model: Any) -> Encoder:
    """Returns an encoder that needs no tokenizer."""
    encoder = Encoder(
        model,
        SimpleNamespace(pad_token_id=0),  # all that embedding token ids asks of a tokenizer
        pooling="mean",
        max_tokens=MAX_TOKENS,
        templates=PromptTemplates(),
    )
    if model.config.model_type == "qwen3":
        make_bidirectional(encoder)
    return encoder


def random_batches(num_batches: int, batch_size: int, vocabulary: int) -> list[Batch]:
    """Draws token ids, in lengths like those of stackexchange-answers after a task of 12 tokens."""
    rng = np.random.default_rng(0)

    def texts(log_mean: float, log_deviation: float, task: int, longest: int) -> list[np.ndarray]:
        drawn = task + rng.lognormal(log_mean, log_deviation, batch_size)
        lengths = np.clip(drawn, 4, longest).astype(int)
        return [rng.integers(1000, vocabulary, length) for length in lengths]

    return [
        Batch(
            number=number,
            dataset="random",
            queries=texts(2.53, 0.34, 12, 64),
            positives=texts(4.83, 0.84, 0, MAX_TOKENS),
            negatives=[[row] for row in texts(4.83, 0.84, 0, MAX_TOKENS)],
            teacher_scores=[[]] * batch_size,
            query_ids=[f"q{place}" for place in range(batch_size)],
            positive_ids=[f"p{place}" for place in range(batch_size)],
            symmetric=False,
        )
        for number in range(num_batches)
    ]


def longest_batches(num_batches: int, batch_size: int, vocabulary: int) -> list[Batch]:
    """Draws token ids, all texts as long as the recipes for GPUs let them be."""
    rng = np.random.default_rng(0)

    def texts(length: int) -> list[np.ndarray]:
        return list(rng.integers(1000, vocabulary, (batch_size, length)))

    return [
        replace(
            batch,
            queries=texts(RECIPE_QUERY_TOKENS),
            positives=texts(RECIPE_PASSAGE_TOKENS),
            negatives=[[row] for row in texts(RECIPE_PASSAGE_TOKENS)],
        )
        for batch in random_batches(num_batches, batch_size, vocabulary)
    ]


def model_flops(model: Any, lengths: Sequence[int]) -> float:
    """Returns the FLOPs of one training step over texts of these lengths; see above."""
    config = model.config
    looked_up = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
    )
    weights = sum(weight.numel() for weight in model.parameters()) - looked_up
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full"] * config.num_hidden_layers
    near = getattr(config, "local_attention", None)
    spans = [near if kind == "sliding_attention" and near else sys.maxsize for kind in kinds]
    attended = sum(length * min(length, span) for length in lengths for span in spans)
    return 6.0 * weights * sum(lengths) + 12.0 * width * attended


def measure(model: Any, config: TrainingConfig, batches: Sequence[Batch]) -> dict[str, Any]:
    """Trains a model on all batches and returns its figures."""
    encoder = make_student(model)
    encoder.set_training(dropout=False, checkpointing=config.gradient_checkpointing)
    optimizer = torch.optim.AdamW(encoder.model.parameters(), fused=True)
    on_gpu = encoder.device.type == "cuda"
    auto = config.gradient_cache_tokens == "auto"
    config = fit(encoder, optimizer, config)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    computed = 0

    def count(_: Any, __: Any, given: dict[str, Any]) -> None:
        nonlocal computed
        ids = given.get("input_ids", given.get("inputs_embeds"))
        computed += ids.shape[0] * ids.shape[1]

    encoder.model.register_forward_pre_hook(count, with_kwargs=True)
    seconds, losses, flops = [], [], []
    for batch in batches:
        part = slice_batch(batch, config)
        start = time.perf_counter()
        if auto:
            loss, _, config = train_fitting(encoder, optimizer, part, config, rate=1e-5, seed=0)
        else:
            loss, _ = train_batch(encoder, optimizer, part, config, rate=1e-5)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        texts = chain(part.queries, part.positives, part.negatives)
        flops.append(model_flops(encoder.model, [len(text) for text in texts]))
    tokens = [batch.num_tokens for batch in batches]

    def rate(amounts: Sequence[float]) -> float:
        rates = [amount / s for amount, s in zip(amounts, seconds, strict=True)]
        return statistics.median(rates[WARM_UP_STEPS:])

    figures: dict[str, Any] = {
        "step_s": round(statistics.median(seconds[WARM_UP_STEPS:]), 4),
        "examples_per_s": round(rate([len(batch.queries) for batch in batches]), 1),
        "tokens_per_s": round(rate(tokens)),
        "model_tflops": round(rate(flops) / 1e12, 3),
        # Padding, and with a gradient cache what goes through the model twice.
        "computed_per_token": round(computed / sum(tokens), 3),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }
    if auto:  # None: the whole batch
        figures["gradient_cache_tokens"] = config.gradient_cache_tokens
    if on_gpu:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


def product_tflops(device: str) -> float:
    """Returns the TFLOP/s of one large product in bfloat16: what a program reaches here."""
    size = 1024 if device == "cpu" else 8192
    one, other = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(WARM_UP_STEPS + 10):
        start = time.perf_counter()
        one @ other
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[WARM_UP_STEPS:]) / 1e12


def known_peak(name: str) -> float | None:
    """Returns the peak in the table, for a device's name such as `NVIDIA H100 80GB HBM3`."""
    there = set(re.findall(r"\w+", name))
    return next((peak for words, peak in PEAK_TFLOPS.items() if there.issuperset(words)), None)


def main() -> None:
    """Measures every student in every precision and mode and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES[:3]))
    parser.add_argument(
        "--batch",
        type=int,
        help=f"examples in a batch: {BATCH_SIZE}, with `auto` {RECIPE_BATCH_SIZE}",
    )
    parser.add_argument("--steps", type=int, default=10, help="that count")
    parser.add_argument("--cache-tokens", type=int, default=8192, help="of the gradient cache")
    parser.add_argument("--layers", type=int, help="fewer than the student's own")
    parser.add_argument("--hidden", type=int, help="a multiple of 128 below the student's own")
    parser.add_argument("--peak-tflops", type=float, help="dense, in bfloat16, of this device")
    arguments = parser.parse_args()
    if arguments.hidden and arguments.hidden % 128:
        parser.error(f"--hidden {arguments.hidden}: give a multiple of 128")
    device = arguments.device
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        use_growing_segments()
        torch.cuda.set_device(torch.device(device).index or 0)
        name = torch.cuda.get_device_name()
    else:
        name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    peak = arguments.peak_tflops or known_peak(name)
    shape = {"layers": arguments.layers, "hidden": arguments.hidden}
    shape = {key: value for key, value in shape.items() if value}
    figures: dict[str, Any] = {}
    sizes: set[int] = set()
    for kind in arguments.students:
        student = STUDENTS[kind](**shape)
        size = sum(weight.numel() for weight in make_model(student, "meta").parameters())
        figures[kind] = {"parameters_m": round(size / 1e6, 1)}
        for precision in arguments.precisions:
            figures[kind][precision] = {}
            for mode in arguments.modes:
                auto = mode == "auto"
                batch_size = arguments.batch or (RECIPE_BATCH_SIZE if auto else BATCH_SIZE)
                sizes.add(batch_size)
                draw = longest_batches if auto else random_batches
                batches = draw(WARM_UP_STEPS + arguments.steps, batch_size, student.vocab_size)
                config = TrainingConfig(
                    batch_size=batch_size,
                    max_query_tokens=RECIPE_QUERY_TOKENS,
                    max_passage_tokens=RECIPE_PASSAGE_TOKENS,
                    loss=LossConfig(
                        mask_duplicates=True, matryoshka_dimensions=(student.hidden_size // 2,)
                    ),
                    precision=precision,
                    gradient_cache_tokens={
                        "gradient_cache": arguments.cache_tokens,
                        "auto": "auto",
                    }.get(mode),
                    gradient_checkpointing=mode == "gradient_checkpointing",
                )
                try:
                    measured = measure(make_model(student, device), config, batches)
                except (OutOfMemory, torch.OutOfMemoryError):
                    measured = {"out_of_memory": True}
                else:
                    if peak and precision == "bfloat16":
                        measured["share_of_peak"] = round(measured["model_tflops"] / peak, 3)
                figures[kind][precision][mode] = measured
                print(kind, precision, mode, json.dumps(measured), file=sys.stderr, flush=True)
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
    report = {
        "benchmark": "training_steps",
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch": arguments.batch or sorted(sizes),
        "cache_tokens": arguments.cache_tokens,
        "peak_tflops": peak,
        "product_tflops": round(product_tflops(device), 2),
        "figures": figures,
    }
    print(dump_json(report))


if __name__ == "__main__":
    main()
