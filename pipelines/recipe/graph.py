"""A recipe becomes a graph of steps: which reads which, and what of the recipe changes each."""

from __future__ import annotations

from typing import cast

from pydantic import BaseModel

from cluster.artifacts import Artifact, Json, fingerprint
from cluster.steps import Run, Step, StepContext
from cluster.storage import join, open_storage
from pipelines.corpus.passages import choose_seeds, make_passages
from pipelines.corpus.sources import PYTHON_DOCUMENTATION, Corpus
from pipelines.encoders import EncoderConfig, embed_passages, load_encoder
from pipelines.evaluation.dataset import RetrievalDataset
from pipelines.evaluation.evaluation import (
    TestSet,
    evaluation_queries,
    load_test_set,
    run_evaluation,
)
from pipelines.fret.fret import make_fret
from pipelines.fret.language_models import engine_options
from pipelines.fret.pairs import group_pairs
from pipelines.fret.prompts import PairPrompts, load_prompts
from pipelines.fret.queries import query_prompts, write_queries
from pipelines.fret.scores import score_pairs
from pipelines.mining.candidates import find_candidates
from pipelines.mixture.config import RUN_PASSAGES, MixtureConfig, SetsConfig
from pipelines.mixture.decontamination import Decontamination
from pipelines.mixture.formats import Formatter
from pipelines.mixture.mixture import make_mixture
from pipelines.mixture.rows import version
from pipelines.recipe.recipe import Recipe
from pipelines.training.config import TrainingConfig
from pipelines.training.export import export_student
from pipelines.training.student import MODEL, make_student

# What a step is for, as the console and the report say it.
TITLES = {
    "passages": "clean, cut and deduplicate the corpus",
    "seeds": "sample seed passages",
    "queries": "the LLM writes queries",
    "embeddings": "embed the passages",
    "candidates": "find each query's neighbours",
    "pairs": "sort what to score by passage",
    "scores": "the LLM scores each candidate",
    "fret": "choose positives and hard negatives",
    "student": "make the student",
    "prefinetuning_mixture": "mix the batches of pre-finetuning",
    "prefinetuning": "pre-finetune the student",
    "mixture": "mix the training batches",
    "training": "train the student",
    "export": "export and check parity",
    "index": "embed the corpus with the student",
    "evaluation": "evaluate",
}


# Where a training step leaves its encoder.
ENCODER = "encoder"


