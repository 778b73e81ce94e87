import pytest

from cluster.errors import UserError
from pipelines.recipe.keys import Key, recipe_keys
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe


def test_keys_have_what_they_accept_and_their_defaults():
    found = {key.key: key for key in recipe_keys()}
    assert found["training.loss.same_tower_negatives"].accepts == "all, symmetric, none"
    assert found["training.loss.matryoshka_dimensions"].default == "[]"
    assert found["training.dropout"].default == "true"
    assert found["prefinetuning"].accepts == "the keys below"
    assert found["prefinetuning.training.validation.patience"].accepts == "whole number or null"
    assert found["evaluation[].name"].default == "required"
    assert found["mixture.labelled[].max_negatives"] == Key(
        key="mixture.labelled[].max_negatives",
        accepts="whole number",
        default="1",
        description="hard negatives an example; Gecko has one",
    )


def test_every_key_of_a_recipe_is_listed():
    def paths(tree: object, above: str = "") -> set[str]:
        if isinstance(tree, dict):
            return {path for name in tree for path in paths(tree[name], f"{above}.{name}")}
        if isinstance(tree, list | tuple) and any(isinstance(each, dict) for each in tree):
            return {path for each in tree for path in paths(each, f"{above}[]")}
        return {above[1:]}

    recipe: Recipe = load_recipe("laptop", ["corpus.path=x"])
    listed = {key.key for key in recipe_keys()}
    assert paths(recipe.model_dump()) <= listed


def test_keys_below_one():
    assert [key.key for key in recipe_keys("estimate.query_tokens")] == ["estimate.query_tokens"]
    assert all(key.key.startswith("training.loss.") for key in recipe_keys("training.loss"))
    assert recipe_keys("evaluation")[0].key == "evaluation"
    with pytest.raises(
        UserError, match="no key 'trainnig' in a recipe; its parts are name, corpus"
    ):
        recipe_keys("trainnig")
