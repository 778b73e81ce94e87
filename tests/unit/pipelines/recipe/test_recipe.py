import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import UserError
from pipelines.corpus.seeds import HoldOut
from pipelines.datasets.mteb_tasks import quiet_mteb
from pipelines.recipe.read import load_recipe, read_models, recipe_names
from pipelines.yaml_files import write_yaml


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_that_come_with_tokay_are_valid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKAY_DATA", str(tmp_path))
    assert load_recipe(name).name == name


def test_cluster_recipe_asks_for_node_types_that_the_cluster_file_has() -> None:
    import yaml

    cluster = yaml.safe_load((Path(__file__).parents[4] / "ray_cluster.yaml").read_text())
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


def test_gecko_recipe_keeps_to_what_the_paper_says() -> None:
    recipe = load_recipe("gecko")
    assert recipe.mixture.fret_max_rows == 6_600_000 < recipe.seeds.num_seeds
    fret = recipe.fret
    assert (fret.fusion, fret.positive, fret.negative) == ("ql+rc", "fused", "lowest")
    assert (fret.num_negatives, fret.max_negative_similarity) == (1, None)
    assert recipe.queries.tasks == ("written",)
    assert recipe.candidates.num_candidates == recipe.scores.num_scored == 20
    assert recipe.candidates.max_seed_rank is None
    assert "{task}" in recipe.retriever.query_template
    first = recipe.prefinetuning
    assert first is not None and first.training.loss.same_tower_negatives == "none"
    assert recipe.training.loss.same_tower_negatives == "all"
    assert (recipe.student.projection, recipe.training.loss.matryoshka_dimensions) == (768, (256,))
    assert recipe.student.query_template == "task: {task} | query: {text}"
    assert recipe.student.passage_template == "title: {title} | text: {text}"
    names = {each.name for each in recipe.mixture.labelled}
    assert names > {"natural-questions", "hotpotqa", "fever", "medmcqa", "snli", "mnli"}


def test_labelled_sets_that_mteb_knows_are_of_its_name_and_revision() -> None:
    with quiet_mteb() as mteb:
        known = {
            (task.metadata.dataset["path"], task.metadata.dataset["revision"])
            for task in mteb.get_tasks(languages=["eng"], exclude_superseded=False)
        }
    sets = [each for each in load_recipe("gecko").mixture.labelled if "hub:mteb/" in each.path]
    assert len(sets) == 8
    assert {(each.hub_name[0], each.revision) for each in sets} <= known


