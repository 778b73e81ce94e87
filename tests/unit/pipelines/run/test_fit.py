"""What is said to fit a GPU, worked by hand; and what is refused, how soon, and in which words."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import UserError
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.sizes import GIB
from pipelines.run import fit
from pipelines.run.fit import Need, gpu_needs, refuse_unfit

FIXED = "training.gradient_cache_tokens=8192"


@pytest.fixture(autouse=True)
def no_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "own_gpus", lambda: ())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def need(recipe: Recipe, step: str, num_passages: int | None = None) -> Need:
    (found,) = [each for each in gpu_needs(recipe, num_passages) if each.steps[0] == step]
    return found


def test_llm_is_its_weights_beside_its_share_of_the_gpu() -> None:
    found = need(load_recipe("gpu"), "queries")
    assert found.total == pytest.approx(2 * 4.0225e9)
    assert found.have == pytest.approx(0.9 * 22 * GIB)
    cut = ["resources.engine.tensor_parallel_size=2", "resources.llm.num_gpus=2"]
    half = need(load_recipe("gpu", cut), "queries")
    assert half.total == found.total / 2
    kept = need(load_recipe("gpu", ["resources.engine.kv_cache_gib=15"]), "queries")
    assert (kept.have, kept.fits) == (22 * GIB, "no")
    quantised = need(load_recipe("cluster"), "queries")
    assert quantised.total == 29 * GIB


def test_cross_encoder_is_counted_where_it_judges() -> None:
    settings = ["cross_encoder.model=big/judge", "cross_encoder.dtype=bfloat16"]
    settings += ["sizes={big/judge: {parameters: 30000000000}}", "resources.encoder.num_gpus=1"]
    assert "cross_scores" not in {each.steps[0] for each in gpu_needs(load_recipe("gpu", settings))}
    recipe = load_recipe("gpu", [*settings, "fret.fusion=ce+sim"])
    found = need(recipe, "cross_scores")
    assert found.parts["weights"] == 60e9 and found.fits == "no"
    with pytest.raises(UserError, match=r"cross_encoder \(cross_scores\).*cross_encoder.model"):
        refuse_unfit(recipe)
    assert "scores" not in need(recipe, "queries").steps


def test_evaluation_holds_the_retriever_and_all_students_at_once() -> None:
    test_set = "evaluation=[{name: mine, path: s3://b/mine}]"
    found = need(load_recipe("gpu", [test_set, "student.dtype=float32"]), "evaluation")
    assert found.parts["weights"] == pytest.approx(2 * 0.5958e9 + 2 * 4 * 0.149e9)
    assert (found.have, found.gpu) == (11 * GIB, True)  # the encoder's half
    titles = '{name: titles, kind: title-body, path: "run:passages", task: search result}'
    stages = ["embedding_distillation={}", f"prefinetuning.mixture.labelled=[{titles}]"]
    more = need(load_recipe("gpu", [test_set, "student.dtype=float32", *stages]), "evaluation")
    assert more.parts["weights"] - found.parts["weights"] == pytest.approx(2 * 4 * 0.149e9)
    settings = [test_set, "resources.gpu_memory_gib={encoder: 2}", "student.dtype=float32"]
    with pytest.raises(
        UserError, match=r"retriever and students \(evaluation\) needs at least 2\.2"
    ):
        refuse_unfit(load_recipe("gpu", settings))
    refuse_unfit(load_recipe("gpu", settings), needless=lambda step: step == "evaluation")
    unknown = need(load_recipe("gpu", [test_set, "student.model=some/other"]), "evaluation")
    assert (unknown.fits, unknown.parts) == ("unknown", {})
    assert not [each for each in gpu_needs(load_recipe("gpu")) if "evaluation" in each.steps]


def test_gate_needs_what_the_index_needs() -> None:
    assert need(load_recipe("gpu", ["gate={}"]), "gate").steps == ("gate", "index")
    assert need(load_recipe("gpu"), "index").what == "student"


def test_training_is_counted_by_hand() -> None:
    found = need(load_recipe("gpu", [FIXED]), "training")
    assert found.parts["gradients"] == 4 * 0.149e9
    assert found.parts["AdamW"] == 8 * 0.149e9
    # Autocast keeps each matrix in bfloat16: 22 layers of queries, keys, values and so on.
    copies = 2 * 22 * (4 * 768 * 768 + 3 * 768 * 1152)
    assert found.parts["copies of weights"] == copies
    assert found.parts["weights"] == 4 * 0.149e9
    activations = found.parts["activations of 8,192 tokens"]
    assert activations / 8192 / 1024 == pytest.approx(601, abs=1)
    assert found.fits == "yes"


def test_embedding_distillation_is_counted_by_hand() -> None:
    stage = (
        "embedding_distillation.training={use_gpu: true, batch_size: 64, max_passage_tokens: 128}"
    )
    found = need(load_recipe("gpu", [stage]), "embedding_distillation")
    assert found.parts["AdamW"] == 8 * 0.149e9
    assert found.parts["loss"] == 4 * 2 * 2 * 64 * 768  # no similarities
    assert "activations of 128 tokens" in found.parts
    whole = stage.replace("{", "{gradient_cache_tokens: null, ")
    assert (
        f"activations of {64 * 128:,} tokens"
        in need(load_recipe("gpu", [whole]), "embedding_distillation").parts
    )
    teacher = "embedding_distillation.teacher={model: embedded:all-MiniLM-L6-v2}"
    named = need(load_recipe("gpu", [teacher]), "embedding_distillation_mixture")
    assert named.what == "embedding_distillation.teacher"
    assert named.parts["weights"] == pytest.approx(4 * 22.7e6, rel=0.01)


def test_training_with_fixed_passages_is_counted_by_hand() -> None:
    settings = [
        "training={batch_size: 64, max_query_tokens: 32, gradient_cache_tokens: null}",
        "training.loss={contrastive_weight: 0, distillation_weight: 1}",
        "fret={negative: all, fusion: sim}",
        "candidates.num_candidates=30",
        "mixture.fixed_passages={anchor_share: 0.25}",
        "embedding_distillation={}",
        "retriever.max_tokens=200",
        "student.max_tokens=512",
    ]
    found = need(load_recipe("gpu", settings), "training")
    # Queries, and whole passages beside them; of the lists nothing but vectors.
    assert f"activations of {64 * 32 + 16 * 200:,} tokens" in found.parts
    assert found.parts["loss"] == 4 * 2 * 64 * (2 + 29 + 0.25) * 768
    (llm,) = [each for each in gpu_needs(load_recipe("gpu", settings)) if each.what == "LLM"]
    assert llm.steps == ("queries",)


def test_sharding_and_adapters_leave_less() -> None:
    def states(*settings: str) -> tuple[float, float]:
        parts = need(load_recipe("gpu", [FIXED, *settings]), "training").parts
        return parts["gradients"], parts["AdamW"]

    whole = states()
    shared = states("training.num_workers=4", "training.sharding=fsdp2")
    assert shared == (whole[0] / 4, whole[1] / 4)
    # 22 layers of Wqkv, Wo, Wi and Wo, each 8 x (inputs + outputs).
    adapted = 22 * 8 * ((768 + 2304) + (768 + 768) + (768 + 2304) + (1152 + 768))
    assert states("training.lora.rank=8") == (4 * adapted, 8 * adapted)
    queries = 22 * 8 * (768 + 2304)
    assert states("training.lora={rank: 8, target: [Wqkv]}")[0] == 4 * queries


def test_whole_batch_is_as_many_tokens_as_its_texts_may_have() -> None:
    settings = ["training.gradient_cache_tokens=null", "fret.num_negatives=3"]
    found = need(load_recipe("gpu", settings), "training")
    assert f"activations of {512 * (96 + 4 * 384):,} tokens" in found.parts
    each = need(load_recipe("gpu", [*settings, "training.num_workers=8"]), "training")
    assert f"activations of {64 * (96 + 4 * 384):,} tokens" in each.parts


def test_list_is_as_long_as_what_is_scored() -> None:
    lists = ["fret.negative=all", "training.loss={hard_negatives: false, distillation_weight: 1}"]
    settings = ["training.gradient_cache_tokens=null", "scores.num_scored=8", *lists]
    found = need(load_recipe("gpu", settings), "training")
    assert f"activations of {512 * (96 + 8 * 384):,} tokens" in found.parts
    all_of_few = need(load_recipe("gpu", [*settings, "candidates.num_candidates=5"]), "training")
    assert f"activations of {512 * (96 + 5 * 384):,} tokens" in all_of_few.parts
    none = need(load_recipe("gpu", [settings[0], "fret.negative=none"]), "training")
    assert f"activations of {512 * (96 + 384):,} tokens" in none.parts


def test_auto_needs_one_text_and_says_how_many_tokens_it_leaves() -> None:
    found = need(load_recipe("gpu"), "training")
    assert "activations of 384 tokens" in found.parts and found.fits == "yes"
    room = 22 * GIB - sum(size for part, size in found.parts.items() if "tokens" not in part)
    a_token = found.parts["activations of 384 tokens"] / 384
    assert f"room for about {round(0.8 * room / a_token, -2):,.0f} tokens at a time" in found.note


def test_vectors_are_counted_when_the_passages_are() -> None:
    recipe = load_recipe("cluster")
    assert need(recipe, "candidates").fits == "unknown"
    found = need(recipe, "candidates", num_passages=4_000_000)
    assert found.parts["vectors"] == 1_000_000 * 1024 * 4
    assert found.fits == "yes"
    beyond = need(recipe, "candidates", num_passages=12_000_000)
    assert beyond.fits == "perhaps"  # it is searched on CPUs then, and not refused
    refuse_unfit(load_recipe("cluster"))


def test_lexical_index_is_counted_on_the_host_where_there_is_one() -> None:
    recipe = load_recipe("laptop", ["candidates.lexical.weight=0.25"])
    of_step = [each for each in gpu_needs(recipe, 1000) if each.steps == ("candidates",)]
    assert [each.what for each in of_step] == ["vectors of an index actor", "the lexical index"]
    assert of_step[1].total == 1000 * 160 * 26
    assert (of_step[1].gpu, of_step[1].fits) == (False, "")
    assert "3.9 GiB per million" in gpu_needs(recipe)[3].unknown
    assert "lexical" not in {each.what for each in gpu_needs(load_recipe("laptop"))}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["resources.gpu_memory_gib=8"],
            ["LLM (queries and scores) needs at least 7.5 GiB of a GPU that has 7.2 for it",
             "llm.model", "resources.gpu_memory_gib"],
        ),
        (
            ["training.gradient_cache_tokens=60000"],
            ["student (training) needs at least", "22.0", "training.gradient_cache_tokens: auto"],
        ),
        (
            ["training.gradient_cache_tokens=null"],
            ["student (training) needs at least", "training.gradient_cache_tokens: auto"],
        ),
        (
            ["resources.gpu_memory_gib={training: 2}"],
            ["student (training) needs at least 2.2 GiB of a GPU that has 2.0", "fsdp2"],
        ),
    ],
)  # fmt: skip
def test_what_certainly_does_not_fit_is_refused(settings: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        refuse_unfit(load_recipe("gpu", settings))
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)


def test_what_may_fit_within_the_error_is_not_refused() -> None:
    fitting = need(load_recipe("gpu", [FIXED]), "training")
    a_token = fitting.parts["activations of 8,192 tokens"] / 8192
    room = 22 * GIB - (fitting.total - 8192 * a_token)
    tokens = int(1.1 * room / a_token)
    recipe = load_recipe("gpu", [f"training.gradient_cache_tokens={tokens}"])
    assert need(recipe, "training").fits == "perhaps"
    refuse_unfit(recipe)
    # A whole batch is told by its longest texts, and may be of shorter ones.
    whole = ["training.gradient_cache_tokens=null", "training.batch_size=64"]
    assert need(load_recipe("gpu", whole), "training").fits == "perhaps"
    refuse_unfit(load_recipe("gpu", whole))


def test_steps_that_will_not_run_are_not_refused() -> None:
    recipe = load_recipe("gpu", ["training.gradient_cache_tokens=null"])
    refuse_unfit(recipe, needless=lambda step: step == "training")
    with pytest.raises(UserError, match="training"):
        refuse_unfit(recipe, needless=lambda step: step == "queries")


def test_half_a_gpu_is_told_and_a_whole_one_refused() -> None:
    recipe = load_recipe("gpu", ["resources.gpu_memory_gib={encoder: 2}"])
    assert need(recipe, "embeddings").fits == "perhaps"  # 1.1 GiB and CUDA, in a half of 2
    refuse_unfit(recipe)
    with pytest.raises(
        UserError, match=r"retriever .* needs at least 1\.1 GiB of a GPU that has 1\.0"
    ):
        refuse_unfit(load_recipe("gpu", ["resources.gpu_memory_gib={encoder: 1}"]))


def test_unknown_sizes_and_unknown_memory_refuse_nothing() -> None:
    for setting in ("resources.gpu_memory_gib=null", "llm.model=some/other-model"):
        recipe = load_recipe("gpu", [setting])
        assert need(recipe, "queries").fits == "unknown"
        refuse_unfit(recipe)


def test_smaller_of_the_recipe_and_this_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "own_gpus", lambda: (16 * GIB, 80 * GIB))
    gpu, cluster = load_recipe("gpu"), load_recipe("cluster")
    assert need(gpu, "training").have == 16 * GIB
    assert need(cluster, "training").have == 44 * GIB  # on a node of its own
    monkeypatch.setenv("RAY_ADDRESS", "ray://there:10001")
    assert need(gpu, "training").have == 22 * GIB


def test_own_gpus_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '81920, 871'\necho '46068, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    fit.own_gpus.cache_clear()
    try:
        assert fit.own_gpus() == ((81920 - 871) * 2**20, 46068 * 2**20)
    finally:
        fit.own_gpus.cache_clear()


def test_run_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    script = """if True:
        import sys
        from pipelines.cli import app
        try:
            app(sys.argv[1:])
        except Exception as error:
            heavy = {"torch", "ray", "vllm", "transformers", "boto3"} & set(sys.modules)
            print(type(error).__name__, error, heavy or "and nothing was loaded")
    """
    command = [sys.executable, "-c", script, "run", "gpu", "--storage", str(tmp_path / "run")]
    settings = ["--set", "training.gradient_cache_tokens=null"]
    answer = subprocess.run([*command, *settings], capture_output=True, text=True)
    assert answer.stdout.startswith("UserError recipe gpu: student (training) needs at least")
    assert answer.stdout.endswith("and nothing was loaded\n")
    assert not (tmp_path / "run").exists()
    there = [*command[:3], "submit", "gpu", "--storage", "s3://b/run", "--address", "http://[::]:9"]
    answer = subprocess.run([*there, *settings], capture_output=True, text=True)
    assert answer.stdout.startswith("UserError recipe gpu: student (training) needs at least")
    # Its corpus is missing, which is the next thing to be told.
    answer = subprocess.run(
        [*command, *settings, "--until", "fret"], capture_output=True, text=True
    )
    assert answer.stdout.startswith("UserError corpus corpus does not exist")
