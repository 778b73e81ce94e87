"""Gecko's table 4 on a corpus of your own: which positive, and whether a mined hard negative.

    python benchmarks/labels.py FOLDER [--seeds 700] [--training-seeds 3] [--storage RUN]

FOLDER is in BEIR's layout. The laptop recipe's queries are written and scored once. Then, with the
seed or the relabelled passage as positive, and no or the lowest ranked candidate as hard negative,
the student is trained with each training seed and judged on FOLDER's queries. Prints a table in
Markdown and a JSON line. Killed, it goes on where it stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

VARIANTS = {
    "seed, no hard negative": ("seed", "none"),
    "seed, mined hard negative": ("seed", "lowest"),
    "relabelled, no hard negative": ("fused", "none"),
    "relabelled, mined hard negative": ("fused", "lowest"),
}


def tokay(*arguments: str) -> str:
    """Runs the command; returns what it printed."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def ndcg(model: Path, folder: str) -> float:
    """Returns nDCG@10 of a model's folder on the test set."""
    (result,) = json.loads(tokay("eval", str(model), "--beir", folder, "--json"))["results"]
    return float(result["ndcg_at_10"])


def main() -> None:
    """Runs what the notes of an earlier run do not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=700)
    parser.add_argument("--training-seeds", type=int, default=3)
    parser.add_argument("--storage", type=Path, default=Path("runs/labels"))
    arguments = parser.parse_args()
    run, notes = arguments.storage, arguments.storage / "labels.json"
    figures: dict[str, float] = json.loads(notes.read_text()) if notes.exists() else {}
    fixed = [f"corpus.path={arguments.folder}", f"seeds.num_seeds={arguments.seeds}"]
    for seed in range(arguments.training_seeds):
        for name, (positive, negative) in VARIANTS.items():
            if f"{name}, {seed}" in figures:
                continue
            varied = [f"fret.positive={positive}", f"fret.negative={negative}"]
            settings = [*fixed, *varied, f"training.seed={seed}"]
            sets = [word for setting in settings for word in ("--set", setting)]
            tokay("run", "laptop", "--storage", str(run), *sets, "--rebuild", "--until", "export")
            figures.setdefault("before", ndcg(run / "student" / "model", arguments.folder))
            figures[f"{name}, {seed}"] = ndcg(run / "export" / "model", arguments.folder)
            notes.write_text(json.dumps(figures, indent=1))
            print(name, seed, round(figures[f"{name}, {seed}"], 4), file=sys.stderr, flush=True)
    print("| positive, hard negative | nDCG@10, mean | each training seed |\n|---|---|---|")
    print(f"| before training | {figures['before']:.4f} | |")
    for name in VARIANTS:
        each = [figures[f"{name}, {seed}"] for seed in range(arguments.training_seeds)]
        print(f"| {name} | {statistics.fmean(each):.4f} | {', '.join(f'{v:.4f}' for v in each)} |")
    print(json.dumps({"benchmark": "labels", **figures}))


if __name__ == "__main__":
    main()