def build_run(recipe: Recipe, uri: str) -> Run:
    """Returns the run of a recipe in a folder; finds the corpus, runs nothing.

    Raises:
        UserError: The corpus or a test set does not exist.
    """
    corpus = Corpus(recipe.corpus)
    judged_by = evaluation_queries(recipe.evaluation)
    resources = recipe.resources
    options = engine_options(recipe.llm, resources.engine)
    prompts = load_prompts(recipe.prompts)
    pair_prompts = PairPrompts(prompts=prompts, relevance=recipe.scores.relevance)
    llm, encoder = resources.llm.stage(), resources.encoder.stage()

    def export(context: StepContext) -> dict[str, Json]:
        texts = context.input("passages").shard(context.input("passages").shards[0], ["text"])
        sample = texts["text"].to_pylist()[:32]
        return export_student(recipe.name, recipe.student, sample, context)

    def evaluate(context: StepContext) -> dict[str, Json]:
        import torch

        encoders = {
            "retriever": load_encoder(recipe.retriever),
            "student_before": load_encoder(_saved(context.input("student"), recipe)),
        }
        if recipe.prefinetuning:
            trained = context.input("prefinetuning")
            encoders["student_prefinetuned"] = load_encoder(_saved(trained, recipe, ENCODER))
        encoders["student_after"] = load_encoder(_saved(context.input("export"), recipe))
        try:
            return run_evaluation(recipe.evaluation, encoders, context)
        finally:
            encoders.clear()
            torch.cuda.empty_cache()  # this process lives on

    steps = [
        Step(
            name="passages",
            config={
                "corpus": _dump(recipe.corpus, "path", "max_reject_share"),
                "version": corpus.version(),
            },
            inputs=(),
            work=lambda context: make_passages(corpus, context),
            max_reject_share=recipe.corpus.max_reject_share,
        ),
        Step(
            name="seeds",
            config=_dump(recipe.seeds),
            inputs=("passages",),
            work=lambda context: choose_seeds(recipe.seeds, context),
        ),
        Step(
            name="queries",
            config={
                "llm": _dump(recipe.llm),
                "queries": _dump(recipe.queries, "max_unusable_share"),
                "prompts": _dump(prompts, "scores"),
            },
            inputs=("seeds",),
            work=lambda context: write_queries(
                recipe.queries, query_prompts(recipe.queries, prompts), options, llm, context
            ),
        ),
        Step(
            name="embeddings",
            config=_dump(recipe.retriever),
            inputs=("passages",),
            work=lambda context: embed_passages(recipe.retriever, encoder, context),
        ),
        Step(
            name="candidates",
            config={"retriever": _dump(recipe.retriever), **_dump(recipe.candidates)},
            inputs=("queries", "embeddings"),
            work=lambda context: find_candidates(
                recipe.candidates, recipe.retriever, encoder, resources.index.stage(), context
            ),
        ),
        Step(
            name="pairs",
            config={"num_scored": recipe.scores.num_scored},
            inputs=("candidates", "passages"),
            work=lambda context: group_pairs(recipe.scores.num_scored, context),
        ),
        Step(
            name="scores",
            config={
                "llm": _dump(recipe.llm),
                "scores": _dump(recipe.scores, "num_scored", "max_unusable_share"),
                "prompts": _dump(prompts, "tasks", "written"),
            },
            inputs=("pairs",),
            work=lambda context: score_pairs(recipe.scores, pair_prompts, options, llm, context),
        ),
        Step(
            name="fret",
            config={**_dump(recipe.fret), "judged_by": fingerprint(judged_by)},
            inputs=("candidates", "scores", "passages"),
            work=lambda context: make_fret(recipe.fret, judged_by, context),
        ),
        Step(
            name="student",
            config=_dump(recipe.student, "dtype"),
            inputs=(),
            work=lambda context: make_student(recipe.student, context),
        ),
        *_training_steps(recipe, judged_by),
        Step(
            name="export",
            config={"recipe": recipe.name},
            inputs=(
                *("training", "mixture", "fret", "passages"),
                *(("prefinetuning_mixture",) if recipe.prefinetuning else ()),
            ),
            work=export,
        ),
        Step(
            name="index",
            config={"dtype": recipe.student.dtype},
            inputs=("passages", "export"),
            work=lambda context: embed_passages(
                _saved(context.input("export"), recipe), encoder, context
            ),
        ),
    ]
    if recipe.evaluation:
        steps.append(
            Step(
                name="evaluation",
                config={
                    "test_sets": [_test_set(test_set) for test_set in recipe.evaluation],
                    "retriever": _dump(recipe.retriever),
                    "student_dtype": recipe.student.dtype,
                },
                inputs=(
                    *("passages", "student", "export"),
                    *(("prefinetuning",) if recipe.prefinetuning else ()),
                ),
                work=evaluate,
            )
        )
    return Run(uri, steps)


def _training_steps(recipe: Recipe, judged_by: list[str]) -> list[Step]:
    """Returns the steps that mix and train, of each stage."""
    steps = []
    if recipe.prefinetuning:
        first = recipe.prefinetuning
        steps += [
            _mixture_step(
                "prefinetuning_mixture", first.mixture, first.training, recipe, judged_by
            ),
            _training_step("prefinetuning", "prefinetuning_mixture", first.training, recipe),
        ]
    return [
        *steps,
        _mixture_step("mixture", recipe.mixture, recipe.training, recipe, judged_by),
        _training_step("training", "mixture", recipe.training, recipe),
    ]


