"""The step `evaluation`: the run's test sets, by the retriever and the student before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.artifacts import Artifact, Json
from cluster.plain_json import dump_json
from cluster.step_task import run_in_task
from cluster.steps import Step, StepContext
from cluster.storage import LocalStorage, Storage
from pipelines.datasets.retrieval import RetrievalDataset
from pipelines.datasets.test_sets import TestSet, load_test_sets, test_set_fingerprint
from pipelines.encoders import TRAINED, EncoderConfig, load_encoder, saved_encoder
from pipelines.evaluation.compare import STUDENT_AFTER, averages, compare
from pipelines.evaluation.evaluate import ITEMS, evaluate_at
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
    evaluate = partial(_evaluate, recipe.evaluation, recipe.retriever, student, between)
    return Step(
        name="evaluation",
        config={
            "test_sets": [test_set_fingerprint(test_set) for test_set in recipe.evaluation],
            "retriever": fingerprinted(recipe.retriever),
            "student_dtype": student.dtype,
        },
        inputs=("student", "export", *between),
        work=lambda context: run_in_task(evaluate, context, recipe.resources.encoder),
    )


def _evaluate(
    test_sets: tuple[TestSet, ...],
    retriever: EncoderConfig,
    student: EncoderConfig,
    between: tuple[str, ...],
    context: StepContext,
) -> dict[str, Json]:
    configs = {
        "retriever": retriever,
        "student_before": saved_encoder(context.input("student"), student),
        **{
            STAGES[stage]: saved_encoder(context.input(stage), student, TRAINED)
            for stage in between
        },
        STUDENT_AFTER: saved_encoder(context.input("export"), student),
    }
    encoders = {name: load_encoder(config) for name, config in configs.items()}
    return run_evaluation(test_sets, encoders, context)


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
    with _results_folder(context.storage) as (folder, save):
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
                save()
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
def _results_folder(storage: Storage) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yields a local folder that is the step's ``mteb``, or a copy of it, and what saves the copy.

    It is saved after each result, since a node may be lost, and the folder with it.
    """
    if isinstance(storage, LocalStorage):
        yield storage.folder / MTEB_RESULTS, lambda: None
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in storage.list(MTEB_RESULTS):
            storage.download(path, folder / path)
        saved = _times(folder)

        def save() -> None:
            changed = _times(folder).items() - saved.items()
            # Items first: with them, an mteb's result is taken as it stands.
            for file, time in sorted(changed, key=lambda each: each[0].parent.name != ITEMS):
                storage.upload(file, file.relative_to(folder).as_posix())
                saved[file] = time

        yield folder / MTEB_RESULTS, save


def _times(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
