"""`tokay plan`: what a recipe would run, what fits, and what the language model would cost.

The estimate is made from a sample of passages: they are put into the recipe's prompts and counted
by the LLM's own tokenizer, without starting an engine. A plan needs neither corpus nor hub nor
credentials: what depends on them is then unknown, or taken from the recipe's `estimate`.
"""

from __future__ import annotations

import itertools
import math
import random
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.embedded import PREFIX, resolve_model
from actors.plain_text import PlainText
from cluster.artifacts import Artifact
from cluster.errors import TokayError, UserError
from cluster.storage import open_storage
from pipelines.corpus.cutting import Passage, passages_of, reject_reason
from pipelines.datasets.corpus import Corpus
from pipelines.datasets.documents import Document
from pipelines.datasets.labelled_sets import HUB
from pipelines.fret.corpus_queries import TASKS, draw_queries
from pipelines.fret.fusion import LLM_JUDGES, steps_unasked
from pipelines.fret.prompts import QueryPrompts, load_prompts
from pipelines.fret.queries import query_prompts
from pipelines.fret.scores import pair_prompts
from pipelines.ids import query_id
from pipelines.mixture.config import SetsConfig
from pipelines.recipe.graph import OPTIONAL_STAGES, TITLES, build_run
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.sizes import GIB
from pipelines.recipe.variables import unset_variables
from pipelines.run.checks import PATIENCE_S, within
from pipelines.run.fit import Need, gpu_needs
from pipelines.run.probe import finished_probe, print_judged
from pipelines.yaml_files import leaves

NUM_SAMPLED = 50
NUM_READ = 2000  # passages of the corpus that the sample is drawn from
CHARACTERS_A_TOKEN = 4  # of English prompts
LLM_STEPS = ("queries", "probe", "scores")
BLOCK_SIZE = 16  # vLLM's own, on a GPU: prefixes are cached in whole blocks


