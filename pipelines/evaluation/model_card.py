"""What a model card says to machines: mteb's results, and the data that the model has seen.

The hub shows ``model-index`` beside a model, and mteb reads it; ``datasets`` names what the model
was trained on, so that a reader can see which figures are not zero-shot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_MARK = "---\n"


def model_index(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the front matter with results: the tag ``mteb`` and ``model-index``.

    `rows` are the model's results as `Result.to_json` writes them. mteb's own
    `TaskResult.get_hf_eval_results` gives the same, but only for tasks that mteb knows.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            task_type=row["task_type"],
            task_name=row["task_type"],
            dataset_type=row["dataset"],
            dataset_name=row["dataset"],
            dataset_config="default",
            dataset_split=row["split"],
            # One metric can stand there once; another number of dimensions is another metric.
            metric_type=row["metric"],
            metric_name=f"{row['metric']} ({row['dimensions']} dimensions)",
            metric_value=round(row["mteb_score"], 5),
            source_name="MTEB",
            source_url="https://github.com/embeddings-benchmark/mteb/",
        )
        for row in rows
    ]
    return {"tags": ["mteb"], "model-index": eval_results_to_model_index(name, results)}


def add_to_card(card: str, metadata: Mapping[str, Any]) -> str:
    """Returns a model card with more front matter, such as :func:`model_index` returns.

    The card may have had none; ``tags`` are added to those it has.
    """
    head, text = _split(card)
    tags = [*head.get("tags", ()), *metadata.get("tags", ())]
    head = {**head, **metadata} | ({"tags": list(dict.fromkeys(tags))} if tags else {})
    return f"{_MARK}{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}{_MARK}{text}"


def training_sets(card: str) -> tuple[str, ...]:
    """Returns the data sets that a model card's ``datasets`` names, none where it is malformed."""
    try:
        named = _split(card)[0].get("datasets")
    except (yaml.YAMLError, ValueError, RecursionError):
        return ()  # anybody's page, which a model does without
    names = named if isinstance(named, list) else [named]
    return tuple(name for name in names if isinstance(name, str))


def _split(card: str) -> tuple[dict[str, Any], str]:
    # A line of its own: a name may end in ---.
    found = re.match(r"---\n(.*?^)---\n", card.replace("\r\n", "\n"), re.DOTALL | re.MULTILINE)
    head = yaml.safe_load(found[1]) if found else None
    return (head, found.string[found.end() :]) if found and isinstance(head, dict) else ({}, card)
