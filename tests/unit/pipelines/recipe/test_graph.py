import json
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.steps import Run, Step
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"title": "Bees", "text": "They dance."}))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "a", "positive": "b"}))
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        (tmp_path / "beir" / f"{name}.jsonl").write_text(json.dumps({"_id": "a", "text": "b"}))
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\ta\t1")
    return tmp_path


def run(folder: Path, *settings: str) -> Run:
    recipe = load_recipe("laptop", [f"corpus.path={folder}/corpus.jsonl", *settings])
    return build_run(recipe, str(folder / "run"))


def step(made: Run, name: str) -> Step:
    return next(each for each in made.steps if each.name == name)


def test_training_starts_from_the_prefinetuned_student(folder: Path) -> None:
    alone = run(folder)
    assert "prefinetuning" not in {each.name for each in alone.steps}
    assert set(step(alone, "training").inputs) == {"mixture", "student"}
    labelled = f"{{name: faq, path: {folder}/pairs.jsonl}}"
    made = run(folder, f"prefinetuning.mixture.labelled=[{labelled}]")
    assert set(step(made, "prefinetuning").inputs) == {"prefinetuning_mixture", "student"}
    assert set(step(made, "training").inputs) == {"mixture", "prefinetuning"}
    # Nothing of FRet is in the way of the first stage.
    assert step(made, "prefinetuning_mixture").inputs == ("student",)


def test_embedding_distillation_comes_before_the_other_stages(folder: Path) -> None:
    labelled = f"prefinetuning.mixture.labelled=[{{name: faq, path: {folder}/pairs.jsonl}}]"
    made = run(folder, labelled, "embedding_distillation={}")
    mixture = "embedding_distillation_mixture"
    assert set(step(made, mixture).inputs) == {"student", "passages", "embeddings", "queries"}
    assert set(step(made, "embedding_distillation").inputs) == {mixture, "student"}
    following = {"prefinetuning_mixture", "embedding_distillation"}
    assert set(step(made, "prefinetuning").inputs) == following
    assert set(step(made, "training").inputs) == {"mixture", "prefinetuning"}
    alone = run(folder, "embedding_distillation.mixture.queries=false")
    # Nothing that the LLM writes is in the way of it.
    assert set(step(alone, mixture).inputs) == {"student", "passages", "embeddings"}
    assert set(step(alone, "training").inputs) == {"mixture", "embedding_distillation"}
    teacher = "embedding_distillation.teacher={model: embedded:all-MiniLM-L6-v2}"
    named = run(folder, teacher, "embedding_distillation.mixture.queries=false")
    assert set(step(named, mixture).inputs) == {"student", "passages"}
    judged = run(folder, f"evaluation=[{{name: demo, path: {folder}/beir}}]", teacher)
    assert "embedding_distillation" in step(judged, "evaluation").inputs


def test_mixture_is_another_when_a_set_or_a_limit_of_tokens_is(folder: Path) -> None:
    file = folder / "pairs.jsonl"
    labelled = f"mixture.labelled=[{{name: faq, path: {file}}}]"

    def fingerprint(*settings: str) -> str:
        made = run(folder, labelled, *settings)
        return made.fingerprint(step(made, "mixture"))

    before = fingerprint()
    assert fingerprint("mixture.max_reject_share=0.5") == before
    assert fingerprint("training.loss.temperature=0.5") == before
    assert fingerprint("training.max_query_tokens=32") != before
    assert fingerprint("mixture.temperature=2") != before
    moved = file.rename(folder / "moved.jsonl")
    assert fingerprint(f"mixture.labelled.0.path={moved}") == before
    moved.write_text(json.dumps({"query": "a", "positive": "c"}))
    assert fingerprint(f"mixture.labelled.0.path={moved}") != before


def test_precision_of_the_student_changes_what_is_computed_with_it_and_no_training(
    folder: Path,
) -> None:
    asked = f"evaluation=[{{name: demo, path: {folder}/beir}}]"
    dtypes = ("float32", "bfloat16")
    made = {dtype: run(folder, asked, f"student.dtype={dtype}") for dtype in dtypes}
    changed = {
        each.name
        for each in made["float32"].steps
        if len({some.fingerprint(step(some, each.name)) for some in made.values()}) == 2
    }
    assert changed == {"index", "evaluation"}


def test_mixture_reads_what_its_sets_are_made_of(folder: Path) -> None:
    titles = "{name: titles, kind: title-body, path: run:passages}"
    made = run(folder, f"mixture.labelled=[{titles}]", "mixture.fret_weight=0")
    assert set(step(made, "mixture").inputs) == {"student", "passages"}