def test_multilingual_recipe_trains_on_miracl_in_every_language_that_has_a_training_set() -> None:
    recipe = load_recipe("multilingual")
    assert recipe.queries.language == "passage"
    languages = {each.hub_name[1].removesuffix("-triplet") for each in recipe.mixture.labelled}
    with quiet_mteb() as mteb:
        judged = {*mteb.get_task("MIRACLRetrievalHardNegatives").hf_subsets}
    assert languages == judged - {"de", "yo"}  # the two have none
    assert all(each.name == f"miracl-{each.path[-10:-8]}" for each in recipe.mixture.labelled)
    assert load_recipe("multilingual", ["queries.language=English"]).queries.language == "English"


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
        (
            "fret.max_overlap=1",
            "unknown key fret.max_overlap; did you mean 'decontamination.max_overlap'?",
        ),
        (
            "fret.max_shared_words=9",
            "unknown key fret.max_shared_words; did you mean 'decontamination.max_shared_words'?",
        ),
        ("seeds.num_sedes=7", "unknown key seeds.num_sedes; did you mean 'num_seeds'?"),
        ("seeds.num_seeds=many", "seeds.num_seeds: 'many' given"),
        ("queries.tasks=[poetry]", "accepted are question answering"),
        (
            "fret.fusion=best",
            "fret.fusion: 'best' given; accepted are auto, or ql, rc, ce, sim, lex, hybrid, each"
            " once, joined by + (ql+sim)",
        ),
        (
            "fret.negative=all",
            "fret.negative: all given, and with training.loss.hard_negatives each scored candidate"
            " would be a negative: set that to false and training.loss.distillation_weight above 0",
        ),
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
        ("embedding_distillation.training.loss=1", "unknown key embedding_distillation.training.l"),
        (
            "embedding_distillation.training.validation.test_set=scifact",
            "embedding_distillation.training.validation.test_set: 'scifact' is no retrieval set",
        ),
        (
            "training.validation.test_set=scifact",
            "training.validation.test_set: 'scifact' is no retrieval set of the recipe's",
        ),
        ("gate.test_set=scifact", "gate.test_set: 'scifact' is no retrieval set of the recipe's"),
        ("gate.interpolations=[0.5, 1]", "gate.interpolations: [0.5, 1] given; give different"),
        ("corpus.min_words=100", "min_words: 100 given, and max_words is 160: accepted is at most"),
        ("corpus.path=2024", "corpus.path: 2024 given; put it in quotes"),
        ("training=", "training: None given"),
        ("training.learning_rate=.inf", "training.learning_rate: inf given; accepted are finite"),
        ("training.learning_rate=inf", "training.learning_rate: inf given; accepted are finite"),
        ("sizes={mine: {parameters: 1, layers: 2}}", "unknown key sizes.mine.layers; accepted are"),
        (
            "student.query_template=q {foo}",
            "query_template: query template 'q {foo}': it must hold",
        ),
        ("retriever.passage_template={text", "passage_template"),
        ("student.layers=[2, 1]", "student.layers: [2, 1] given; give rising indices"),
        ("student.dtype=int8", "student.dtype: 'int8' given"),
        ("corpus..path=x", "write path.to.key=value"),
        ("queries.tasks.9=x", "'9' is no place in a list of 2"),
    ],
)
def test_mistake_in_a_recipe_names_the_key_and_the_mend(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe("laptop", [setting])


LISTS = [
    "fret.negative=all",
    "training.loss={hard_negatives: false, distillation_weight: 1, contrastive_weight: 0}",
]


def test_lists_are_learnt_from_where_no_candidate_is_a_negative() -> None:
    assert load_recipe("laptop", LISTS).training.loss.contrastive_weight == 0
    # FRet that is not mixed in, and the stage before the fine-tuning, have no lists.
    labelled = "[{name: faq, path: faq.jsonl}]"
    unmixed = ["mixture.fret_weight=0", f"mixture.labelled={labelled}"]
    assert load_recipe("laptop", ["fret.negative=all", *unmixed]).training.loss.hard_negatives
    before = f"prefinetuning.mixture.labelled={labelled}"
    assert load_recipe("laptop", [*LISTS, before]).prefinetuning is not None


FIXED = [
    *("mixture.fixed_passages={}", "fret={negative: all, fusion: sim}", "student.layers=null"),
    "training.loss={contrastive_weight: 0, distillation_weight: 1}",
]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["fret={negative: all, fusion: ql+sim, scale: z-scores}"],
        ["student.layers=[0, 2, 5]", "embedding_distillation={}"],
    ],
)
def test_passages_can_stay_where_the_student_begins_in_the_retrievers_space(
    settings: list[str],
) -> None:
    assert load_recipe("laptop", [*FIXED, *settings]).mixture.fixed_passages is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fret={negative: lowest, fusion: sim}"], "fret.negative: lowest given, and with mixture"),
        (["fret.fusion=ql+sim"], "set it to z-scores"),
        (["mixture.fret_weight=0"], "mixture.fret_weight: given, and with mixture.fixed_passages"),
        (["mixture.labelled=[{name: faq, path: a}]"], "mixture.labelled"),
        (["training.loss.contrastive_weight=0.1"], "contrastive_weight 0.1 and distill"),
        (["student.layers=[0, 2, 5]"], "or let it learn the retriever's vectors first"),
        (["student.model=embedded:other"], "set student.model to embedded:all-MiniLM-L6-v2"),
        (["student.projection=8"], "retriever's space"),
        (
            ["student.layers=[0]", "embedding_distillation={teacher: {model: embedded:other}}"],
            "retriever's space",
        ),
        (
            ["prefinetuning.mixture.labelled=[{name: faq, path: faq.jsonl}]"],
            "leave prefinetuning out",
        ),
    ],
)
def test_passages_that_cannot_stay_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe("laptop", [*FIXED, *settings])


def test_student_that_is_its_teacher_has_no_vectors_to_learn() -> None:
    distilled, other = "embedding_distillation={}", "{model: embedded:other}"
    uncut = "student.layers=null"
    with pytest.raises(UserError, match="the student is its teacher embedded:all-MiniLM-L6-v2"):
        load_recipe("laptop", [distilled, uncut])
    for setting in (
        *("student.layers=[0, 5]", "student.projection=8", "student.model=embedded:other"),
        f"embedding_distillation.teacher={other}",
    ):
        assert load_recipe("laptop", [distilled, uncut, setting]).embedding_distillation
    assert load_recipe("adapt-half").embedding_distillation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fret.negative=none"], "contrastive_weight 0 leaves nothing but lists to learn from"),
        (
            ["mixture.labelled=[{name: faq, path: faq.jsonl}]"],
            "training.loss.contrastive_weight: 0 given, and the sets of mixture.labelled have no",
        ),
        (
            [
                "prefinetuning.mixture.labelled=[{name: faq, path: faq.jsonl}]",
                "prefinetuning.training.loss={distillation_weight: 1, contrastive_weight: 0}",
            ],
            "prefinetuning.training.loss.contrastive_weight: 0 given",
        ),
    ],
)
def test_training_that_would_learn_nothing_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe("laptop", [*LISTS, *settings])


