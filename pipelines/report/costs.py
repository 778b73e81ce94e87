"""What the examples cost: tokens, time and money per step and per accepted example."""

from typing import Any

from cluster.artifacts import Json
from pipelines.report.run_folder import RunFolder

# The steps that make examples, in their order.
STEPS = (
    *("queries", "corpus_queries", "embeddings", "candidates"),
    *("probe", "pairs", "scores", "cross_scores", "fret"),
)
LLM_STEPS = ("queries", "probe", "scores")


def collect_costs(run: RunFolder) -> dict[str, Json] | None:
    """Returns the costs of making the examples; None until the step `fret` is done.

    `computed_tokens` are prompt tokens that were not in the engine's cache. `cost_usd` covers the
    LLM's actors, at the recipe's hourly price; other steps run on them or beside them.
    """
    if "fret" not in run.artifacts:
        return None
    price = _number(run.recipe, "estimate", "actor_hour_usd", 0.0)
    num_actors = _number(run.recipe, "resources", "llm", "num_actors", 1)
    rows = []
    for name in STEPS:
        if name not in run.artifacts:
            continue
        manifest = run.artifacts[name].manifest
        row: dict[str, Json] = {"name": name, "seconds_s": manifest.seconds_s}
        if name in LLM_STEPS:
            prompt = manifest.metrics.get("num_prompt_tokens", 0)
            row |= {
                "prompt_tokens": prompt,
                "computed_tokens": prompt - manifest.metrics.get("num_cached_tokens", 0),
                "written_tokens": manifest.metrics.get("num_written_tokens", 0),
                "cost_usd": manifest.seconds_s / 3600 * num_actors * price,
            }
        rows.append(row)
    keys = ("seconds_s", "prompt_tokens", "computed_tokens", "written_tokens", "cost_usd")
    total = {key: sum(row.get(key, 0) for row in rows) for key in keys}
    num_kept = run.artifacts["fret"].manifest.metrics.get("num_kept", 0)
    return {
        "steps": rows,
        "total": total,
        "num_accepted": num_kept,
        "per_accepted": {key: total[key] / num_kept for key in keys} if num_kept else None,
    }


def _number(recipe: dict[str, Any], *path: Any) -> Any:
    """Reads a key of an unvalidated recipe; the last item of `path` is the default."""
    *keys, default = path
    value: Any = recipe
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else default
