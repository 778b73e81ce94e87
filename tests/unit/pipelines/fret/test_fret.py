"""From scored candidates to training examples: what is dropped, and that nothing is lost."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster import key_filter
from cluster.artifacts import Artifact, Json
from cluster.errors import ArtifactError
from cluster.shard_groups import shard_groups
from cluster.steps import Run, Step
from pipelines.datasets.decontamination import Decontamination
from pipelines.fret import fret as fret_step
from pipelines.fret.fret import FretConfig, make_fret
from pipelines.fret.labelling import FindTexts, JoinTexts, LabelQueries
from pipelines.fret.repeated_queries import FindRepeated
from pipelines.run.console import JsonLines

IDS = ["a", "b", "c"]


def scored(id_: str, query: str, dropped_by: str | None = None) -> dict[str, Any]:
    asked = dropped_by is None
    return {
        "id": id_,
        "seed_id": "a",
        "task": "question answering",
        "query": query,
        "dropped_by": dropped_by,
        "candidate_ids": IDS if asked else [],
        "similarities": [0.9, 0.8, 0.7] if asked else [],
        "seed_rank": 1 if asked else None,
        "query_likelihoods": [-1.0, -2.0, -3.0] if asked else [],
        "relevances": [-0.1, -0.2, -0.3] if asked else [],
    }


MakeFret = Callable[..., Artifact]


@pytest.fixture
def label(
    mined: Callable[[list[dict[str, Any]]], list[Step]], written: Callable[..., Step]
) -> MakeFret:
    """Runs the step in a folder, after the steps that it reads."""

    def run(
        folder: Path,
        rows: list[dict[str, Any]],
        scores: pa.Table | None,
        evaluation_queries: Sequence[str],
        config: dict[str, Any],
        probe: tuple[pa.Table, dict[str, Json]] | None = None,
        **options: Any,
    ) -> Artifact:
        steps = mined(rows)
        if probe:
            table, metrics = probe
            steps.append(written("probe", table, ("candidates",), metrics))
        if scores is not None:
            steps.append(written("scores", scores, ("candidates",)))
        fret = Step(
            name="fret",
            config={},
            inputs=tuple(step.name for step in steps),
            work=lambda context: make_fret(
                FretConfig(**config), Decontamination(evaluation_queries), context, **options
            ),
        )
        return Run(str(folder), [*steps, fret]).execute(JsonLines())["fret"]

    return run


@pytest.fixture
def fret(
    tmp_path: Path, label: MakeFret, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> MakeFret:
    """Runs the step on queries with their scores."""

    def run(
        rows: list[dict[str, Any]],
        evaluation_queries: Sequence[str] = (),
        ordered_by: str = "sim",
        **config: Any,
    ) -> Artifact:
        scores = by_passage(rows)
        return label(tmp_path, rows, scores, evaluation_queries, config, ordered_by=ordered_by)

    return run


def test_every_query_keeps_its_row_and_the_first_rule_that_drops_it(fret: MakeFret) -> None:
    rows = [
        scored("q1", "how do bees show each other where the flowers are"),
        scored("q2", "x", dropped_by="query too short"),
        scored("q3", "How do bees show each other where the flowers are"),
        scored("q4", "how do bees show each other where the flowers are today"),
        scored("q5", "why is the sky blue"),
        scored("q6", "tell me why the sky over Rome in the long summer is so blue"),
        scored("q7", "what makes bread rise"),
    ]
    judged = ["Why is the sky BLUE?", "the sky over Rome in the long summer of 1900"]
    artifact = fret(rows, judged)
    dropped = {row["id"]: row["dropped_by"] for row in artifact.read().to_pylist()}
    assert dropped == {
        "q1": None,
        "q2": "query too short",
        "q3": "repeats another query",
        "q4": "nearly repeats another query",
        "q5": "repeats an evaluation query",
        "q6": "shares words with an evaluation query",
        "q7": None,
    }
    metrics = artifact.manifest.metrics
    assert metrics["num_kept"] == 2 and metrics["num_contaminated"] == 2
    assert metrics["contaminated"][0] == {
        "query": "why is the sky blue",
        "evaluation_query": "Why is the sky BLUE?",
    }


def test_scores_join_their_queries_and_a_low_seed_moves_up(
    tmp_path: Path, label: MakeFret, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> None:
    low = scored("q1", "what makes bread rise") | {"seed_id": "c"}
    # b was not scored.
    low |= {"query_likelihoods": [-1.0, -3.0], "relevances": [-0.1, -0.3]}
    scores = by_passage([{**low, "candidate_ids": ["a", "c"]}])
    row = label(tmp_path, [low], scores, [], {"num_negatives": 2}).read().to_pylist()[0]
    assert row["candidate_ids"] == ["a", "c", "b"]
    assert row["query_likelihoods"] == [-1.0, -3.0]
    assert (row["positive_id"], row["positive"]) == ("a", "text a")
    assert (row["negative_ids"], row["negatives"]) == ([], [])  # c is the seed


def test_several_negatives_come_worst_first(fret: MakeFret) -> None:
    row = fret([scored("q1", "what makes bread rise")], num_negatives=5).read().to_pylist()[0]
    assert (row["negative_ids"], row["negatives"]) == (["c", "b"], ["text c", "text b"])


def test_list_is_every_scored_candidate_with_its_fused_score(
    tmp_path: Path, label: MakeFret, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> None:
    # The retriever names b twice, and c, which is nearer than the seed a, was not scored.
    query = scored("q1", "what makes bread rise")
    query |= {"candidate_ids": ["b", "c", "a", "b"], "similarities": [0.9, 0.8, 0.7, 0.9]}
    judged = {**query, "candidate_ids": ["b", "a"], "query_likelihoods": [-2.0, -1.0]}
    scores = by_passage([judged])
    config = {"negative": "all", "fusion": "ql+sim", "scale": "z-scores"}
    row = label(tmp_path, [query], scores, [], config).read().to_pylist()[0]
    assert row["candidate_ids"] == ["b", "a", "c"]
    assert row["similarities"] == pytest.approx([0.9, 0.7, 0.8])
    assert row["query_likelihoods"] == [-2.0, -1.0]
    assert row["fused"] == pytest.approx([0.0, 0.0])  # -1 + 1 and 1 - 1, of those scored alone
    assert (row["positive_id"], row["negative_ids"]) == ("b", ["a"])  # of equal ones the nearer
    assert (row["negatives"], row["negative_titles"]) == (["text a"], [""])


def test_hybrid_judges_and_its_scores_move_with_their_candidates(
    tmp_path: Path, label: MakeFret, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> None:
    query = scored("q1", "what makes bread rise") | {"lexical": [1.0, 9.0, 3.0]}
    query |= {"hybrid": [3.0, 2.0, 2.5], "seed_id": "c"}
    scores = by_passage([{**query, "candidate_ids": ["a", "c"]}])  # b was not scored
    for fusion, positive in (("hybrid", "a"), ("lex", "b")):
        folder = tmp_path / fusion
        row = label(folder, [query], scores, [], {"fusion": fusion}).read().to_pylist()[0]
        assert row["candidate_ids"] == ["a", "c", "b"]
        assert (row["lexical"], row["hybrid"]) == ([1, 3, 9], [3, 2.5, 2])
        assert row["positive_id"] == positive


def test_fixed_passages_are_all_candidates_and_an_unscored_one_gets_the_mean(
    tmp_path: Path, label: MakeFret, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> None:
    # The retriever names b twice, and c was not scored.
    query = scored("q1", "what makes bread rise")
    query |= {"candidate_ids": ["b", "c", "a", "b"], "similarities": [0.9, 0.8, 0.7, 0.9]}
    judged = {**query, "candidate_ids": ["b", "a"], "query_likelihoods": [-2.0, -1.0]}
    rows = [query, scored("q2", "x", dropped_by="query too short")]
    config = {"negative": "all", "fusion": "ql+sim", "scale": "z-scores"}
    row, dropped = (
        label(tmp_path, rows, by_passage([judged]), [], config, fixed=True).read().to_pylist()
    )
    assert row["candidate_ids"] == ["b", "a", "c"]
    assert row["query_likelihoods"] == [-2.0, -1.0]
    z = 1.5**0.5  # of the similarities 0.9, 0.7, 0.8
    assert row["fused"] == pytest.approx([z - 1, 1 - z, 0.0], abs=1e-5)
    assert (row["positive_id"], row["positive"]) == ("b", "text b")
    assert row["negative_ids"] == ["a", "c"]
    assert (row["negatives"], row["negative_titles"]) == ([], [])  # nobody reads them
    assert dropped["positive_id"] is None and dropped["fused"] == []


def test_without_the_llm_all_candidates_are_judged(tmp_path: Path, label: MakeFret) -> None:
    rows = [scored("q1", "what makes bread rise"), scored("q2", "x", dropped_by="too short")]
    rows[0] |= {"seed_id": "c"}
    config = {"negative": "all", "fusion": "sim", "scale": "z-scores"}
    made = label(tmp_path, rows, None, [], config)
    row, dropped = made.read().to_pylist()
    assert (row["query_likelihoods"], row["relevances"]) == ([], [])
    assert row["fused"] == pytest.approx([1.5**0.5, 0, -(1.5**0.5)], abs=1e-5)
    assert (row["positive_id"], row["negative_ids"]) == ("a", ["c", "b"])
    assert row["negatives"] == ["text c", "text b"]
    assert dropped["fused"] == []
    counts = made.manifest.metrics
    assert (counts["num_scored"], counts["num_kept"]) == (1, 1)


def test_query_with_a_pair_that_could_not_be_scored_is_dropped(fret: MakeFret) -> None:
    broken = scored("q1", "what makes bread rise")
    broken["query_likelihoods"] = [-1.0, None, -2.0]
    artifact = fret([broken, scored("q2", "why is the sky blue")])
    rows = artifact.read().to_pylist()
    assert [row["dropped_by"] for row in rows] == ["too long", None]
    assert rows[0]["query_likelihoods"] == [] and rows[0]["positive_id"] is None
    assert artifact.manifest.metrics["num_scored"] == 1


def test_held_out_query_is_neither_labelled_nor_compared_with_others(fret: MakeFret) -> None:
    rows = [
        scored("1", "how do bees dance", "held out for the gate"),
        scored("2", "how do bees dance"),
    ]
    made = fret(rows)
    held_out, kept = made.read().to_pylist()
    assert held_out["dropped_by"] == "held out for the gate"
    assert held_out["positive_id"] is None and held_out["fused"] == []
    assert kept["dropped_by"] is None and kept["positive_id"] == "a"
    assert made.manifest.metrics["dropped_by"] == {"held out for the gate": 1}
    assert made.manifest.metrics["num_scored"] == made.manifest.metrics["num_kept"] == 1


def test_table_of_judges_is_of_all_scored_queries_that_the_retriever_has_the_seed_of(
    fret: MakeFret,
) -> None:
    rows = [
        scored("q1", "what makes bread rise"),
        scored("q2", "why is the sky blue") | {"seed_id": "b", "seed_rank": 2},
        scored("q3", "how do bees dance") | {"seed_id": "c", "seed_rank": 0},
        # Taken from the corpus: whoever knows a sentence again has not judged.
        scored("q4", "owls fly by night") | {"task": "sentence"},
        scored("q5", "the weather of the north") | {"task": "title"},
    ]
    rows[1]["query_likelihoods"] = [-2.0, -1.0, -3.0]
    metrics = fret(rows).manifest.metrics
    assert (metrics["num_kept"], metrics["num_judged"]) == (5, 2)
    first = {row["ranking"]: row["seed_first"] for row in metrics["judges"]}
    assert (first["the retriever"], first["QL"], first["RC"]) == (0.5, 1.0, 0.5)


def test_queries_whose_relevances_were_not_asked_for_are_labelled_by_the_judges_that_were(
    fret: MakeFret,
) -> None:
    row = scored("q1", "what makes bread rise") | {"query_likelihoods": [-3.0, -1.0, -2.0]}
    made = fret([row | {"relevances": [None] * 3}], fusion="ql+sim", scale="z-scores")
    (found,) = made.read().to_pylist()
    assert (found["query_likelihoods"], found["relevances"]) == ([-3.0, -1.0, -2.0], [])
    assert found["positive_id"] == "b" and found["dropped_by"] is None
    expected = [0.0, 1.2247, -1.2247]  # z(sim) + z(QL)
    assert found["fused"] == pytest.approx(expected, abs=1e-3)
    rankings = [each["ranking"] for each in made.manifest.metrics["judges"]]
    assert rankings == ["the retriever", "QL", "QL + sim by ranks", "z(QL) + z(sim)"]


def probed(by_passage: Any, rows: list[dict[str, Any]], **metrics: Json) -> Any:
    return by_passage(rows), {"num_scored": 2, **metrics}


def test_probe_gives_its_scores_and_what_it_chose(
    tmp_path: Path, label: MakeFret, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> None:
    rows = [scored("q1", "what makes bread rise"), scored("q2", "why is the sky blue")]
    rows[0]["query_likelihoods"] = [-2.0, -3.0, -1.0]
    rows[1] |= {"query_likelihoods": [-3.0, -2.0, -1.0], "similarities": [0.9, 0.9, 0.3]}
    chosen = probed(by_passage, rows[:1], fusion="ql+sim", scale="z-scores")
    artifact = label(tmp_path, rows, by_passage(rows[1:]), [], {"fusion": "auto"}, chosen)
    first, second = artifact.read().to_pylist()
    assert first["query_likelihoods"] == [-2.0, -3.0, -1.0]
    assert first["fused"] == pytest.approx([1.2247, -1.2247, 0], abs=1e-3)
    # 1.2247 of QL and 0.7071 of the similarities.
    assert second["fused"] == pytest.approx([-0.5176, 0.7071, -0.1895], abs=1e-3)
    assert (first["positive_id"], second["positive_id"]) == ("a", "b")
    assert artifact.manifest.metrics["num_scored"] == 2
    assert "judges" not in artifact.manifest.metrics  # they are the probe's


def test_after_a_skip_the_seed_is_the_positive_and_the_retriever_judges_the_rest(
    tmp_path: Path, label: MakeFret, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> None:
    rows = [
        scored("q1", "what makes bread rise"),
        scored("q2", "why is the sky blue") | {"seed_id": "c", "seed_rank": 3},
        scored("q3", "x", dropped_by="query too short"),
        scored("q4", "how do bees dance") | {"dropped_by": "round trip failed"},
    ]
    rows[0]["query_likelihoods"] = [-3.0, -2.0, -1.0]  # were it asked, c would be the positive
    nothing = by_passage([])
    skip = probed(by_passage, rows[:1], fusion=None, scale=None, judges=[{"fusion": "sim"}])
    for number, negative in enumerate(("lowest", "all")):
        folder, config = tmp_path / str(number), {"fusion": "auto", "negative": negative}
        artifact = label(folder, rows, nothing, [], config, skip)
        first, second, *others = artifact.read().to_pylist()
        assert (first["positive_id"], second["positive_id"]) == ("a", "c")
        assert first["fused"] == pytest.approx([1.2247, 0, -1.2247], abs=1e-3)
        # Of two that would have been scored the seed is one: it takes the place of b.
        assert second["candidate_ids"] == ["a", "c", "b"]
        assert second["fused"] == pytest.approx([1, -1])
        assert second["query_likelihoods"] == [] and second["negatives"] == ["text a"]
        assert first["negative_ids"] == (["c"] if negative == "lowest" else ["c", "b"])
        assert [row["positive_id"] for row in others] == [None, None]
        metrics = artifact.manifest.metrics
        assert (metrics["num_scored"], metrics["num_kept"]) == (2, 2)
        assert metrics["num_positive_is_not_seed"] == 0


def test_after_a_skip_the_order_with_bm25_judges_the_rest(
    tmp_path: Path, label: MakeFret, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> None:
    query = scored("q1", "what makes bread rise")
    query |= {"similarities": [0.7, 0.8, 0.9], "lexical": [9.0, 1.0, 0.0], "hybrid": [3, 2.5, 1]}
    found = {"num_scored": 3, "fusion": None, "scale": None, "judges": [{"fusion": "hybrid"}]}
    skip = by_passage([query]), found
    config = {"fusion": "auto", "negative": "all"}
    (row,) = label(tmp_path, [query], by_passage([]), [], config, skip).read().to_pylist()
    assert (row["positive_id"], row["negative_ids"]) == ("a", ["c", "b"])
    assert row["fused"] == [3, 2.5, 1]


def test_table_of_judges_is_against_the_order_with_bm25(fret: MakeFret) -> None:
    query = scored("q1", "what makes bread rise") | {"lexical": [9.0, 1.0, 0.0]}
    query |= {"similarities": [0.7, 0.8, 0.9], "hybrid": [3, 2.5, 1]}
    metrics = fret([query], ordered_by="hybrid").manifest.metrics
    assert metrics["judges"][0]["ranking"] == "the retriever with BM25"
    assert metrics["judges"][0]["seed_first"] == 1.0


def many(number: int) -> list[dict[str, Any]]:
    """Queries of which some were dropped, some repeat others, and some have no usable scores."""
    rows = []
    names = ["ash", "bay", "cod", "dew", "elk", "fir", "gum", "hay", "ivy", "jay", "oak", "yew"]
    for n in range(number):
        who, where, when = "bee" if n % 3 else "owl", names[n // 2], names[n // 2 * 5 % 12]
        text = f"what does the {who} near the {where} eat in the {when} winter"
        row = scored(f"q{n}", text, "too short" if n % 7 == 3 else None)
        if row["dropped_by"] is None:
            first = None if n % 11 == 8 else n % 5
            row |= {"seed_id": IDS[n % 3], "query_likelihoods": [first, n % 3, n % 4]}
            row |= {"relevances": [1.0, n % 2, 2.0]}
        rows.append(row)
    return rows


CONFIG = {"num_negatives": 2, "max_query_similarity": 0.5}


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the work done in many tasks, where a few would do."""
    monkeypatch.setattr(fret_step, "QUERIES_PER_SHARD", 5)
    monkeypatch.setattr(fret_step, "TEXTS_PER_SHARD", 6)
    monkeypatch.setattr(shard_groups, "__defaults__", (1,))