def make_plan(recipe: Recipe, uri: str) -> dict[str, Any]:
    """Returns the steps with their states, what fits, and the estimate for the LLM steps to run.

    A figure that the corpus, the hub or the run folder does not give is None, and `unknown` says
    why.
    """
    unknown: dict[str, str] = {}
    states, done = _states(recipe, uri, unknown)
    probe = None if unknown else finished_probe(recipe, uri)
    todo = [name for name in LLM_STEPS if name in states and name not in done]
    tokens, guessed = _known_tokens(recipe, done, unknown) if todo else ({}, None)
    estimate, resources = recipe.estimate, recipe.resources.llm
    actor_s = {
        name: tokens[name]["prefill"] / estimate.prefill_tokens_per_s
        + tokens[name]["decode"] / estimate.decode_tokens_per_s
        + (estimate.engine_start_s * resources.num_actors if tokens[name]["prefill"] else 0)
        for name in todo
        if name in tokens
    }
    hours = sum(actor_s.values()) / 3600 if tokens or not todo else None

    def times(factor: float, digits: int) -> float | None:
        return None if hours is None else round(hours * factor, digits)

    num_passages = done["passages"].num_rows if "passages" in done else None
    sets = [
        each.name
        for stage in recipe.stages.values()
        if isinstance(stage.mixture, SetsConfig)
        for each in stage.mixture.labelled
        if each.path.startswith(HUB)
    ]
    if sets:
        unknown["rows and columns of the labelled sets from the hub are"] = (
            f"they are fetched when their step runs: {', '.join(sets)}"
        )
    return {
        "recipe": recipe.name,
        "storage": open_storage(uri).uri,
        "steps": [{"step": name, "state": state} for name, state in states.items()],
        "probe": probe,
        "gpu_memory": [_in_gib(need) for need in gpu_needs(recipe, num_passages)],
        "llm_tokens": {name: tokens.get(name) for name in todo},
        "llm_seconds_s": {
            name: round(actor_s[name] / resources.num_actors, 1) if name in actor_s else None
            for name in todo
        },
        "llm_actor_hours": times(1, 3),
        "llm_wall_hours": times(1 / resources.num_actors, 3),
        "llm_gpu_hours": times(resources.num_gpus, 3),
        "llm_cost_usd": times(estimate.actor_hour_usd, 2),
        "assumptions": estimate.model_dump(),
        "guessed": guessed,
        "unknown": unknown,
    }


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Prints the plan."""
    table = Table(box=None, header_style="bold")
    for column in ("step", "", "state", "tokens in", "out", "seconds"):
        table.add_column(column, justify="left" if column in ("step", "", "state") else "right")
    for row in plan["steps"]:
        step, counts = row["step"], ["", "", ""]
        if tokens := plan["llm_tokens"].get(step):
            seconds = f"{plan['llm_seconds_s'][step]:,.0f}"
            counts = [f"{tokens['prefill']:,}", f"{tokens['decode']:,}", seconds]
        elif step in plan["llm_tokens"]:
            counts = ["unknown"] * 3
        table.add_row(step, TITLES[step], row["state"], *counts)
    console.print(table)
    _print_needs(plan["gpu_memory"], console)
    if plan["llm_tokens"] and plan["llm_actor_hours"] is not None:
        console.print(
            f"LLM: about {plan['llm_actor_hours']} actor hours, {plan['llm_gpu_hours']} GPU hours,"
            f" ${plan['llm_cost_usd']:.2f}; {plan['llm_wall_hours']} hours on the recipe's actors."
            f" {_how_counted(plan)}; speeds, prices and the share of queries that are scored are"
            " the recipe's `estimate`. Tokens that the engine finds in its cache are not counted.",
            soft_wrap=True,
            markup=False,
        )
    if plan["probe"]:
        print_judged(plan["probe"], console)
    for what, why in plan["unknown"].items():
        console.print(f"{what} unknown: {why}", soft_wrap=True, markup=False)


def _how_counted(plan: dict[str, Any]) -> str:
    if plan["guessed"] is None:
        return f"Tokens are counted in a sample of {NUM_SAMPLED} passages"
    return (
        f"Tokens are guessed, with {plan['assumptions']['passage_tokens']} for each passage and"
        f" {CHARACTERS_A_TOKEN} characters a token of the prompts ({plan['guessed']})"
    )


def _print_needs(needs: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("step", "memory, one actor or worker", "GiB", "of GPU", "fits"):
        table.add_column(column, justify="right" if column in ("GiB", "of GPU") else "left")
    for need in needs:
        gib = "unknown" if need["unknown"] else f"{need['gib']:,.1f}"
        have = "unknown" if need["of_gib"] is None else f"{need['of_gib']:,.1f}"
        if not need["gpu"]:
            have = "CPU"
        what, parts = need["what"], need["parts_gib"]
        if len(parts) == 1:
            what, parts = f"{what}: {next(iter(parts))}", {}
        table.add_row(", ".join(need["steps"]), what, gib, have, need["fits"])
        for part, size in parts.items():
            table.add_row("", f"  {part}", f"{size:,.1f}")
    console.print(table)
    for need in needs:
        notes = [text for text in (need["unknown"], need["note"]) if text]
        if notes:
            console.print(f"{need['steps'][0]}: {'; '.join(notes)}", soft_wrap=True, markup=False)


def _in_gib(need: Need) -> dict[str, Any]:
    remedy = need.remedy if need.fits in ("no", "perhaps") else ""
    return {
        "steps": list(need.steps),
        "what": need.what,
        "gpu": need.gpu,
        "gib": None if need.unknown else round(need.total / GIB, 2),
        "of_gib": None if need.have is None or not need.gpu else round(need.have / GIB, 2),
        "fits": need.fits,
        "parts_gib": {part: round(size / GIB, 2) for part, size in need.parts.items()},
        "unknown": need.unknown,
        "note": "; ".join(filter(None, (need.note, remedy))),
    }


def _states(
    recipe: Recipe, uri: str, unknown: dict[str, str]
) -> tuple[dict[str, str], dict[str, Artifact]]:
    """Returns the state of each step, and the artifacts of those that are done."""
    try:
        _check_reach(
            uri, *(text for _, text in leaves(recipe.model_dump()) if isinstance(text, str))
        )
        if any(test_set.kind == "mteb" for test_set in recipe.evaluation):
            late = "the data of mteb's tasks in evaluation did not arrive"
            run = within(4 * PATIENCE_S, late, lambda: build_run(recipe, uri))
        else:
            run = build_run(recipe, uri)
        states = {step.name: str(run.state(step)) for step in run.steps}
        artifacts = {step.name: run.artifact(step) for step in run.steps}
    except (TokayError, OSError) as error:
        unknown["states of the steps are"] = " ".join(str(error).split())
        without = tuple(stage for stage in OPTIONAL_STAGES if getattr(recipe, stage) is None)
        names = [name for name in TITLES if not name.startswith(without)]
        for key in ("corpus_queries", "linear_adapter", "gate"):
            names = [name for name in names if getattr(recipe, key) or name != key]
        names = [name for name in names if recipe.has_probe or name != "probe"]
        unasked = steps_unasked(recipe.fret.fusion)
        names = [name for name in names if name not in unasked]
        return {name: "unknown" for name in names if recipe.evaluation or name != "evaluation"}, {}
    done = {name: artifact for name, artifact in artifacts.items() if artifact is not None}
    return states, {name: done[name] for name in done if states[name] == "done"}


def _known_tokens(
    recipe: Recipe, done: dict[str, Artifact], unknown: dict[str, str]
) -> tuple[dict[str, dict[str, int]], str | None]:
    """Returns the tokens of the LLM's steps, and why they are guessed if they are."""
    try:
        return _llm_tokens(recipe, done, _read_passages(recipe), _Tokens(recipe)), None
    except (TokayError, OSError) as error:
        why, length = " ".join(str(error).split()), recipe.estimate.passage_tokens
        if length is None or (recipe.prompts and unset_variables([recipe.prompts])):
            unknown["LLM tokens and cost are"] = why
            return {}, None
    text = "x" * length * CHARACTERS_A_TOKEN
    passages = [Passage(id=str(n), title="", text=text, source="") for n in range(NUM_READ)]
    return _llm_tokens(recipe, done, passages, _GuessedTokens(recipe)), why


