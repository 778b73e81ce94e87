"""Prompts by measurement: does a query find its seed again, and do the scores put the seed first?

    python benchmarks/prompts.py FOLDER [--seeds 120] [--task "question answering"] ...

FOLDER is a corpus, such as the demo's runs/demo/data/documents.jsonl. For each task's prompt the
table shows, of all seeds, the share whose query is unusable and the share whose query brings its
seed back as the retriever's first, or among its first ten; then the mean number of words, and the
share of queries that repeat the last word of the passage's title (a query in a searcher's own words
does not).
The second table shows how often QL, RC and their fusion put the seed first among the retriever's
nearest candidates, beside the retriever itself.
"""

import argparse
import asyncio
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.encoder import Encoder
from actors.engine import EngineConfig, LlmConfig
from actors.language_model import LanguageModel, Sampling
from actors.pair_scores import joined
from actors.passage_index import PassageIndex
from pipelines.corpus.cutting import Passage, passages_of
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.fret.fusion import fuse
from pipelines.fret.prompts import STOP, WRITTEN, PairPrompts, QueryPrompts, load_prompts, unfit


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A corpus with its index, and the seeds that every prompt is measured on."""

    llm: LanguageModel
    retriever: Encoder
    passages: Sequence[Passage]
    index: PassageIndex
    seeds: Sequence[int]
    max_passage_tokens: int

    def passage(self, row: int) -> tuple[str, str]:
        passage = self.passages[row]
        return passage.title, self.llm.truncate(passage.text, self.max_passage_tokens)


@dataclass(frozen=True, kw_only=True)
class Written:
    """The usable queries of a prompt with their candidates, and the row of its table."""

    queries: list[tuple[str, int, list[int]]]  # (query, seed, nearest rows)
    cells: list[str]


async def write(bench: Bench, ask: QueryPrompts, task: str, temperature: float) -> Written:
    sampling = Sampling(temperature=temperature, max_tokens=40, stop=STOP)
    prompts = [ask.render(task, *bench.passage(row)) for row in bench.seeds]
    started = time.perf_counter()
    answers = await bench.llm.generate(prompts, sampling=sampling, seeds=list(bench.seeds))
    seconds = time.perf_counter() - started
    usable = []
    for row, answer in zip(bench.seeds, answers, strict=True):
        _, query, reason = ask.parse(task, answer.text, cut=answer.cut)
        if not (answer.error or reason or unfit(query, bench.passages[row].text)):
            usable.append((query, row))
    vectors = bench.retriever.encode_queries([query for query, _ in usable], task=task)
    _, nearest = bench.index.search(vectors, 10)
    queries = [(query, row, list(near)) for (query, row), near in zip(usable, nearest, strict=True)]
    total = len(bench.seeds)
    first = sum(near[0] == row for _, row, near in queries) / total
    ten = sum(row in near for _, row, near in queries) / total
    words = np.mean([len(query.split()) for query, _, _ in queries])
    named = np.mean([_names(query, bench.passages[row].title) for query, row, _ in queries])
    new_tokens = sum(answer.num_tokens for answer in answers)
    figures = [1 - len(usable) / total, first, ten]
    cells = [task, *(f"{figure:.0%}" for figure in figures), f"{words:.1f}", f"{named:.0%}"]
    return Written(queries=queries, cells=[*cells, f"{new_tokens / seconds:.0f}"])


def _names(query: str, title: str) -> bool:
    word = re.split(r"[\s.]+", title.strip(". "))[-1].lower()
    return bool(word) and word in query.lower()


async def score(
    bench: Bench, prompt: PairPrompts, task: str, queries: Sequence[tuple[str, int, list[int]]]
) -> list[str]:
    """Judges each query's nearest passages, the seed among them; returns the table's cells."""
    jobs = []
    for number, (_, seed, near) in enumerate(queries):
        candidates = near[:8] if seed in near[:8] else [*near[:7], seed]
        jobs += [(row, number) for row in candidates]
    jobs.sort()
    pairs = [prompt.render(queries[number][0], *bench.passage(row), task) for row, number in jobs]
    started = time.perf_counter()
    answers = iter(await bench.llm.score([each for pair in pairs for each in pair]))
    scores = [joined([next(answers) for _ in pair]) for pair in pairs]
    seconds = time.perf_counter() - started
    firsts = {"ql": 0, "rc": 0, "ql+rc": 0}
    for number, (_, seed, _) in enumerate(queries):
        mine = [i for i, (_, owner) in enumerate(jobs) if owner == number]
        place = next(i for i, job in enumerate(mine) if jobs[job][0] == seed)
        ql = [scores[i].ql or -99.0 for i in mine]
        rc = [scores[i].rc or -99.0 for i in mine]
        for fusion in firsts:
            firsts[fusion] += int(np.argmax(fuse({"ql": ql, "rc": rc}, fusion)) == place)
    cached = sum(s.num_cached_tokens for s in scores) / sum(s.num_prompt_tokens for s in scores)
    retriever = sum(near[0] == seed for _, seed, near in queries)
    shares = [f"{count / len(queries):.0%}" for count in (retriever, *firsts.values())]
    return [*shares, f"{cached:.0%}", f"{len(pairs) / seconds:.1f}"]


def read_corpus(path: str) -> list[Passage]:
    documents = Corpus(CorpusConfig(path=path)).documents()
    return [
        passage
        for document in documents
        if not isinstance(document, tuple)  # a reject
        for passage in passages_of(document, max_words=160, min_words=20)
    ]


def make_bench(llm: LanguageModel, path: str, *, num_seeds: int, max_passage_tokens: int) -> Bench:
    passages = read_corpus(path)
    retriever = Encoder.load("embedded:all-MiniLM-L6-v2", max_tokens=192)
    index = PassageIndex(retriever.dimensions)
    texts, titles = [p.text for p in passages], [p.title for p in passages]
    index.add(retriever.encode_passages(texts, titles))
    drawn = sorted(
        range(len(passages)), key=lambda i: hashlib.sha256(passages[i].id.encode()).digest()
    )
    return Bench(
        llm=llm,
        retriever=retriever,
        passages=passages,
        index=index,
        seeds=drawn[:num_seeds],
        max_passage_tokens=max_passage_tokens,
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("--model", default="embedded:SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, default=120)
    parser.add_argument(
        "--scored", type=int, default=40, help="queries whose candidates are judged"
    )
    parser.add_argument("--task", action="append", choices=[*load_prompts().tasks, WRITTEN])
    parser.add_argument("--relevance", default="yes-no", choices=list(load_prompts().scores))
    parser.add_argument("--ql-examples", default="all", choices=["all", "positive"])
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--max-passage-tokens", type=int, default=128)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    llm = LanguageModel.load(
        LlmConfig(model=options.model),
        EngineConfig(enforce_eager=not options.compile, kv_cache_gib=2, block_size=32),
    )
    try:
        bench = make_bench(
            llm,
            options.corpus,
            num_seeds=options.seeds,
            max_passage_tokens=options.max_passage_tokens,
        )
        tables = (
            Table("task", "unusable", "seed first", "in ten", "words", "named", "tokens/s"),
            Table("task", "retriever", "QL", "RC", "QL+RC", "cached", "pairs/s"),
        )
        prompts = load_prompts()
        ask = QueryPrompts(prompts=prompts, tasks=tuple(prompts.tasks))
        judge = PairPrompts(
            prompts=prompts, relevance=options.relevance, apart=options.ql_examples == "positive"
        )
        for task in options.task or [*prompts.tasks, WRITTEN]:
            written = await write(bench, ask, task, options.temperature)
            tables[0].add_row(*written.cells)
            if queries := written.queries[: options.scored]:
                tables[1].add_row(task, *await score(bench, judge, task, queries))
        for table in tables:
            Console().print(table)
    finally:
        await llm.close()


if __name__ == "__main__":
    asyncio.run(main())