def test_probe_comes_before_the_pairs_only_where_it_chooses(folder: Path) -> None:
    fixed, auto = run(folder), run(folder, "fret.fusion=auto")
    assert "probe" not in {each.name for each in fixed.steps}
    names = [each.name for each in auto.steps]
    assert names.index("candidates") < names.index("probe") < names.index("pairs")
    assert step(auto, "pairs").inputs == ("candidates", "probe", "passages")
    assert step(auto, "fret").inputs == ("candidates", "probe", "scores", "passages")
    same = {
        each.name
        for each in fixed.steps
        if fixed.fingerprint(each) == auto.fingerprint(step(auto, each.name))
    }
    assert same == {"passages", "seeds", "queries", "embeddings", "candidates", "student"}
    more = run(folder, "fret.fusion=auto", "probe.num_queries=300")
    for name in ("probe", "pairs", "scores", "fret"):
        assert more.fingerprint(step(more, name)) != auto.fingerprint(step(auto, name))


def test_queries_of_the_corpus_stand_beside_those_of_the_llm_which_stay_as_they_are(
    folder: Path,
) -> None:
    alone, both = run(folder), run(folder, "corpus_queries={}")
    assert "corpus_queries" not in {each.name for each in alone.steps}
    assert step(alone, "candidates").inputs == ("queries", "embeddings")
    assert step(both, "corpus_queries").inputs == ("passages",)
    assert step(both, "candidates").inputs == ("queries", "corpus_queries", "embeddings")
    by_words = run(folder, "candidates.lexical.weight=0.25")
    assert step(by_words, "candidates").inputs == ("queries", "embeddings", "passages")
    gated = run(folder, "corpus_queries={}", "gate={}")
    assert step(gated, "corpus_queries").inputs == ("passages", "seeds")
    for name in ("seeds", "queries", "embeddings"):
        assert alone.fingerprint(step(alone, name)) == both.fingerprint(step(both, name))
    fewer = run(folder, "corpus_queries={max_sentences: 7}")
    for name, changed in (("queries", False), ("corpus_queries", True), ("candidates", True)):
        prints = [made.fingerprint(step(made, name)) for made in (both, fewer)]
        assert (prints[0] != prints[1]) == changed


def test_run_over_a_sample_ends_with_the_probe_and_has_other_passages(folder: Path) -> None:
    # A test set that does not exist is not in its way.
    missing = f"evaluation=[{{name: demo, path: {folder}/none}}]"
    made = run(folder, "probe.sample=50", missing)
    assert [each.name for each in made.steps][-2:] == ["candidates", "probe"]
    whole, other = run(folder), run(folder, "probe.sample=51")
    prints = {each.fingerprint(step(each, "passages")) for each in (made, whole, other)}
    assert len(prints) == 3


def test_llm_scores_nothing_where_it_judges_nothing(folder: Path) -> None:
    made = run(folder, "fret.fusion=sim")
    assert not {"pairs", "scores"} & {each.name for each in made.steps}
    assert step(made, "fret").inputs == ("candidates", "passages")
    assert step(run(folder), "fret").inputs == ("candidates", "scores", "passages")


def test_cross_encoder_scores_pairs_only_where_it_judges(folder: Path) -> None:
    model = "cross_encoder.model=cross-encoder/some"
    unasked = run(folder, model)
    assert "cross_scores" not in {each.name for each in unasked.steps}
    alone = run(folder, model, "fret.fusion=ce+sim")
    names = [each.name for each in alone.steps]
    assert names[names.index("pairs") :][:3] == ["pairs", "cross_scores", "fret"]
    assert step(alone, "cross_scores").inputs == ("pairs",)
    assert step(alone, "fret").inputs == ("candidates", "cross_scores", "passages")
    both = run(folder, model, "fret.fusion=ql+ce")
    assert step(both, "fret").inputs == ("candidates", "scores", "cross_scores", "passages")

    def fingerprints(*settings: str) -> dict[str, str]:
        made = run(folder, model, "fret.fusion=ql+ce", *settings)
        return {each.name: made.fingerprint(each) for each in made.steps}

    before = fingerprints()
    assert fingerprints("cross_encoder.batch_tokens=64") == before
    other = fingerprints("cross_encoder.max_tokens=64")
    changed = {name for name in other if other[name] != before[name]}
    assert {"cross_scores", "fret"} <= changed and not {"pairs", "scores"} & changed


def test_cross_encoder_that_judges_must_be_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"fret.fusion: ce\+sim given.* cross_encoder.model"):
        run(folder, "fret.fusion=ce+sim")


