"""Evaluating on a test set: ours beside plain mteb with SentenceTransformer, same task and model.

    python benchmarks/eval.py FOLDER [--kind retrieval] [--model embedded:all-MiniLM-L6-v2]
    python benchmarks/eval.py FOLDER --actors 1 2

Both are in float32 unless --dtype says otherwise (then both are in that), cut texts at the same
number of tokens, and must find the same score. The seconds are those of a whole evaluation (encode,
search or classify, score) with the models loaded and warm, in turns, the median of each. With
--actors no rival runs: that many Ray actors encode, in turns, a core each.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from actors.embedded import resolve_model
from actors.encoder import Encoder
from actors.encoder_actor import EncoderActors
from actors.text_encoder import TextEncoder
from cluster.plain_json import dump_json
from pipelines.datasets.folders import KINDS, TestData, read_folder
from pipelines.datasets.mteb_tasks import make_task, quiet_mteb
from pipelines.evaluation.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="retrieval", choices=KINDS)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="embedded:all-MiniLM-L6-v2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--actors", type=int, nargs="+", help="numbers of Ray actors to compare")
    options = parser.parse_args()

    data = read_folder(options.kind, options.folder, options.split)
    load = partial(Encoder.load, options.model, max_tokens=options.max_tokens, dtype=options.dtype)
    report = {
        "benchmark": "eval",
        "dataset": data.name,
        "kind": data.kind,
        "counts": data.counts,
        "model": options.model,
        "dtype": options.dtype,
    }
    if options.actors:
        figures = compare_actors(load, data, options.actors, options.repeats)
    else:
        figures = compare_with_mteb(load(), data, options)
    print(dump_json(report | figures))


def compare_with_mteb(ours: Encoder, data: TestData, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds and the score of both, and how many times as fast ours is."""
    rival = SentenceTransformer(
        resolve_model(options.model), model_kwargs={"dtype": getattr(torch, options.dtype)}
    )
    rival.max_seq_length = ours.max_tokens

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
    runs = {"ours": partial(_score, ours, data), "rival": run_rival}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    scores = {}
    for _ in range(options.repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            scores[name] = run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "ours_s": round(medians["ours"], 3),
        "rival_s": round(medians["rival"], 3),
        "ratio": round(medians["rival"] / medians["ours"], 3),
        "ours_score": round(scores["ours"], 6),
        "rival_score": round(scores["rival"], 6),
        "repeats_s": rounded(seconds),
    }


def compare_actors(
    load: Callable[[], Encoder], data: TestData, numbers: list[int], repeats: int
) -> dict[str, Any]:
    """Returns the seconds with each number of actors, and their share of the first's."""

    def started(number: int) -> EncoderActors:
        actors = EncoderActors(load, number)  # with a core each, so the others have ended
        actors.encode_queries(data.judged_texts()[: 64 * number], task="")
        with quiet_mteb():
            pass
        return actors

    seconds: dict[str, list[float]] = {str(number): [] for number in numbers}
    scores = {}
    for number in numbers * repeats:
        actors = started(number)
        begin = time.perf_counter()
        scores[str(number)] = _score(actors, data)
        seconds[str(number)].append(time.perf_counter() - begin)
        actors.close()
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    first = medians[str(numbers[0])]
    return {
        "actors_s": {name: round(each, 3) for name, each in medians.items()},
        "share_of_first": {name: round(each / first, 3) for name, each in medians.items()},
        "scores": {name: round(score, 6) for name, score in scores.items()},
        "repeats_s": rounded(seconds),
    }


def rounded(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(second, 2) for second in each] for name, each in seconds.items()}


def _score(encoder: TextEncoder, data: TestData) -> float:
    return evaluate(encoder, data).mteb_score


if __name__ == "__main__":
    main()
