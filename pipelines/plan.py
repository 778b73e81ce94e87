"""`tokay plan`: what a recipe would run, and what the language model would cost."""

from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.steps import Run
from pipelines.graph import TITLES, build_run
from pipelines.recipe import Recipe

TOKENS_PER_WORD = 1.4  # English text in the tokenizers of today's LLMs: 1.3 to 1.5
QUERY_TOKENS = 16
QUESTION_TOKENS = 12


def make_plan(recipe: Recipe, uri: str) -> dict[str, Any]:
    """Returns the steps with their states, and the estimate for the LLM steps still to run."""
    run = build_run(recipe, uri)
    states = {step.name: run.state(step) for step in run.steps}
    tokens = _llm_tokens(recipe, _num_seeds(recipe, run))
    todo = {name: part for name, part in tokens.items() if states[name] != "done"}
    estimate = recipe.estimate
    actor_s = sum(
        part["prefill"] / estimate.prefill_tokens_per_s
        + part["decode"] / estimate.decode_tokens_per_s
        for part in todo.values()
    )
    return {
        "recipe": recipe.name,
        "storage": run.storage.uri,
        "steps": [{"step": step.name, "state": states[step.name]} for step in run.steps],
        "llm_tokens": todo,
        "llm_actor_hours": round(actor_s / 3600, 3),
        "llm_wall_hours": round(actor_s / 3600 / recipe.resources.llm.num_actors, 3),
        "llm_gpu_hours": round(actor_s / 3600 * recipe.resources.llm.num_gpus, 3),
        "llm_cost_usd": round(actor_s / 3600 * estimate.actor_hour_usd, 2),
        "assumptions": estimate.model_dump(),
    }


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Shows the plan."""
    table = Table(box=None, header_style="bold")
    for column in ("step", "", "state", "LLM tokens in", "out"):
        table.add_column(column, justify="right" if column in ("LLM tokens in", "out") else "left")
    for row in plan["steps"]:
        tokens = plan["llm_tokens"].get(row["step"])
        counts = (f"{tokens['prefill']:,}", f"{tokens['decode']:,}") if tokens else ("", "")
        table.add_row(row["step"], TITLES[row["step"]], row["state"], *counts)
    console.print(table)
    console.print(
        f"LLM: about {plan['llm_actor_hours']} actor hours, {plan['llm_gpu_hours']} GPU hours,"
        f" ${plan['llm_cost_usd']:.2f}; {plan['llm_wall_hours']} hours on the recipe's actors."
        " Reckoned with the recipe's `estimate`, nothing cached beyond shared prompt prefixes.",
        soft_wrap=True,
    )


def _num_seeds(recipe: Recipe, run: Run) -> int:
    seeds = run.artifact(next(step for step in run.steps if step.name == "seeds"))
    return seeds.num_rows if seeds else recipe.seeds.num_seeds


def _llm_tokens(recipe: Recipe, num_seeds: int) -> dict[str, dict[str, int]]:
    """Reckons the tokens that are not in the shared, cached prefix of every prompt."""
    most = int(recipe.corpus.max_words * TOKENS_PER_WORD)
    written = min(most, recipe.queries.max_passage_tokens)
    scored = min(most, recipe.scores.max_passage_tokens) + QUERY_TOKENS + QUESTION_TOKENS
    num_queries = num_seeds
    num_pairs = num_queries * min(recipe.scores.num_scored, recipe.candidates.num_candidates)
    return {
        "queries": {"prefill": num_queries * written, "decode": num_queries * QUERY_TOKENS},
        "scores": {"prefill": num_pairs * scored, "decode": num_pairs},
    }
