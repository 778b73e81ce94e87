"""Which keys of a recipe are in a fingerprint: a new key, or a lost mark, shows here."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from pipelines.recipe.graph import build_run
from pipelines.recipe.keys import recipe_keys
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe

NOT_FINGERPRINTED = {
    *("corpus.path", "corpus.max_reject_share", "prompts"),
    *("queries.max_unusable_share", "scores.max_unusable_share", "probe.max_passages"),
    "cross_encoder.batch_tokens",
    *("mixture.max_reject_share", "mixture.labelled[].path"),
    *("prefinetuning.mixture.max_reject_share", "prefinetuning.mixture.labelled[].path"),
    *("student.dtype", "evaluation[].path"),
    *("resources", "estimate", "sizes", "variables"),
}
OF_A_TRAINING = {
    *("gradient_cache_tokens", "gradient_checkpointing", "num_workers", "min_workers", "use_gpu"),
    *("sharding", "node_resource", "checkpoint_every_batches", "max_failures", "tracking"),
}
STAGES = ("", "prefinetuning.", "embedding_distillation.")
# Keys with which the files of this recipe cannot be read any more.
UNREADABLE = {
    *("corpus.format", "evaluation[].kind", "evaluation[].split"),
    *("prompts", "prefinetuning.training.validation"),
    *("embedding_distillation.training.validation",),
}


def expected(key: str) -> bool:
    stage, _, rest = key.partition("training.")
    marked = key in NOT_FINGERPRINTED or key.partition(".")[0] in NOT_FINGERPRINTED
    return not (marked or (stage in STAGES and rest in OF_A_TRAINING))


def test_every_key_is_fingerprinted_but_those_that_change_nothing() -> None:
    wrong = [key.key for key in recipe_keys() if key.fingerprinted != expected(key.key)]
    assert wrong == []


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    passage = {"_id": "1", "title": "Bees", "text": "They dance."}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(passage))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "Who dances?"}))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"query": "a", "positive": "b"}))
    labelled = f"{{name: faq, path: {pairs}, task: a, revision: a, max_rows: 9, weight: 1}}"
    validation = "{every_batches: 5, test_set: bees, patience: 3}"
    return load_recipe(
        "laptop",
        [
            f"corpus.path={tmp_path}/corpus.jsonl",
            f"evaluation=[{{name: bees, path: {tmp_path}, task: a, dimensions: [128]}}]",
            f"mixture.labelled=[{labelled}]",
            f"prefinetuning.mixture.labelled=[{labelled}]",
            f"training.validation={validation}",
            "training.lora={rank: 4}",
            "embedding_distillation.teacher={model: embedded:all-MiniLM-L6-v2}",
            "gate={num_queries: 7}",
            "corpus_queries={max_titles: 7}",
            "fret.fusion=auto",
        ],
    )


def others(value: Any, above: str = "") -> list[tuple[str, Any]]:
    """Returns a tree's copies in which one leaf is another, each with the leaf's key."""
    if isinstance(value, dict):
        return [
            (key, value | {name: other})
            for name, each in value.items()
            for key, other in others(each, f"{above}.{name}" if above else name)
        ]
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return [(key, (other, *value[1:])) for key, other in others(value[0], f"{above}[]")]
    if isinstance(value, list | tuple):
        return [(above, (*value, value[0] if value else 7))]
    if isinstance(value, bool):
        return [(above, not value)]
    return [(above, f"{value} x" if value is None or isinstance(value, str) else value + 1)]


def rebuilt(model: Any, tree: Any) -> Any:
    """Returns a model with the leaves of a tree, which need not be accepted."""
    if isinstance(tree, dict) and hasattr(model, "model_fields"):
        parts = {name: rebuilt(getattr(model, name), each) for name, each in tree.items()}
        return model.model_copy(update=parts)
    if isinstance(model, tuple) and model and hasattr(model[0], "model_fields"):
        return tuple(rebuilt(*pair) for pair in zip(model, tree, strict=True))
    return tree


def test_another_value_makes_another_step_where_its_key_is_fingerprinted_alone(
    recipe: Recipe, tmp_path: Path
) -> None:
    def fingerprints(recipe: Recipe) -> list[str]:
        run = build_run(recipe, str(tmp_path / "run"))
        return [run.fingerprint(step) for step in run.steps]

    before = fingerprints(recipe)
    wrong, unreadable = [], set()
    for key, tree in others(recipe.model_dump()):
        if key.endswith("path"):  # what lies there is in the fingerprint
            continue
        # The one is read where fret.fusion names it, the other with fixed passages: see test_graph.
        if key in ("cross_encoder", "linear_adapter"):
            continue
        try:
            changed = fingerprints(rebuilt(recipe, tree)) != before
        except (UserError, AttributeError, LookupError):
            unreadable.add(key)
            continue
        # The step `student` does not ask for its precision; those that compute with it do.
        if changed != (expected(key) or key == "student.dtype"):
            wrong.append(key)
    assert (wrong, unreadable) == ([], UNREADABLE)