def _check_reach(*places: str) -> None:
    """Raises UserError where a place's variable is not set, or its bucket does not answer."""
    for place in places:
        if unset := unset_variables([place]):
            raise UserError(f"the recipe reads {unset[0]}, which is not set in the environment")
        if place.startswith("s3://") and (error := _ask(place)):
            raise error


@cache
def _ask(place: str) -> TokayError | None:
    """Returns why a place on S3 does not answer, or None."""
    path = "" if place.rstrip("/").count("/") > 2 else "any"
    try:
        within(PATIENCE_S, f"{place} did not answer", lambda: open_storage(place).exists(path))
    except TokayError as error:
        return error
    return None


def _llm_tokens(
    recipe: Recipe, done: dict[str, Artifact], passages: list[Passage], tokens: _Tokens
) -> dict[str, dict[str, int]]:
    """Estimates the prompt tokens that no prefix cache holds, and the tokens to write."""
    sample = random.Random(0).sample(passages, min(NUM_SAMPLED, len(passages)))
    prompts = load_prompts(recipe.prompts)
    ask = query_prompts(recipe.queries, prompts)
    hold_out = recipe.gate.hold_out if recipe.gate else None
    num_held_out = hold_out.num_seeds if hold_out else 0
    num_seeds = recipe.seeds.num_seeds
    if "seeds" in done:
        counts = done["seeds"].manifest.metrics
        num_seeds, num_held_out = counts["num_seeds"], counts.get("num_held_out_seeds", 0)
    num_queries = num_seeds * recipe.queries.queries_per_seed
    num_written = num_queries + num_held_out * recipe.queries.queries_per_seed
    written = recipe.estimate.query_tokens
    reads, shared = [], {}
    for passage in sample:
        task, title = ask.task(query_id(passage.id)), passage.title
        text = tokens.cut(passage.text, recipe.queries.max_passage_tokens)
        own = ask.of(text)
        beyond, shared[task, own.language] = tokens.beyond(
            own.render(task, title, text), own.render(task, "", "")
        )
        reads.append(beyond)
    num_actors = recipe.resources.llm.num_actors
    counts = {
        "queries": {
            "prefill": round(num_written * fmean(reads) + num_actors * sum(shared.values())),
            "decode": round(num_written * written),
        }
    }
    num_own = _num_own(recipe, done, passages)
    tasks = (*ask.tasks, *(TASKS if num_own else ()))
    wordings = {pair_prompts(recipe).render("", "", "", task)[0].context for task in tasks}
    scored = _num_pairs(recipe, done, num_queries, len(passages), len(wordings), num_own)
    for step, judges in (("probe", LLM_JUDGES), ("scores", recipe.fret.llm_judges)):
        num_pairs, num_contexts = scored[step]
        context, pair, examples = _scoring_tokens(recipe, judges, ask, sample, tokens)
        prefill = num_contexts * context + num_pairs * pair + num_actors * examples
        counts[step] = {"prefill": num_pairs and round(prefill), "decode": 0}
    return counts


def _scoring_tokens(
    recipe: Recipe,
    judges: tuple[str, ...],
    ask: QueryPrompts,
    sample: list[Passage],
    tokens: _Tokens,
) -> tuple[float, float, int]:
    """Counts the tokens of a passage in a task's words, of a pair with it, and of all examples."""
    judge = pair_prompts(recipe, judges)
    contexts, pairs = 0.0, 0.0
    examples: dict[str, int] = {}
    for passage in sample:
        task, title = ask.task(query_id(passage.id)), passage.title
        text = tokens.cut(passage.text, recipe.scores.max_passage_tokens)
        parts = [judge.render("", *given, task) for given in ((title, text), ("", ""))]
        for part, other in zip(*parts, strict=True):
            beyond, examples[other.context] = tokens.beyond(part.context, other.context)
            contexts += beyond
            rest = len(tokens.ids(part.context)) % tokens.block  # in a block that is not full
            pairs += rest + recipe.estimate.query_tokens + len(tokens.ids(part.question))
    return contexts / len(sample), pairs / len(sample), sum(examples.values())


