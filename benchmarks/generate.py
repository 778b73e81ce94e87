"""The step `queries`, streamed and written to Parquet, beside bare `LLM.generate`.

    python benchmarks/generate.py FOLDER [--seeds 384] [--repeats 3]

FOLDER is a corpus as recipes take it. Ours is the step as a run has it: Ray Data, an actor, shards
read from and committed to disk; from the moment the engine is up to the last shard's commit. The
rival gets the same prompts and seeds as one list, in one process, and writes nothing. Both engines
have the laptop recipe's settings and both cores, and take turns. Prints one JSON line.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from bare_vllm import bare_llm
from streamed_generation import write_step

from cluster.plain_json import dump_json
from pipelines.fret.prompts import STOP, load_prompts
from pipelines.fret.queries import query_prompts
from pipelines.ids import query_id
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.run.console import JsonLines


def bare(connection: Connection, recipe: Recipe, passages: list[dict[str, Any]]) -> None:
    """Writes all queries with `LLM.generate`, and reports how long it took."""
    from vllm import SamplingParams

    llm = bare_llm(
        recipe.llm,
        recipe.resources.engine,
        enable_chunked_prefill=False,  # else a seeded request kills the CPU engine
        max_num_batched_tokens=recipe.llm.max_model_tokens,
    )
    tokenizer = llm.get_tokenizer()
    ask = query_prompts(recipe.queries, load_prompts())
    prompts, params = [], []
    for passage in passages:
        id_ = query_id(passage["id"])
        tokens = tokenizer(passage["text"], add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(tokens[: recipe.queries.max_passage_tokens])
        prompts.append(ask.render(ask.task(id_), passage["title"], text))
        params.append(
            SamplingParams(
                temperature=recipe.queries.temperature,
                max_tokens=recipe.queries.max_query_tokens,
                stop=list(STOP),
                seed=int(id_[:8], 16) ^ recipe.queries.seed,
            )
        )
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    connection.send((seconds, sum(len(output.outputs[0].token_ids) for output in outputs)))


def run_bare(recipe: Recipe, passages: list[dict[str, Any]]) -> tuple[float, int]:
    """Runs the rival in a process that ends afterwards, as ours is: an idle engine costs too."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=bare, args=(theirs, recipe, passages)
    )
    process.start()
    result: tuple[float, int] = ours.recv()
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()  # vLLM's own processes outlive the one that started them
    process.join()
    return result


def main() -> None:
    """Runs both in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    recipe = load_recipe(
        "laptop", [f"corpus.path={arguments.folder}", f"seeds.num_seeds={arguments.seeds}"]
    )
    results: dict[str, list[tuple[float, int]]] = {"ours": [], "rival": []}
    with tempfile.TemporaryDirectory(prefix="generate-") as folder:
        run = build_run(recipe, f"{folder}/run")
        sys.stdout, stdout = sys.stderr, sys.stdout
        seeds = run.execute(JsonLines(), until="seeds")["seeds"]
        passages = seeds.read().to_pylist()
        for number in range(arguments.repeats):
            results["ours"].append(write_step(recipe, seeds, Path(folder, str(number))))
            results["rival"].append(run_bare(recipe, passages))
        sys.stdout = stdout
    rates = {
        name: statistics.median(tokens / seconds for seconds, tokens in rows)
        for name, rows in results.items()
    }
    print(
        dump_json(
            {
                "benchmark": "generate",
                "prompts": arguments.seeds,
                "ours_tokens_per_s": round(rates["ours"], 1),
                "rival_tokens_per_s": round(rates["rival"], 1),
                "ratio": round(rates["ours"] / rates["rival"], 3),
                "seconds_and_tokens": results,
            }
        )
    )


if __name__ == "__main__":
    main()
