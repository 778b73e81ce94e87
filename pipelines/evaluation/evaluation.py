"""The step `evaluation`: the run's test sets, by the retriever and the student before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.artifacts import Artifact, Json
from cluster.plain_json import dump_json
from cluster.steps import Step, StepContext
from cluster.storage import LocalStorage, Storage
from pipelines.datasets.retrieval import RetrievalDataset
from pipelines.datasets.test_sets import TestSet, load_test_sets, test_set_fingerprint
from pipelines.encoders import TRAINED, load_encoder, saved_encoder, upload_folder
from pipelines.evaluation.compare import STUDENT_AFTER, averages, compare
from pipelines.evaluation.evaluate import evaluate_at
from pipelines.evaluation.model_card import add_to_card, model_index, training_sets
from pipelines.evaluation.mteb_model import ModelIdentity
from pipelines.fingerprints import fingerprinted

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from pipelines.recipe.recipe import Recipe

TITLE = "evaluate"

# What the student is called after each stage before its training.
STAGES = {
    "embedding_distillation": "student_embedding_distilled",
    "prefinetuning": "student_prefinetuned",
}
RESULTS = "results.json"
# mteb's own results, in the layout of its ResultCache.
MTEB_RESULTS = "mteb"
CARD = "README.md"


def step(recipe: Recipe) -> Step:
    """Returns the step of a recipe that has test sets."""
    student = recipe.student
    between = tuple(stage for stage in STAGES if getattr(recipe, stage))

    def evaluate(context: StepContext) -> dict[str, Json]:
        import torch

        configs = {
            "retriever": recipe.retriever,
            "student_before": saved_encoder(context.input("student"), student),
        }
        for stage in between:
            configs[STAGES[stage]] = saved_encoder(context.input(stage), student, TRAINED)
        configs[STUDENT_AFTER] = saved_encoder(context.input("export"), student)
        encoders = {name: load_encoder(config) for name, config in configs.items()}
        try:
            return run_evaluation(recipe.evaluation, encoders, context)
        finally:
            encoders.clear()
            torch.cuda.empty_cache()  # this process lives on

    return Step(
        name="evaluation",
        config={
            "test_sets": [test_set_fingerprint(test_set) for test_set in recipe.evaluation],
            "retriever": fingerprinted(recipe.retriever),
            "student_dtype": student.dtype,
        },
        inputs=("student", "export", *between),
        work=evaluate,
    )


def run_evaluation(
    test_sets: tuple[TestSet, ...], encoders: dict[str, Encoder], context: StepContext
) -> dict[str, Json]:
    """Evaluates every encoder on every test set; writes results.json with each item's results.

    mteb's results stand in the folder ``mteb`` beside it, from where a step that was broken off
    takes what it had measured; ``README.md`` is the export's model card with the results in it.
    """
    loaded = list(load_test_sets(test_sets))
    data = [each for _, each in loaded]
    card = _card(context.input("export"))
    models = {
        name: ModelIdentity(
            name=name,
            revision=encoder.fingerprint,
            num_parameters=encoder.num_parameters,
            training_sets=training_sets(card) if name == STUDENT_AFTER else (),
        )
        for name, encoder in encoders.items()
    }
    sizes = [getattr(each, "num_texts", 1) for each in data]
    done, total = 0, sum(sizes) * len(encoders)
    results = []
    notes = {each.name: list(each.notes) for each in data if getattr(each, "notes", ())}
    with _results_folder(context.storage) as folder:
        for (test_set, each), size in zip(loaded, sizes, strict=True):
            for name, encoder in encoders.items():
                encoded = 0

                def progress(
                    num_texts: int, name: str = name, before: int = done, most: int = size
                ) -> None:
                    nonlocal encoded
                    encoded = min(encoded + num_texts, most)
                    context.progress.update(before + encoded, total, name)

                sizes_there = [size for size in test_set.dimensions if size <= encoder.dimensions]
                if len(sizes_there) < len(test_set.dimensions):
                    notes.setdefault(test_set.name, []).append(
                        f"{name} is measured at its {encoder.dimensions} dimensions and fewer alone"
                    )
                results += evaluate_at(
                    encoder,
                    each,
                    model=models[name],
                    task=test_set.task,
                    dimensions=(None, *sizes_there),
                    results=folder,
                    on_progress=progress,
                )
                done += size
    searched = [each for each in data if isinstance(each, RetrievalDataset)]
    differences, means = compare(results), averages(results)
    document = {
        "results": [result.to_json() for result in results],
        "differences": differences,
        "averages": means,
        "notes": notes,
        "queries": {each.name: dict(each.queries) for each in searched},
        "qrels": {
            each.name: {query: dict(rated) for query, rated in each.qrels.items()}
            for each in searched
        },
        "num_parameters": {name: encoder.num_parameters for name, encoder in encoders.items()},
    }
    context.storage.write_bytes(RESULTS, dump_json(document).encode())
    short = [result.to_json(items=False) for result in results]
    scored = [row for row in short if row["mteb_score"] is not None]
    metadata = model_index(STUDENT_AFTER, [row for row in scored if row["model"] == STUDENT_AFTER])
    context.storage.write_bytes(CARD, add_to_card(card, metadata).encode())
    return {"results": short, "differences": differences, "averages": means, "notes": notes}


def _card(export: Artifact) -> str:
    path = f"model/{CARD}"
    return export.storage.read_bytes(path).decode() if export.storage.exists(path) else ""


@contextmanager
def _results_folder(storage: Storage) -> Iterator[Path]:
    """Yields a local folder that is, or is copied from and to, the step's ``mteb``."""
    if isinstance(storage, LocalStorage):
        yield storage.folder / MTEB_RESULTS
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in storage.list(MTEB_RESULTS):
            storage.download(file, folder / file)
        try:
            yield folder / MTEB_RESULTS
        finally:
            upload_folder(folder / MTEB_RESULTS, storage, MTEB_RESULTS)