def test_missing_recipe_names_those_that_exist() -> None:
    with pytest.raises(
        UserError,
        match="one of adapt, adapt-half, cluster, gecko, gecko-mini, gpu, gpu-80gb, gpu-8x80gb,"
        " laptop, multilingual",
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
        "tokay: corpus /no/such/corpus does not exist or is empty: correct corpus.path, such as"
        " --set corpus.path=FOLDER"
    ]
    assert "Traceback" not in answer.stdout


def test_variables_of_tokay_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "base: laptop\ncorpus: {path: '${TOKAY_TEXTS}/news'} # of ${NOBODY}\n", encoding="utf-8"
    )
    monkeypatch.setenv("TOKAY_TEXTS", "/texts")
    assert load_recipe(recipe).corpus.path == "/texts/news"
    monkeypatch.setenv("TOKAY_NAME", "fiction")
    found = load_recipe(recipe, ["corpus.path=${TOKAY_TEXTS}/${TOKAY_NAME}"])
    assert found.corpus.path == "/texts/fiction"
    monkeypatch.setenv("TOKAY_NUMBER", "12")
    assert load_recipe(recipe, ["seeds.num_seeds=${TOKAY_NUMBER}"]).seeds.num_seeds == 12
    monkeypatch.delenv("TOKAY_TEXTS")
    with pytest.raises(UserError, match=r"mine\.yaml reads \$\{TOKAY_TEXTS\}: set it"):
        load_recipe(recipe)
    assert load_recipe(recipe, keep_unset=True).corpus.path == "${TOKAY_TEXTS}/news"


@pytest.mark.parametrize("keep_unset", [False, True])
def test_variable_that_is_not_listed_never_reaches_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_unset: bool
) -> None:
    monkeypatch.setenv("AWS_SECRET", "hunter2")
    (tmp_path / "base.yaml").write_text("base: laptop\nname: '${AWS_SECRET}'\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        "base: base.yaml\nname: mine\nvariables: [AWS_SECRET]\n", encoding="utf-8"
    )
    told = r"\$\{AWS_SECRET\}.*call it TOKAY_AWS_SECRET, or list it under .* `variables`"
    with pytest.raises(UserError, match=told) as refused:
        load_recipe(tmp_path / "mine.yaml", keep_unset=keep_unset)  # the list is each file's own
    assert "hunter2" not in str(refused.value)
    with pytest.raises(UserError, match=told):
        load_recipe("laptop", ["name=${AWS_SECRET}"], keep_unset=keep_unset)
    assert load_recipe("laptop", ["variables=[AWS_SECRET]", "name=${AWS_SECRET}"]).name == "hunter2"


def test_variables_that_are_listed_are_read_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("OWN", "own")
    (tmp_path / "base.yaml").write_text(
        "base: laptop\nvariables: [DATA]\ncorpus: {path: '${DATA}/a'}\n", encoding="utf-8"
    )
    (tmp_path / "mine.yaml").write_text(
        "base: base.yaml\nvariables: [OWN]\nname: '${OWN}'\n", encoding="utf-8"
    )
    found = load_recipe(tmp_path / "mine.yaml")
    assert (found.corpus.path, found.name) == ("/data/a", "own")
    assert found.variables == ("DATA", "OWN")
    with pytest.raises(UserError, match="variables: accepted is a list of names"):
        load_recipe("laptop", ["variables=HOME", "name=${HOME}"])


def test_value_of_a_variable_is_a_text_and_no_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = "x'}\nllm: {trust_remote_code: true}\n# "
    monkeypatch.setenv("TOKAY_TEXTS", value)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: laptop\ncorpus: {path: '${TOKAY_TEXTS}'}\n", encoding="utf-8")
    assert load_recipe(recipe).corpus.path == value
    with pytest.raises(UserError, match=r"reads \$\{HOME:-/x\}: write \$\{NAME\}"):
        load_recipe("laptop", ["corpus.path=${HOME:-/x}"])


@pytest.mark.parametrize(
    "name", ["../../evil", "a/b", "", ".hidden", "a\\b", "a b", "x" * 101, "a\nb", "\x1b[31m"]
)
def test_name_that_would_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"name: .* given; accepted are up to 100"):
        load_recipe("laptop", [f"name={json.dumps(name)}"])
    if name not in ("a b",):
        for key, more in (("evaluation", ""), ("mixture.labelled", "")):
            with pytest.raises(UserError, match=r"0\.name: .* given; accepted are up to 100"):
                load_recipe("laptop", [f"{key}=[{{name: {json.dumps(name)}, path: x{more}}}]"])


