"""Relabelling beside naive vLLM: both scores of the same pairs, with the same model and prompt.

    python benchmarks/relabel.py FOLDER [--pairs 256] [--repeats 3]

FOLDER is in BEIR's layout. Every passage's title is a query, and its 20 nearest passages are its
candidates, as in a run whose seeds are all passages. The pairs are those of the first passages in
the order of ids, which is what one actor is given at a time. The rival is `LLM.generate` with two
prompts per pair, query by query, each with the log-probabilities of its whole prompt; both engines
have both cores and the same settings, and take turns. Prints one JSON line; engine start is in
neither figure. `ranks_equal` is the share of queries (of those with several pairs) whose order of
candidates is the same for both, by QL and by RC.
"""

import argparse
import asyncio
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
from bare_vllm import bare_llm

from actors.engine import EngineConfig, LlmConfig
from actors.language_model import LanguageModel
from actors.pair_scores import ScoringPrompt
from cluster.plain_json import dump_json
from pipelines.fret.fusion import ranks
from pipelines.fret.prompts import PairPrompts, load_prompts

LLM = LlmConfig(model="embedded:SmolLM2-135M-Instruct", dtype="bfloat16", max_model_tokens=1024)
ENGINE = EngineConfig(
    enforce_eager=True,
    gpu_memory_utilization=0.4,  # both engines are on one GPU
    kv_cache_gib=2,
    max_num_seqs=96,
    block_size=32,
)
NUM_CANDIDATES = 20
MAX_PASSAGE_WORDS = 120


def find_pairs(folder: str, num_pairs: int) -> list[tuple[int, ScoringPrompt]]:
    """Returns (query, prompt) pairs, passage by passage."""
    from actors.encoder import Encoder
    from actors.passage_index import PassageIndex
    from pipelines.datasets.beir import read_beir

    passages = [p for p in read_beir(folder).passages.values() if p.title and p.text]
    encoder = Encoder.load("embedded:all-MiniLM-L6-v2", max_tokens=192, dtype="auto")
    index = PassageIndex(encoder.dimensions)
    index.add(encoder.encode_passages([p.text for p in passages], [p.title for p in passages]))
    queries = encoder.encode_queries([p.title for p in passages], task="")
    _, nearest = index.search(queries, NUM_CANDIDATES)
    by_passage = sorted((row, query) for query, rows in enumerate(nearest) for row in rows.tolist())
    texts = [" ".join(p.text.split()[:MAX_PASSAGE_WORDS]) for p in passages]
    prompts = PairPrompts(prompts=load_prompts(), relevance="yes-no")
    return [
        (query, prompt)
        for row, query in by_passage[:num_pairs]
        for prompt in prompts.render(passages[query].title, "", texts[row], "question answering")
    ]


def tokay(connection: Connection) -> None:
    """Scores lists of pairs with Tokay's engine."""
    loop = asyncio.new_event_loop()
    llm = LanguageModel.load(LLM, ENGINE)
    connection.send(None)
    while True:
        pairs = connection.recv()
        begin = time.perf_counter()
        scores = loop.run_until_complete(llm.score(pairs))
        seconds = time.perf_counter() - begin
        connection.send(([(score.ql, score.rc) for score in scores], seconds))


def naive(connection: Connection) -> None:
    """Scores lists of pairs as vLLM's own examples would."""
    from vllm import SamplingParams

    llm = bare_llm(LLM, ENGINE, gpu_memory_utilization=ENGINE.gpu_memory_utilization)
    tokenizer = llm.get_tokenizer()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def score(pair: ScoringPrompt, ql: Any, rc: Any) -> tuple[float, float]:
        start = len(ids(pair.context))
        written = ql.prompt_token_ids[start:]
        likelihood = statistics.fmean(
            position[token].logprob
            for position, token in zip(ql.prompt_logprobs[start:], written, strict=True)
        )
        yes, no = (rc.outputs[0].logprobs[0][ids(label)[0]].logprob for label, _ in pair.labels)
        return likelihood, -math.log1p(math.exp(no - yes))

    connection.send(None)
    while True:
        pairs = connection.recv()
        begin = time.perf_counter()
        prompts, params = [], []
        for pair in pairs:
            labels = [ids(label)[0] for label, _ in pair.labels]
            tokens = ids(pair.context) + ids(pair.query)
            prompts += [tokens, tokens + ids(pair.question)]
            params += [
                SamplingParams(max_tokens=1, prompt_logprobs=0),
                SamplingParams(max_tokens=1, prompt_logprobs=0, logprob_token_ids=labels),
            ]
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False
        )
        scores = [
            score(pair, ql, rc)
            for pair, ql, rc in zip(pairs, outputs[::2], outputs[1::2], strict=True)
        ]
        connection.send((scores, time.perf_counter() - begin))


def main() -> None:
    """Runs both in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    by_passage = find_pairs(arguments.folder, arguments.pairs)
    by_query = sorted(range(len(by_passage)), key=lambda place: by_passage[place][0])

    context = multiprocessing.get_context("spawn")
    engines = {}
    for work in (tokay, naive):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs,))
        process.start()
        ours.recv()
        engines[work.__name__] = (ours, process)

    def ask(name: str, pairs: list[ScoringPrompt]) -> tuple[list[tuple[float, float]], float]:
        engines[name][0].send(pairs)
        scores, seconds = engines[name][0].recv()
        return scores, seconds

    seconds: dict[str, list[float]] = defaultdict(list)
    for name in engines:  # what the first request costs is in neither figure
        ask(name, [pair for _, pair in by_passage[-2:]])
    for number in range(arguments.repeats):
        # A space makes every pair new: nothing may be read from an earlier repeat's cache.
        fresh = [
            (q, ScoringPrompt(**(vars(pair) | {"context": " " * number + pair.context})))
            for q, pair in by_passage
        ]
        cached, spent = ask("tokay", [pair for _, pair in fresh])
        seconds["tokay"].append(spent)
        answers, spent = ask("naive", [fresh[place][1] for place in by_query])
        seconds["naive"].append(spent)
    plain = [answers[by_query.index(place)] for place in range(len(by_query))]
    for _, process in engines.values():
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()  # vLLM's own processes outlive the one that started them

    by_number: dict[int, list[int]] = defaultdict(list)
    for place, (query, _) in enumerate(by_passage):
        by_number[query].append(place)
    several = [places for places in by_number.values() if len(places) > 1]
    same = [
        all(
            (
                ranks([cached[p][kind] for p in places]) == ranks([plain[p][kind] for p in places])
            ).all()
            for kind in (0, 1)
        )
        for places in several
    ]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        dump_json(
            {
                "benchmark": "relabel",
                "pairs": len(by_passage),
                "ours_pairs_per_s": round(len(by_passage) / medians["tokay"], 2),
                "rival_pairs_per_s": round(len(by_passage) / medians["naive"], 2),
                "ratio": round(medians["naive"] / medians["tokay"], 2),
                "seconds": {name: np.round(values, 2).tolist() for name, values in seconds.items()},
                "queries_compared": len(same),
                "ranks_equal": round(statistics.fmean(same), 4) if same else None,
                "largest_difference": round(float(np.abs(np.array(cached) - plain).max()), 6),
            }
        )
    )


if __name__ == "__main__":
    main()
