"""Evaluating on a test set: ours beside plain mteb with SentenceTransformer, same task and model.

    python benchmarks/eval.py FOLDER [--kind retrieval] [--model embedded:all-MiniLM-L6-v2]

Both are in float32 unless --dtype says otherwise (then both are in that), cut texts at the same
number of tokens, and must find the same score. The seconds are those of a whole evaluation (encode,
search or classify, score), the models loaded and warm, in turns, the median of each.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from actors.embedded import resolve_model
from actors.encoder import Encoder
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.folders import KINDS, read_folder
from pipelines.evaluation.mteb_model import quiet_mteb
from pipelines.evaluation.tasks import make_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="retrieval", choices=KINDS)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="embedded:all-MiniLM-L6-v2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    data = read_folder(options.kind, options.folder, options.split)
    ours = Encoder.load(options.model, max_tokens=options.max_tokens, dtype=options.dtype)
    rival = SentenceTransformer(
        resolve_model(options.model), model_kwargs={"dtype": getattr(torch, options.dtype)}
    )
    rival.max_seq_length = ours.max_tokens

    def run_ours() -> float:
        return evaluate(ours, data).mteb_score

    def run_rival() -> float:
        with quiet_mteb() as mteb:
            return float(
                mteb.evaluate(
                    rival,
                    make_task(data),
                    cache=None,
                    co2_tracker=False,
                    show_progress_bar=False,
                )
                .task_results[0]
                .get_score()
            )

    for each in (ours, rival):
        each.encode(data.judged_texts()[:64])
    with quiet_mteb() as mteb:
        assert mteb.evaluate
    seconds: dict[str, list[float]] = {"ours": [], "rival": []}
    scores = {}
    for _ in range(options.repeats):
        for name, run in (("ours", run_ours), ("rival", run_rival)):
            started = time.perf_counter()
            scores[name] = run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "eval",
                "dataset": data.name,
                "kind": data.kind,
                "counts": data.counts,
                "model": options.model,
                "dtype": options.dtype,
                "ours_s": round(medians["ours"], 3),
                "rival_s": round(medians["rival"], 3),
                "ratio": round(medians["rival"] / medians["ours"], 3),
                "ours_score": round(scores["ours"], 6),
                "rival_score": round(scores["rival"], 6),
                "repeats_s": {name: [round(s, 2) for s in each] for name, each in seconds.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
