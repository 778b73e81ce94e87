"""Checks, before an engine scores, that its fast scores are those of the slow way.

Fast scores come over a prefix cache, from one prompt, by requests that an engine's version, its
model runner and its device may each answer differently, and a wrong number looks like a right one.
So a few of a run's own pairs are scored both ways first.
"""

import math
from collections.abc import Sequence

from actors.language_model import LanguageModel
from actors.pair_scores import PairScore, ScoringPrompt
from cluster.errors import ScoresDiffer

NUM_CHECKED = 5


async def check_scores(llm: LanguageModel, pairs: Sequence[ScoringPrompt]) -> float | None:
    """Scores the first few of a run's own pairs over the cache and separately, and compares.

    Query likelihoods are compared as they are, relevances as probabilities: where they are small,
    their logarithm is all rounding.

    Returns:
        The largest difference, or None if this shows nothing: no pair could be scored, or none was
        read from the cache.

    Raises:
        ScoresDiffer: The scores are further apart than the engine's precision allows.
    """
    chosen = list(pairs[:NUM_CHECKED])
    fast = await llm.score(chosen)
    if not any(score.num_cached_tokens > 0 for score in fast):
        return None
    slow = await llm.score(chosen, separate=True)
    compared = [
        (_apart(one, other), pair.query.strip(), one, other)
        for pair, one, other in zip(chosen, fast, slow, strict=True)
        if one.error is None and other.error is None
    ]
    if not compared:
        return None
    apart, query, one, other = max(compared, key=lambda row: row[0])
    if apart > llm.score_tolerance:
        raise ScoresDiffer(
            f"this engine's fast scores are wrong: for the query {query[:60]!r} they"
            f" are {_shown(one)}, and computed separately {_shown(other)}"
            f" ({apart:.3g} apart; accepted is {llm.score_tolerance}). Nothing was"
            " scored. Set scores.separate_prompts to true (slow), or try vLLM's other model runner"
            " by the environment variable VLLM_USE_V2_MODEL_RUNNER (0 or 1), and report it with the"
            " versions of vLLM and the driver"
        )
    return apart


def _apart(one: PairScore, other: PairScore) -> float:
    apart = [0.0]
    if one.ql is not None and other.ql is not None:
        apart.append(abs(one.ql - other.ql))
    if one.rc is not None and other.rc is not None:
        apart.append(abs(math.exp(one.rc) - math.exp(other.rc)))
    return max(apart)


def _shown(score: PairScore) -> str:
    named = {"QL": score.ql, "RC": score.rc}
    return " and ".join(f"{name} {value:.3f}" for name, value in named.items() if value is not None)