def test_fixed_passages_are_read_from_their_embeddings_and_labelled_whole(folder: Path) -> None:
    lists = ["training.loss={contrastive_weight: 0, distillation_weight: 1}", "student.layers=null"]
    lists.append("fret={negative: all, fusion: ql+sim, scale: z-scores}")
    embedded, fixed = run(folder, *lists), run(folder, *lists, "mixture.fixed_passages={}")
    assert step(fixed, "mixture").inputs == ("student", "fret", "embeddings", "passages")
    for name, changed in (("scores", False), ("fret", True), ("mixture", True)):
        prints = [made.fingerprint(step(made, name)) for made in (embedded, fixed)]
        assert (prints[0] != prints[1]) == changed
    fewer = run(folder, *lists, "mixture.fixed_passages={max_passages: 7}")
    assert fewer.fingerprint(step(fewer, "fret")) == fixed.fingerprint(step(fixed, "fret"))


def test_missing_labelled_set_is_named_before_anything_runs(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'faq': .*none\.jsonl does not exist"):
        run(folder, f"mixture.labelled=[{{name: faq, path: {folder}/none.jsonl}}]")


def test_gate_stands_between_training_and_export_and_reads_what_training_started_from(
    folder: Path,
) -> None:
    labelled = f"prefinetuning.mixture.labelled=[{{name: faq, path: {folder}/pairs.jsonl}}]"
    sets = f"evaluation=[{{name: a, path: {folder}/beir}}, {{name: b, path: {folder}/beir}}]"
    held_out = ("passages", "seeds", "queries")
    for settings, start, judges in (
        (["gate={}"], "student", held_out),
        (["gate={}", labelled], "prefinetuning", held_out),
        ([sets, "gate.test_set=b"], "student", ()),
    ):
        made = run(folder, *settings)
        names = [each.name for each in made.steps]
        assert names[names.index("gate") - 1] == "training"
        assert names[names.index("gate") + 1] == "export"
        assert step(made, "gate").inputs == (start, "training", *judges)
        assert "gate" in step(made, "export").inputs
    alone = run(folder)
    assert "gate" not in {each.name for each in alone.steps}
    assert "gate" not in step(alone, "export").inputs


def test_what_the_gate_decides_by_repeats_no_work_of_the_llm(folder: Path) -> None:
    def fingerprints(*settings: str) -> dict[str, str]:
        made = run(folder, *settings)
        return {each.name: made.fingerprint(each) for each in made.steps}

    def changed(*settings: str) -> set[str]:
        other = fingerprints(*settings)
        return {name for name in other if before.get(name) != other[name]}

    before = fingerprints("gate={}")
    after = {"gate", "export", "index"}
    assert changed("gate.significance=0.01") == after
    assert changed("gate.interpolations=[0.5]") == after
    assert changed("gate.num_seeds=3") >= {"seeds", "queries", "training", *after}


def test_titles_of_held_out_documents_are_kept_out_of_a_mixture_of_passages(folder: Path) -> None:
    titles = "mixture.labelled=[{name: titles, kind: title-body, path: run:passages}]"
    made = run(folder, titles, "mixture.fret_weight=0", "gate={}")
    assert set(step(made, "mixture").inputs) == {"student", "passages", "seeds"}


def test_a_linear_adapter_stands_between_training_and_gate_and_needs_lists(folder: Path) -> None:
    fixed = "mixture={fixed_passages: {}}"
    lists = [
        "candidates.lexical.weight=0.25",
        "fret={fusion: hybrid, scale: z-scores, negative: all}",
        "training.loss={contrastive_weight: 0, distillation_weight: 1, hard_negatives: false}",
        "student.layers=null",
    ]
    made = run(folder, fixed, *lists, "linear_adapter={}", "gate={}")
    names = [each.name for each in made.steps]
    place = names.index("linear_adapter")
    assert names[place - 1 : place + 2] == ["training", "linear_adapter", "gate"]
    assert step(made, "gate").inputs[:2] == ("student", "linear_adapter")
    ungated = run(folder, fixed, *lists, "linear_adapter={}")
    longer = run(folder, fixed, *lists, "linear_adapter={epochs: 4}")
    for name, changed in (("training", False), ("linear_adapter", True), ("export", True)):
        prints = [each.fingerprint(step(each, name)) for each in (ungated, longer)]
        assert (prints[0] != prints[1]) == changed
    assert "linear_adapter" in step(ungated, "export").inputs
    with pytest.raises(UserError, match=r"mixture\.fixed_passages is off"):
        run(folder, "linear_adapter={}")
