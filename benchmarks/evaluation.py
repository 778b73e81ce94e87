"""Evaluating a test set: ours beside mteb with sentence-transformers, the same task and model.

    python benchmarks/evaluation.py FOLDER [--model embedded:all-MiniLM-L6-v2] [--repeats 3]

FOLDER is in BEIR's layout. Both must find the same nDCG@10; the seconds are those of a whole
evaluation (encode, search, score), the models loaded and warm, in turns, the fastest of each.
"""

import argparse
import json
import time
from pathlib import Path

from sentence_transformers import SentenceTransformer

from actors.embedded import resolve_model
from actors.encoder import Encoder
from pipelines.evaluation.dataset import read_beir
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.mteb_model import quiet_mteb
from pipelines.evaluation.retrieval_task import make_retrieval_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="embedded:all-MiniLM-L6-v2")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    dataset = read_beir(options.folder, options.split)
    ours = Encoder.load(options.model, max_tokens=options.max_tokens)
    theirs = SentenceTransformer(resolve_model(options.model))
    theirs.max_seq_length = ours.max_tokens
    warm_up = [passage.text for passage in list(dataset.passages.values())[:32]]
    ours.encode(warm_up)
    theirs.encode(warm_up)

    seconds: dict[str, list[float]] = {"tokay": [], "sentence_transformers": []}
    for _ in range(options.repeats):
        started = time.perf_counter()
        result = evaluate(ours, dataset)
        seconds["tokay"].append(time.perf_counter() - started)
        with quiet_mteb() as mteb:
            started = time.perf_counter()
            rival = mteb.evaluate(
                theirs,
                make_retrieval_task(dataset),
                cache=None,
                co2_tracker=False,
                show_progress_bar=False,
            ).task_results[0]
            seconds["sentence_transformers"].append(time.perf_counter() - started)
    tokay_s, rival_s = (min(each) for each in seconds.values())
    print(
        json.dumps(
            {
                "dataset": dataset.name,
                "num_passages": len(dataset.passages),
                "ndcg_at_10": {
                    "tokay": round(result.ndcg_at_10.mean, 5),
                    "sentence_transformers": rival.get_score(),
                },
                "evaluation_s": {"tokay": tokay_s, "sentence_transformers": rival_s},
                "speed_ratio": rival_s / tokay_s,
                "texts_per_s": result.texts_per_s,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
