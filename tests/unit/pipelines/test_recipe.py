import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import UserError
from pipelines.recipe import load_recipe, recipe_names


@pytest.mark.parametrize("name", ["laptop", "gpu", "gpu-80gb", "gpu-8x80gb", "cluster"])
def test_recipes_that_come_with_tokay_are_valid(name: str) -> None:
    assert load_recipe(name).name == name
    assert name in recipe_names()


def test_cluster_recipe_asks_for_node_types_that_the_cluster_file_has() -> None:
    import yaml

    cluster = yaml.safe_load((Path(__file__).parents[3] / "ray_cluster.yaml").read_text())
    offered = {
        resource
        for node in cluster["available_node_types"].values()
        for resource in node.get("resources", {})
    }
    recipe = load_recipe("cluster")
    asked = {
        recipe.resources.llm.node_resource,
        recipe.resources.encoder.node_resource,
        recipe.resources.index.node_resource,
        recipe.training.node_resource,
    }
    assert None not in asked and asked <= offered


def test_set_overrides_nested_keys_and_list_places() -> None:
    recipe = load_recipe(
        "laptop", ["seeds.num_seeds=7", "queries.tasks.0=fact checking", "training.seed=3"]
    )
    assert recipe.seeds.num_seeds == 7
    assert recipe.queries.tasks == ("fact checking", "search result")
    assert recipe.training.seed == 3


def test_base_gives_the_keys_that_a_recipe_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: laptop\nname: mine\nseeds: {num_seeds: 5}\n")
    (tmp_path / "short.yaml").write_text("base: mine.yaml\ntraining: {epochs: 1}\n")
    recipe, laptop = load_recipe(tmp_path / "short.yaml"), load_recipe("laptop")
    assert (recipe.name, recipe.seeds.num_seeds, recipe.training.epochs) == ("mine", 5, 1)
    assert recipe.seeds.rows_per_shard == laptop.seeds.rows_per_shard
    assert recipe.training.learning_rate == laptop.training.learning_rate


def test_prompts_are_found_beside_the_recipe_that_names_them(tmp_path: Path) -> None:
    from pipelines.fret import prompts

    text = (Path(prompts.__file__).parent / "prompts.yaml").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "words.yaml").write_text(text)
    (tmp_path / "mine" / "mine.yaml").write_text("base: laptop\nprompts: words.yaml\n")
    (tmp_path / "short.yaml").write_text("base: mine/mine.yaml\n")
    assert load_recipe(tmp_path / "short.yaml").prompts == str(tmp_path / "mine" / "words.yaml")


def test_base_that_leads_back_to_the_recipe_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml is its own base"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seds.num_seeds=7", "unknown key seds; did you mean 'seeds'?"),
        ("seeds.num_sedes=7", "unknown key seeds.num_sedes; did you mean 'num_seeds'?"),
        ("seeds.num_seeds=many", "seeds.num_seeds: 'many' given"),
        ("queries.tasks=[poetry]", "accepted are question answering"),
        ("fret.fusion=best", "'best' given"),
        ("seeds.num_seeds", "write path.to.key=value"),
        (
            "mixture.labelled=[{name: a, path: b, kind: nil}]",
            "mixture.labelled.0.kind: 'nil' given; Input should be 'pairs'",
        ),
        (
            "mixture.labelled=[{name: a, path: b, min_scroe: 3}]",
            "unknown key mixture.labelled.0.min_scroe; did you mean 'min_score'?",
        ),
        (
            "mixture.labelled=[{name: a, path: b}, {name: a, path: c}]",
            "two labelled sets have one name",
        ),
        ("mixture.labelled=[{name: fret, path: b}]", "fret is the name of the generated set"),
        ("prefinetuning.training.epochs=1", "key prefinetuning.mixture is missing"),
        ("prefinetuning.mixture.fret_weight=1", "unknown key prefinetuning.mixture.fret_weight"),
        (
            "training.validation.test_set=scifact",
            "training.validation.test_set: 'scifact' is no retrieval set of the recipe's",
        ),
        ("queries.tasks.9=x", "'9' is no place in a list of 2"),
    ],
)
def test_mistake_in_a_recipe_names_the_key_and_the_mend(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe("laptop", [setting])


def test_missing_recipe_names_those_that_exist() -> None:
    with pytest.raises(
        UserError, match="one of cluster, gecko-mini, gpu, gpu-80gb, gpu-8x80gb, laptop"
    ):
        load_recipe("lptop")


def test_command_answers_a_mistake_with_one_line_and_exit_code_two(tmp_path: Path) -> None:
    command = ["run", "laptop", "--set", "corpus.path=/no/such/corpus", "--storage", str(tmp_path)]
    answer = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *command],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert answer.stderr.strip().splitlines() == [
        "tokay: corpus /no/such/corpus does not exist or is empty: correct corpus.path"
    ]
    assert "Traceback" not in answer.stdout


def test_variables_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: laptop\ncorpus: {path: '${MY_TEXTS}/news'}\n")
    monkeypatch.setenv("MY_TEXTS", "/texts")
    assert load_recipe(recipe).corpus.path == "/texts/news"
    monkeypatch.delenv("MY_TEXTS")
    with pytest.raises(UserError, match=r"mine reads \$\{MY_TEXTS\}: set it"):
        load_recipe(recipe)


def test_a_cut_llm_has_a_gpu_for_each_part() -> None:
    cut = "resources.engine.tensor_parallel_size=2"
    with pytest.raises(UserError, match=r"num_gpus: 1 given.*set num_gpus to 2"):
        load_recipe("gpu", [cut])
    assert load_recipe("gpu", [cut, "resources.llm.num_gpus=2"]).resources.llm.num_gpus == 2
    assert load_recipe("laptop", [cut])  # on a CPU the parts are groups of cores