@pytest.mark.parametrize("name", ["mine-2", "für_uns", "2024-01-01", "on", "v1.2"])
def test_name_of_letters_and_digits_is_accepted(name: str) -> None:
    assert load_recipe("laptop", [f"name={name}"]).name == name


@pytest.mark.parametrize("part", ["llm", "retriever", "student"])
def test_recipe_alone_cannot_let_models_bring_code(part: str) -> None:
    asked = [f"{part}.trust_remote_code=true"]
    with pytest.raises(UserError, match=rf"sets {part}\.trust_remote_code.*--trust-remote-code"):
        load_recipe("laptop", asked)
    found = load_recipe("laptop", asked, trust_remote_code=True)
    assert getattr(found, part).trust_remote_code
    assert not load_recipe("laptop", trust_remote_code=True).student.trust_remote_code


def test_teacher_of_vectors_cannot_bring_code_either() -> None:
    asked = ["embedding_distillation.teacher={model: a/b, trust_remote_code: true}"]
    key = r"embedding_distillation\.teacher\.trust_remote_code"
    with pytest.raises(UserError, match=rf"sets {key}.*--trust-remote-code"):
        load_recipe("laptop", asked)
    models = load_recipe("laptop", asked, trust_remote_code=True).models
    assert list(models) == ["llm", "retriever", "student", "embedding_distillation.teacher"]


def test_models_of_a_run_are_read_whatever_else_has_changed(tmp_path: Path) -> None:
    recipe = load_recipe("laptop")
    tree = recipe.model_dump(mode="json") | {"prompts": f"{tmp_path}/gone.yaml", "name": "a b"}
    tree["training"] = {"key_of_old": 1}
    found = read_models(write_yaml(tree).encode(), "recipe.yaml")
    assert (found.retriever, found.student) == (recipe.retriever, recipe.student)
    with pytest.raises(UserError, match=r"recipe\.yaml has the unknown key 'ingredients', made by"):
        read_models(write_yaml({**tree, "ingredients": []}).encode(), "recipe.yaml")
    tree["student"] |= {"mdoel": 3}
    with pytest.raises(UserError, match=r"perhaps of another version: unknown key student\.mdoel"):
        read_models(write_yaml(tree).encode(), "recipe.yaml")
    with pytest.raises(UserError, match=r"recipe\.yaml is no recipe: accepted is a mapping"):
        read_models(b"- a", "recipe.yaml")
    with pytest.raises(UserError, match="key retriever is missing"):
        read_models(b"name: begun", "recipe.yaml")


def test_error_of_a_recipe_is_short_whatever_stands_in_it(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: laptop\nname: {'x' * 400_000}\n", encoding="utf-8")
    for asked in (
        [],
        [f"seeds={'y' * 100_000}"],
        [f"{'z' * 100_000}.a=1"],
        [f"q={'w' * 99999}"],
    ):
        with pytest.raises(UserError) as refused:
            load_recipe(recipe, asked)
        assert len(str(refused.value)) < 2000


def test_a_cut_llm_has_a_gpu_for_each_part() -> None:
    cut = "resources.engine.tensor_parallel_size=2"
    with pytest.raises(UserError, match=r"num_gpus: 1 given.*set num_gpus to 2"):
        load_recipe("gpu", [cut])
    assert load_recipe("gpu", [cut, "resources.llm.num_gpus=2"]).resources.llm.num_gpus == 2
    assert load_recipe("laptop", [cut])  # on a CPU the parts are groups of cores


def test_headline_of_the_evaluation_cannot_be_what_chooses_the_model() -> None:
    sets = "evaluation=[{name: first, path: a}, {name: other, path: b}]"
    recipe = load_recipe("laptop", [sets, "gate.test_set=other"])
    assert recipe.gate is not None and recipe.gate.hold_out is None
    with pytest.raises(UserError, match=r"'first' is the first set .* put another set first, or"):
        load_recipe("laptop", [sets, "gate.test_set=first"])
    watched = "training.validation={test_set: other, patience: 3}"
    with pytest.raises(UserError, match=r"'other' chooses the best weights in training.validation"):
        load_recipe("laptop", [sets, "gate.test_set=other", watched])
    held_out = load_recipe("laptop", ["gate={num_queries: 7, num_seeds: 3}"]).gate
    assert held_out is not None and held_out.hold_out == HoldOut(num_queries=7, num_seeds=3)


def test_a_temperature_that_vllm_refuses_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"queries\.temperature: .*less than or equal to 2"):
        load_recipe("laptop", [f"corpus.path={tmp_path}", "queries.temperature=3"])