@pytest.mark.parametrize("num_bits", [3, 28])  # with 8 bits, all passages travel
def test_rows_and_figures_do_not_depend_on_the_tasks(
    num_bits: int,
    tmp_path: Path,
    label: MakeFret,
    by_passage: Callable[[list[dict[str, Any]]], pa.Table],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    rows = many(24)
    judged = ["what does the owl near the dew eat in the dew winter"]
    monkeypatch.setattr(key_filter, "_FEWEST_BITS", 3)
    monkeypatch.setattr(key_filter, "_MOST_BITS", num_bits)
    whole = label(tmp_path / "whole", rows, by_passage(rows), judged, CONFIG)
    assert whole.num_shards == 1
    request.getfixturevalue("in_parts")
    parts = label(tmp_path / "parts", rows, by_passage(rows), judged, CONFIG)
    assert [shard.num_rows for shard in parts.shards] == [5, 5, 5, 5, 4]
    assert parts.read().equals(whole.read())
    assert parts.manifest.metrics == whole.manifest.metrics
    assert [row["id"] for row in parts.read().to_pylist()] == [row["id"] for row in rows]
    assert {*parts.manifest.metrics["dropped_by"]} == {
        *("too short", "too long", "repeats another query", "nearly repeats another query"),
        *("repeats an evaluation query", "shares words with an evaluation query"),
    }
    assert len({row["positive_id"] for row in whole.read().to_pylist()}) == 4


def test_step_that_was_killed_goes_on_where_it_was(
    tmp_path: Path,
    label: MakeFret,
    by_passage: Callable[[list[dict[str, Any]]], pa.Table],
    monkeypatch: pytest.MonkeyPatch,
    in_parts: None,
) -> None:
    rows = many(24)
    expected = label(tmp_path / "whole", rows, by_passage(rows), [], CONFIG)
    merge, done = JoinTexts.merge, list[int]()

    def dies(self: JoinTexts, joined: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(joined.num_rows)
        return merge(self, joined)

    with monkeypatch.context() as patch:
        patch.setattr(JoinTexts, "merge", dies)
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path / "killed", rows, by_passage(rows), [], CONFIG)
    for exchange in (LabelQueries, FindRepeated, FindTexts, JoinTexts):
        monkeypatch.setattr(exchange, "split", None)  # they are done
    monkeypatch.setattr(LabelQueries, "merge", None)
    made = label(tmp_path / "killed", rows, by_passage(rows), [], CONFIG)
    assert made.manifest.files == expected.manifest.files
    assert made.manifest.metrics == expected.manifest.metrics


def test_passage_that_is_not_in_the_corpus_is_named(fret: MakeFret) -> None:
    row = scored("q1", "what makes bread rise") | {"candidate_ids": ["z", "b", "c"], "seed_id": "z"}
    with pytest.raises(ArtifactError, match="passage z of the candidates is not among"):
        fret([row])