def _num_pairs(
    recipe: Recipe,
    done: dict[str, Artifact],
    num_queries: int,
    num_read: int,
    num_wordings: int,
    num_own: int = 0,
) -> dict[str, tuple[int, int]]:
    """Returns the number of pairs that each step scores, and of the passages in them.

    A passage counts once for each wording in which the LLM reads it, which depends on the task. The
    corpus' own queries are not probed; nearly all of them are fit.
    """
    num_scored = min(recipe.scores.num_scored, recipe.candidates.num_candidates)
    num_fit = round(num_queries * recipe.estimate.scored_share)
    num_probed = min(recipe.probe.num_queries, num_fit) if recipe.has_probe else 0
    num_rest = num_fit - num_probed + num_own
    num_pairs = {"probe": num_probed * num_scored, "scores": num_rest * num_scored}
    if "probe" in done and done["probe"].manifest.metrics["fusion"] is None:
        num_pairs["scores"] = 0
    num_passages = done["passages"].num_rows if "passages" in done else num_read
    counts = {}
    for step, num in num_pairs.items():
        # A corpus of which no more than NUM_READ were read has others.
        different = _num_drawn(num, num_passages * num_wordings)
        counts[step] = (num, num if num_passages == NUM_READ else different)
    if "pairs" in done:
        num, num_passages = done["pairs"].manifest.metrics["num_pairs"], done["pairs"].num_rows
        contexts = max(num_passages, _num_drawn(num, num_passages * num_wordings))
        counts["scores"] = (num, contexts)
    return counts


def _num_drawn(num: int, num_all: int) -> int:
    """Returns how many different ones are expected when so many are drawn with replacement."""
    return round(num_all * -math.expm1(-num / num_all)) if num_all else 0


def _num_own(recipe: Recipe, done: dict[str, Artifact], passages: list[Passage]) -> int:
    """Returns the number of queries taken from the corpus, of which these passages were read."""
    config = recipe.corpus_queries
    if config is None:
        return 0
    if "corpus_queries" in done:
        return done["corpus_queries"].num_rows
    if len(passages) == NUM_READ:  # there are others
        return config.max_titles + config.max_sentences
    return len(draw_queries(passages, config))


def _read_passages(recipe: Recipe) -> list[Passage]:
    """Reads the beginning of the corpus."""
    _check_reach(recipe.corpus.path)
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
        self.block = recipe.resources.engine.block_size or BLOCK_SIZE
        model = recipe.llm.model
        if model.startswith("s3://"):
            raise UserError(f"llm.model {model} is on S3, and a plan fetches no model from there")
        try:
            if model.startswith(PREFIX) or Path(model).expanduser().is_dir():
                self._tokenizer = self._load(recipe)
            else:
                late = f"the model hub did not give the tokenizer of llm.model {model}"
                self._tokenizer = within(PATIENCE_S, late, lambda: self._load(recipe))
        except (OSError, ValueError) as error:
            raise UserError(
                f"llm.model {recipe.llm.model!r} has no tokenizer that can be loaded, and a plan"
                f" counts its tokens: {str(error).splitlines()[0]}"
            ) from error

    def _load(self, recipe: Recipe) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            resolve_model(recipe.llm.model), trust_remote_code=False
        )

    def ids(self, text: str) -> list[Any]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def cut(self, text: str, max_tokens: int) -> str:
        return PlainText(self._tokenizer).truncate(text, max_tokens)

    def beyond(self, prompt: str, other: str) -> tuple[int, int]:
        """Counts a prompt's tokens after, and in, the whole blocks that it shares with another."""
        tokens = self.ids(prompt)
        pairs = zip(tokens, self.ids(other), strict=False)
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        shared = same // self.block * self.block
        return len(tokens) - shared, shared


class _GuessedTokens(_Tokens):
    """Counts a token for every few characters, where there is no tokenizer."""

    def __init__(self, recipe: Recipe) -> None:
        self.block = recipe.resources.engine.block_size or BLOCK_SIZE

    def ids(self, text: str) -> list[Any]:
        starts = range(0, len(text), CHARACTERS_A_TOKEN)
        return [text[start : start + CHARACTERS_A_TOKEN] for start in starts]

    def cut(self, text: str, max_tokens: int) -> str:
        return text[: max_tokens * CHARACTERS_A_TOKEN]
