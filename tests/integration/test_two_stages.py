"""Pre-finetuning and fine-tuning through Ray Train, on labelled sets and the run's own passages."""

import json
from pathlib import Path

import numpy as np
import pytest

from actors.encoder import Encoder
from cluster.artifacts import Artifact
from cluster.steps import Run, Step
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]

TRAINING_SIDE = ("passages", "student", "prefinetuning_mixture", "prefinetuning")
TRAINING_SIDE += ("mixture", "training", "gate")


class Listener:
    def step_found(self, step: Step, artifact: Artifact) -> None: ...

    def step_begins(self, step: Step, resumed: bool) -> "Listener":
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None: ...

    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def write_test_set(folder: Path, words: list[str]) -> None:
    """Writes a BEIR folder, with queries that no training text repeats."""
    (folder / "qrels").mkdir(parents=True)
    for name, text in (("corpus", "{} lies in the ground"), ("queries", "tell me more of {}")):
        rows = [{"_id": word, "text": text.format(word)} for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    qrels = "\n".join(f"{word}\t{word}\t1" for word in words)
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}\n")


def test_fine_tuning_starts_where_pre_finetuning_ended_and_a_tie_exports_that(
    tmp_path: Path,
) -> None:
    words = ["amber", "basalt", "copper", "diamond", "emerald", "flint", "granite", "hematite"]
    words += ["indium", "jasper"]
    documents = [
        {"title": f"About {word}", "text": f"{word} is a stone or a metal. " * 6} for word in words
    ]
    questions = [{"query": f"what is {w}", "positive": f"a stone called {w}"} for w in words]
    texts = [{"text": f"{word} {n}", "label": word} for word in words[:4] for n in range(3)]
    for name, rows in (("corpus", documents), ("faq", questions), ("stones", texts)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_test_set(tmp_path / "beir", words)
    sets = [f"{{name: {name}, path: {tmp_path}/beir}}" for name in ("headline", "judge")]
    training = "batch_size: 5, num_workers: 1, precision: float32, tracking: []"
    recipe = load_recipe(
        "laptop",
        [
            f"corpus.path={tmp_path}/corpus.jsonl",
            "corpus.near_duplicate_threshold=null",
            "corpus.max_words=60",
            "student.query_template='task: {task} | query: {text}'",
            "prefinetuning.mixture.labelled=["
            f"{{name: faq, path: {tmp_path}/faq.jsonl, task: question answering}},"
            "{name: titles, kind: title-body, path: 'run:passages'}]",
            f"prefinetuning.training={{epochs: 2, learning_rate: 1.0e-3, {training}}}",
            "mixture.fret_weight=0",
            "mixture.labelled=["
            f"{{name: stones, kind: classification, path: {tmp_path}/stones.jsonl}}]",
            f"evaluation=[{', '.join(sets)}]",
            "gate={test_set: judge, interpolations: [0.5]}",
            # So little that the fine-tuning leaves its start as it is.
            f"training={{epochs: 1, learning_rate: 1.0e-12, {training}}}",
        ],
    )
    steps = [step for step in build_run(recipe, str(tmp_path)).steps if step.name in TRAINING_SIDE]
    made = Run(str(tmp_path / "run"), steps).execute(Listener())

    first = made["prefinetuning_mixture"]
    assert first.manifest.metrics["sets"] == {"faq": 10, "titles": 10}
    assert made["prefinetuning"].manifest.metrics["num_batches"] == 8
    (task,) = {row.partition(" | ")[0] for row in made["mixture"].read()["query"].to_pylist()}
    assert task == "task: classification"
    folders = {"student": "model", "prefinetuning": "encoder", "training": "encoder"}
    before, between, after, exported = (
        Encoder.load(f"{made[step].uri}/{folder}").encode(["what is amber", "copper"])
        for step, folder in (*folders.items(), ("gate", "encoder"))
    )
    assert np.allclose(between, after, atol=1e-5)
    assert not np.allclose(before, between, atol=1e-2)
    gate = made["gate"].manifest
    assert set(gate.inputs) == {"prefinetuning", "training"}
    assert (gate.metrics["weight"], gate.metrics["num_queries"]) == (0.0, 10)
    assert (
        "not better than its start on 10 queries of the test set judge" in gate.metrics["decision"]
    )
    assert np.array_equal(between, exported)
