"""Texts per second of `Encoder.encode` beside `SentenceTransformer.encode`, on real texts.

Both embed the same queries, titles and passages of mixed length with the same model in the same
precision, each at the batch size that a first round found to be its best, in turns; medians. No
text occurs twice, since we would embed it once. Processor time is what other work on the machine
disturbs least, so the ratio is printed for it too.

    python benchmarks/encode.py DATA [--num-texts 1200] [--rounds 5] [--threads 2]

DATA is a folder of BEIR folders: NAME/corpus.jsonl and NAME/queries.jsonl. Prints one JSON line.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from actors.encoder import Encoder
from actors.encoder_files import no_progress_bars
from actors.kernels.linear import native_bfloat16
from cluster.plain_json import dump_json
from pipelines.training.layers import cut_layers

MODEL = "embedded:all-MiniLM-L6-v2"
LAYERS = {"6 layers": range(6), "3 layers": (0, 2, 5)}
BATCH_TOKENS = (512, 1024, 2048, 4096, 8192)
BATCH_SIZES = (4, 8, 16, 32, 64, 128)

Encode = Callable[[Sequence[str]], np.ndarray]


def main() -> None:
    """Measures every model in every precision and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a folder of BEIR folders")
    parser.add_argument("--num-texts", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = mixed_texts(arguments.data, arguments.num_texts)
    figures: dict[str, object] = {}
    precisions = ["float32"]
    if native_bfloat16(torch.device("cpu")):
        precisions.append("bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        for name, layers in LAYERS.items():
            path = f"{folder}/{len(layers)}"
            cut_layers(Encoder.load(MODEL, device="cpu"), layers).save(path, model_card="")
            for precision in precisions:
                figures[f"{name}, {precision}"] = compare(path, precision, texts, arguments.rounds)
    able = torch.cpu.get_capabilities()
    machine = {
        "cpu": able.get("cpu_name", platform.machine()),
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    lengths = [len(row) for row in Encoder.load(MODEL, device="cpu").tokenize(texts)]
    of_texts = {
        "num_texts": len(texts),
        "median_tokens": statistics.median(lengths),
        "mean_tokens": round(statistics.mean(lengths), 1),
    }
    print(dump_json({"benchmark": "encode", **machine, **of_texts, "figures": figures}))


def mixed_texts(data: Path, num_texts: int) -> list[str]:
    """Draws queries, titles and passages in equal parts from every set, none twice."""
    rng = random.Random(0)
    kinds: dict[tuple[str, str], list[str]] = {}
    for corpus in sorted(data.glob("*/corpus.jsonl")):
        passages = [json.loads(line) for line in corpus.open(encoding="utf-8")]
        lines = corpus.with_name("queries.jsonl").open(encoding="utf-8")
        name = corpus.parent.name
        kinds[name, "query"] = [json.loads(line)["text"] for line in lines]
        kinds[name, "passage"] = [row["text"] for row in passages]
        kinds[name, "title"] = [row["title"] for row in passages if row.get("title")]
    if not kinds:
        raise SystemExit(f"{data}: no */corpus.jsonl is in it; give a folder of BEIR folders")
    for group in kinds.values():
        rng.shuffle(group)
    drawn: dict[str, None] = {}
    for place in range(max(map(len, kinds.values()))):
        for group in kinds.values():
            if place < len(group) and group[place].strip():
                drawn[group[place]] = None
    return list(drawn)[:num_texts]


def compare(path: str, precision: str, texts: list[str], rounds: int) -> dict[str, object]:
    """Tunes both on a part of the texts, then runs them in turns on all."""
    from sentence_transformers import SentenceTransformer

    with no_progress_bars():
        theirs = SentenceTransformer(
            path, device="cpu", model_kwargs={"dtype": getattr(torch, precision)}
        )
    ours = Encoder.load(path, device="cpu", dtype=precision)
    rival = partial(theirs.encode, show_progress_bar=False, convert_to_numpy=True)
    part = texts[: len(texts) // 4]
    best_tokens = fastest({n: partial(ours.encode, batch_tokens=n) for n in BATCH_TOKENS}, part)
    best_size = fastest({n: partial(rival, batch_size=n) for n in BATCH_SIZES}, part)
    encoders: dict[str, Encode] = {
        "tokay": partial(ours.encode, batch_tokens=best_tokens),
        "sentence_transformers": partial(rival, batch_size=best_size),
    }
    wall_s: dict[str, list[float]] = {name: [] for name in encoders}
    cpu_s: dict[str, list[float]] = {name: [] for name in encoders}
    vectors = {}
    for _ in range(rounds):
        for name, encode in encoders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            vectors[name] = np.asarray(encode(texts), dtype=np.float64)
            wall_s[name].append(time.perf_counter() - wall)
            cpu_s[name].append(time.process_time() - cpu)
    wall_medians = {name: statistics.median(times) for name, times in wall_s.items()}
    cpu_medians = {name: statistics.median(times) for name, times in cpu_s.items()}
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in vectors.values()]
    return {
        **{f"{name}_texts_per_s": round(len(texts) / s, 1) for name, s in wall_medians.items()},
        "ratio": round(wall_medians["sentence_transformers"] / wall_medians["tokay"], 2),
        "cpu_ratio": round(cpu_medians["sentence_transformers"] / cpu_medians["tokay"], 2),
        "min_cosine": round(float((unit[0] * unit[1]).sum(1).min()), 6),
        "tokay_batch_tokens": best_tokens,
        "sentence_transformers_batch_size": best_size,
    }


def fastest(encoders: dict[int, Encode], texts: list[str]) -> int:
    """Returns the setting that takes the least time, by the better of two runs in turns."""
    times: dict[int, float] = {}
    next(iter(encoders.values()))(texts[:16])  # the very first pass sets up what is set up once
    for _ in range(2):
        for setting, encode in encoders.items():
            began = time.perf_counter()
            encode(texts)
            spent = time.perf_counter() - began
            times[setting] = min(spent, times.get(setting, spent))
    return min(times, key=lambda setting: times[setting])


if __name__ == "__main__":
    main()
