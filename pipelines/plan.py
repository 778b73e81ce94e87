"""`tokay plan`: what a recipe would run, and what the language model would cost.

The estimate is made from a sample of passages: they are put into the recipe's prompts and counted
by the LLM's own tokenizer, without starting an engine.
"""

import itertools
import math
import random
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.language_model import truncate
from cluster.artifacts import Artifact
from cluster.errors import UserError
from pipelines.corpus.passages import Document, Passage, passages_of, reject_reason
from pipelines.corpus.sources import Corpus
from pipelines.fret.prompts import PairPrompts, load_prompts
from pipelines.fret.queries import query_id, query_prompts
from pipelines.graph import TITLES, build_run
from pipelines.recipe import Recipe

NUM_SAMPLED = 50
NUM_READ = 2000  # passages that are read of a corpus to draw the sample from
BLOCK_SIZE = 16  # vLLM's own, on a GPU: prefixes are cached in whole blocks


def make_plan(recipe: Recipe, uri: str) -> dict[str, Any]:
    """Returns the steps with their states, and the estimate for the LLM steps still to run."""
    run = build_run(recipe, uri)
    states = {step.name: run.state(step) for step in run.steps}
    done = {
        step.name: artifact
        for step in run.steps
        if states[step.name] == "done" and (artifact := run.artifact(step))
    }
    todo = [name for name in ("queries", "scores") if name not in done]
    tokens = _llm_tokens(recipe, done) if todo else {}
    estimate, num_actors = recipe.estimate, recipe.resources.llm.num_actors
    actor_s = {
        name: tokens[name]["prefill"] / estimate.prefill_tokens_per_s
        + tokens[name]["decode"] / estimate.decode_tokens_per_s
        + estimate.engine_start_s * num_actors
        for name in todo
    }
    hours = sum(actor_s.values()) / 3600
    return {
        "recipe": recipe.name,
        "storage": run.storage.uri,
        "steps": [{"step": step.name, "state": states[step.name]} for step in run.steps],
        "llm_tokens": {name: tokens[name] for name in todo},
        "llm_seconds_s": {name: round(actor_s[name] / num_actors, 1) for name in todo},
        "llm_actor_hours": round(hours, 3),
        "llm_wall_hours": round(hours / num_actors, 3),
        "llm_gpu_hours": round(hours * recipe.resources.llm.num_gpus, 3),
        "llm_cost_usd": round(hours * estimate.actor_hour_usd, 2),
        "assumptions": estimate.model_dump(),
    }


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Shows the plan."""
    table = Table(box=None, header_style="bold")
    for column in ("step", "", "state", "tokens in", "out", "seconds"):
        table.add_column(column, justify="left" if column in ("step", "", "state") else "right")
    for row in plan["steps"]:
        step = row["step"]
        counts: tuple[str, ...] = ()
        if tokens := plan["llm_tokens"].get(step):
            seconds = f"{plan['llm_seconds_s'][step]:,.0f}"
            counts = (f"{tokens['prefill']:,}", f"{tokens['decode']:,}", seconds)
        table.add_row(step, TITLES[step], row["state"], *counts)
    console.print(table)
    if plan["llm_tokens"]:
        console.print(
            f"LLM: about {plan['llm_actor_hours']} actor hours, {plan['llm_gpu_hours']} GPU hours,"
            f" ${plan['llm_cost_usd']:.2f}; {plan['llm_wall_hours']} hours on the recipe's actors."
            f" Tokens are counted in a sample of {NUM_SAMPLED} passages; speeds, prices and the"
            " share of queries that are scored are the recipe's `estimate`. Tokens that the"
            " engine finds in its cache are not counted.",
            soft_wrap=True,
        )


def _llm_tokens(recipe: Recipe, done: dict[str, Artifact]) -> dict[str, dict[str, int]]:
    """Reckons the prompt tokens that no prefix cache holds, and the tokens to write."""
    found = _read_passages(recipe)
    sample = random.Random(0).sample(found, min(NUM_SAMPLED, len(found)))
    prompts = load_prompts(recipe.prompts)
    ask = query_prompts(recipe.queries, prompts)
    judge = PairPrompts(prompts=prompts, relevance=recipe.scores.relevance)
    tokens = _Tokens(recipe)
    num_queries = (done["seeds"].num_rows if "seeds" in done else recipe.seeds.num_seeds) * (
        recipe.queries.queries_per_seed
    )
    written = recipe.estimate.query_tokens
    reads, shared = [], {}
    for passage in sample:
        task, title = ask.task(query_id(passage.id)), passage.title
        text = tokens.cut(passage.text, recipe.queries.max_passage_tokens)
        beyond, shared[task] = tokens.beyond(
            ask.render(task, title, text), ask.render(task, "", "")
        )
        reads.append(beyond)
    contexts, pairs, examples = [], [], 0
    for passage in sample:
        text = tokens.cut(passage.text, recipe.scores.max_passage_tokens)
        pair, other = judge.render("", passage.title, text), judge.render("", "", "")
        beyond, examples = tokens.beyond(pair.context, other.context)
        contexts.append(beyond)
        rest = len(tokens.ids(pair.context)) % tokens.block  # of a block that is not yet whole
        pairs.append(rest + written + len(tokens.ids(pair.question)))
    num_actors = recipe.resources.llm.num_actors
    num_pairs, num_passages = _num_pairs(recipe, done, num_queries, len(found))
    return {
        "queries": {
            "prefill": round(num_queries * fmean(reads) + num_actors * sum(shared.values())),
            "decode": round(num_queries * written),
        },
        "scores": {
            "prefill": round(
                num_passages * fmean(contexts) + num_pairs * fmean(pairs) + num_actors * examples
            ),
            "decode": 0,
        },
    }


def _num_pairs(
    recipe: Recipe, done: dict[str, Artifact], num_queries: int, num_read: int
) -> tuple[int, int]:
    """Returns the pairs to score, and of how many passages they are."""
    if "pairs" in done:
        return done["pairs"].manifest.metrics["num_pairs"], done["pairs"].num_rows
    num_scored = min(recipe.scores.num_scored, recipe.candidates.num_candidates)
    num_pairs = round(num_queries * recipe.estimate.scored_share * num_scored)
    num_passages = done["passages"].num_rows if "passages" in done else num_read
    if num_passages == NUM_READ:  # there are more
        return num_pairs, num_pairs
    # Of so many draws with putting back, so many are different.
    return num_pairs, round(num_passages * -math.expm1(-num_pairs / num_passages))


def _read_passages(recipe: Recipe) -> list[Passage]:
    """Reads the beginning of the corpus."""
    corpus, config = Corpus(recipe.corpus), recipe.corpus
    passages = (
        passage
        for document in corpus.documents()
        if isinstance(document, Document)
        for passage in passages_of(document, max_words=config.max_words, min_words=config.min_words)
        if reject_reason(passage.text) is None
    )
    first = list(itertools.islice(passages, NUM_READ))
    if not first:
        raise UserError(f"corpus {config.path} gave no passage among its first documents")
    return first


class _Tokens:
    """Counts tokens as the engine will."""

    def __init__(self, recipe: Recipe) -> None:
        from transformers import AutoTokenizer

        from actors.embedded import resolve_model

        self.block = recipe.resources.engine.block_size or BLOCK_SIZE
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                resolve_model(recipe.llm.model), trust_remote_code=recipe.llm.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"llm.model {recipe.llm.model!r} has no tokenizer that can be loaded, and a plan"
                f" counts its tokens: {str(error).splitlines()[0]}"
            ) from error

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def cut(self, text: str, max_tokens: int) -> str:
        return truncate(self._tokenizer, text, max_tokens)

    def beyond(self, prompt: str, other: str) -> tuple[int, int]:
        """Counts a prompt's tokens behind, and in, the whole blocks that it shares with another."""
        tokens = self.ids(prompt)
        pairs = zip(tokens, self.ids(other), strict=False)
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        shared = same // self.block * self.block
        return len(tokens) - shared, shared