def _mixture_step(
    name: str,
    config: SetsConfig,
    training: TrainingConfig,
    recipe: Recipe,
    judged_by: list[str],
) -> Step:
    inputs = ["student"]
    if isinstance(config, MixtureConfig) and config.fret_weight != 0:
        inputs.append("fret")
    if any(labelled.path == RUN_PASSAGES for labelled in config.labelled):
        inputs.append("passages")

    def mix(context: StepContext) -> dict[str, Json]:
        return make_mixture(
            config,
            formatter=Formatter(
                encoder=load_encoder(_saved(context.input("student"), recipe), device="cpu"),
                max_query_tokens=training.max_query_tokens,
                max_passage_tokens=training.max_passage_tokens,
            ),
            decontamination=Decontamination(
                judged_by,
                max_overlap=recipe.fret.max_overlap,
                max_shared_words=recipe.fret.max_shared_words,
            ),
            batch_size=training.batch_size,
            epochs=training.epochs,
            context=context,
        )

    return Step(
        name=name,
        config={
            "mixture": _dump(config, "labelled", "max_reject_share"),
            "labelled": [
                {**_dump(labelled, "path"), "version": version(labelled)}
                for labelled in config.labelled
            ],
            **training.model_dump(
                include={"batch_size", "epochs", "max_query_tokens", "max_passage_tokens"}
            ),
            "decontamination": {
                "max_overlap": recipe.fret.max_overlap,
                "max_shared_words": recipe.fret.max_shared_words,
                "judged_by": fingerprint(judged_by),
            }
            if config.labelled
            else None,
        },
        inputs=tuple(inputs),
        work=mix,
    )


def _training_step(name: str, mixture: str, training: TrainingConfig, recipe: Recipe) -> Step:
    named = training.validation.test_set if training.validation else None
    test_set = next((each for each in recipe.evaluation if each.name == named), None)
    inputs = [mixture, "student"]
    if name == "training" and recipe.prefinetuning:
        inputs[1] = "prefinetuning"
    if test_set is not None and test_set.path == PYTHON_DOCUMENTATION:
        inputs.append("passages")

    def train(context: StepContext) -> dict[str, Json]:
        from pipelines.training.training import train_student
        from pipelines.training.validation import WatchedSet

        start, watched = context.input(inputs[1]), None
        if test_set is not None:
            found = load_test_set(test_set, context.inputs.get("passages"))
            data = cast(RetrievalDataset, found)  # the recipe was checked
            watched = WatchedSet(data=data, task=test_set.task)
        return train_student(
            training,
            mixture=mixture,
            student=join(start.uri, ENCODER if inputs[1] == "prefinetuning" else MODEL),
            test_set=watched,
            trust_remote_code=recipe.student.trust_remote_code,
            context=context,
        )

    config = _dump(training, *training.UNFINGERPRINTED)
    if test_set is not None:
        config["test_set"] = _test_set(test_set)
    return Step(name=name, config=config, inputs=tuple(inputs), work=train)


def _saved(artifact: Artifact, recipe: Recipe, folder: str = MODEL) -> EncoderConfig:
    """Describes an encoder that a step saved: its folder carries its own templates."""
    return EncoderConfig(
        model=join(artifact.uri, folder),
        max_tokens=recipe.student.max_tokens,
        dtype=recipe.student.dtype,
        trust_remote_code=recipe.student.trust_remote_code,
    )


def _dump(config: BaseModel, *leave_out: str) -> dict[str, Json]:
    return config.model_dump(mode="json", exclude=set(leave_out))


def _test_set(test_set: TestSet) -> dict[str, Json]:
    if test_set.kind == "mteb":
        return _dump(test_set)
    row = _dump(test_set, "path")
    if test_set.path != PYTHON_DOCUMENTATION:
        storage = open_storage(test_set.path)
        row["files"] = [[file, storage.version(file)] for file in storage.list()]
    return row
