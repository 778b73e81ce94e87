"""A recipe becomes a graph of steps: which reads which, and what of the recipe changes each."""

from __future__ import annotations

from pydantic import BaseModel

from cluster.artifacts import Artifact, Json
from cluster.steps import Run, Step, StepContext
from pipelines.corpus.sources import Corpus
from pipelines.corpus.steps import choose_seeds, make_passages
from pipelines.encoders import EncoderConfig, embed_passages, load_encoder
from pipelines.evaluation.steps import TestSet, evaluation_queries, run_evaluation
from pipelines.fret.fret import make_fret
from pipelines.fret.language_models import engine_options
from pipelines.fret.neighbours import find_candidates
from pipelines.fret.pairs import group_pairs
from pipelines.fret.prompts import PairPrompts, load_prompts
from pipelines.fret.queries import query_prompts, write_queries
from pipelines.fret.scores import score_pairs
from pipelines.mixture.formats import Formatter
from pipelines.mixture.mixture import make_mixture
from pipelines.recipe import Recipe
from pipelines.student import export_student, make_student, model_folder

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
    "mixture": "mix the training batches",
    "training": "train the student",
    "export": "export and check parity",
    "index": "embed the corpus with the student",
    "evaluation": "evaluate",
}


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

    def train(context: StepContext) -> dict[str, Json]:
        from pipelines.training.step import train_student

        return train_student(recipe.training, context)

    def mix(context: StepContext) -> dict[str, Json]:
        return make_mixture(
            recipe.mixture,
            formatter=Formatter(
                encoder=load_encoder(_saved(context.input("student"), recipe)),
                max_query_tokens=recipe.training.max_query_tokens,
                max_passage_tokens=recipe.training.max_passage_tokens,
            ),
            batch_size=recipe.training.batch_size,
            epochs=recipe.training.epochs,
            context=context,
        )

    def export(context: StepContext) -> dict[str, Json]:
        texts = context.input("passages").shard(context.input("passages").shards[0], ["text"])
        sample = texts["text"].to_pylist()[:32]
        return export_student(recipe.name, recipe.student.model, sample, context)

    def evaluate(context: StepContext) -> dict[str, Json]:
        encoders = {
            "retriever": load_encoder(recipe.retriever),
            "student_before": load_encoder(_saved(context.input("student"), recipe)),
            "student_after": load_encoder(_saved(context.input("export"), recipe)),
        }
        return run_evaluation(recipe.evaluation, encoders, context)

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
            config={**_dump(recipe.fret), "judged_by": judged_by},
            inputs=("candidates", "scores", "passages"),
            work=lambda context: make_fret(recipe.fret, judged_by, context),
        ),
        Step(
            name="student",
            config=_dump(recipe.student),
            inputs=(),
            work=lambda context: make_student(recipe.student, context),
        ),
        Step(
            name="mixture",
            config={
                "mixture": _dump(recipe.mixture),
                "batch_size": recipe.training.batch_size,
                "epochs": recipe.training.epochs,
                "max_query_tokens": recipe.training.max_query_tokens,
                "max_passage_tokens": recipe.training.max_passage_tokens,
            },
            inputs=("fret", "student"),
            work=mix,
        ),
        Step(
            name="training",
            config=_dump(recipe.training, *recipe.training.UNFINGERPRINTED),
            inputs=("mixture", "student"),
            work=train,
        ),
        Step(
            name="export",
            config={"recipe": recipe.name},
            inputs=("training", "mixture", "fret", "passages"),
            work=export,
        ),
        Step(
            name="index",
            config={},
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
                },
                inputs=("passages", "student", "export"),
                work=evaluate,
            )
        )
    return Run(uri, steps)


def _saved(artifact: Artifact, recipe: Recipe) -> EncoderConfig:
    """Describes an encoder that a step saved: its folder carries its own templates."""
    return EncoderConfig(
        model=model_folder(artifact),
        max_tokens=recipe.student.max_tokens,
        dtype=recipe.student.dtype,
    )


def _dump(config: BaseModel, *leave_out: str) -> dict[str, Json]:
    return config.model_dump(mode="json", exclude=set(leave_out))


def _test_set(test_set: TestSet) -> dict[str, Json]:
    from cluster.storage import open_storage
    from pipelines.corpus.sources import PYTHON_DOCUMENTATION

    row = _dump(test_set, "path")
    if test_set.path != PYTHON_DOCUMENTATION:
        storage = open_storage(test_set.path)
        row["files"] = [[file, storage.version(file)] for file in storage.list()]
    return row
