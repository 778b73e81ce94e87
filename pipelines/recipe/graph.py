"""A recipe's steps, in the order of the data's way; each is described in the file of its name."""

from cluster.steps import Run
from pipelines.corpus import passages, seeds
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.test_sets import evaluation_queries
from pipelines.evaluation import evaluation, index
from pipelines.fret import corpus_queries, cross_scores, fret, pairs, probe, queries, scores
from pipelines.mining import candidates, embeddings
from pipelines.mixture import embedding_distillation_mixture, mixture, prefinetuning_mixture
from pipelines.recipe.recipe import Recipe
from pipelines.training import (
    embedding_distillation,
    export,
    gate,
    linear_adapter,
    prefinetuning,
    student,
    training,
)

# What a step is for, by its name, as the console and the report say it.
TITLES = {
    step.__name__.rpartition(".")[2]: step.TITLE
    for step in (
        *(passages, seeds, queries, corpus_queries, embeddings, candidates),
        *(probe, pairs, scores, cross_scores),
        *(fret, student),
        *(embedding_distillation_mixture, embedding_distillation),
        *(prefinetuning_mixture, prefinetuning, mixture, training, linear_adapter),
        *(gate, export, index, evaluation),
    )
}

# Stages that a recipe may have before its training: its key, a step, and that step's mixture.
OPTIONAL_STAGES = ("embedding_distillation", "prefinetuning")


def build_run(recipe: Recipe, uri: str) -> Run:
    """Returns the run of a recipe in a folder; finds the corpus, runs nothing.

    Raises:
        UserError: The corpus, a labelled set or a test set does not exist.
    """
    steps = [passages.step(recipe), seeds.step(recipe), queries.step(recipe)]
    if recipe.corpus_queries:
        steps.append(corpus_queries.step(recipe))
    steps += [embeddings.step(recipe), candidates.step(recipe)]
    if recipe.has_probe:
        steps.append(probe.step(recipe))
    if recipe.probe.sample is not None:
        return Run(uri, steps)
    decontamination = Decontamination(evaluation_queries(recipe.evaluation), recipe.decontamination)
    if recipe.fret.scores_pairs:
        steps.append(pairs.step(recipe))
    if recipe.fret.asks_llm:
        steps.append(scores.step(recipe))
    if recipe.fret.asks_cross_encoder:
        steps.append(cross_scores.step(recipe))
    steps += [fret.step(recipe, decontamination), student.step(recipe)]
    if recipe.embedding_distillation:
        steps.append(embedding_distillation_mixture.step(recipe, decontamination))
        steps.append(embedding_distillation.step(recipe))
    if recipe.prefinetuning:
        steps += [prefinetuning_mixture.step(recipe, decontamination), prefinetuning.step(recipe)]
    steps += [mixture.step(recipe, decontamination), training.step(recipe)]
    if recipe.linear_adapter:
        steps.append(linear_adapter.step(recipe))
    if recipe.gate:
        steps.append(gate.step(recipe))
    steps += [export.step(recipe), index.step(recipe)]
    if recipe.evaluation:
        steps.append(evaluation.step(recipe))
    return Run(uri, steps)
