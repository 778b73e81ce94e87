"""`tokay plan --probe`: a run over a part of the corpus that ends when it knows the teacher.

It is a run like any other, in a folder of its own beside that of the recipe, so that it goes on
where it stopped, and leaves the recipe's own run as it is.
"""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.artifacts import Artifact, Json
from cluster.storage import join, open_storage
from pipelines.recipe.graph import build_run
from pipelines.recipe.recipe import Recipe
from pipelines.run.execute import execute

COLOURS = {"GO": "green", "MAYBE": "yellow", "SKIP": "red"}
_COUNTS = {"passages": "num_passages", "seeds": "num_seeds", "probe": "num_queries"}


def probe_folder(uri: str) -> str:
    """Returns where the probe of a run lies: beside it."""
    return f"{uri.rstrip('/')}-probe"


def probe_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe of a probe: a sample of the corpus, and as many seeds as it needs.

    Of a seed's queries the share `estimate.scored_share` is taken to be fit; the recipe's own
    number of seeds is the limit.
    """
    probe, seeds = recipe.probe, recipe.seeds
    fit = recipe.estimate.scored_share * recipe.queries.queries_per_seed
    num_seeds = min(seeds.num_seeds, math.ceil(probe.num_queries / fit))
    return recipe.model_copy(
        update={
            "seeds": seeds.model_copy(update={"num_seeds": num_seeds}),
            "probe": probe.model_copy(update={"sample": probe.max_passages}),
            "corpus_queries": None,  # by which no teacher is judged
            "gate": None,  # which would have held-out queries written
        }
    )


def run_probe(
    recipe: Recipe, uri: str, console: Console, *, rebuild: bool = False
) -> dict[str, Json]:
    """Runs the probe of a recipe beside the run's folder `uri`; returns its table and verdict."""
    small, folder = probe_recipe(recipe), probe_folder(uri)
    console.print(
        f"probe: {recipe.probe.num_queries:,} queries of {small.seeds.num_seeds:,} seeds, over at"
        f" most {recipe.probe.max_passages:,} passages of the corpus",
        soft_wrap=True,
    )
    artifacts = execute(small, folder, console, until="probe", rebuild=rebuild)
    counts = {key: artifacts[step].manifest.metrics[key] for step, key in _COUNTS.items()}
    place = {"recipe": recipe.name, "storage": open_storage(folder).uri}
    return {**place, **counts, **judged(artifacts["probe"])}


def judged(probe: Artifact) -> dict[str, Json]:
    """Returns a finished probe's table, choice and verdict."""
    metrics = probe.manifest.metrics
    keys = ("num_judged", "judges", "fusion", "scale", "verdict", "reason")
    return {key: metrics[key] for key in keys}


def finished_probe(recipe: Recipe, uri: str) -> dict[str, Json] | None:
    """Returns what a finished probe of this recipe says, the run's own first; None without one.

    Raises:
        TokayError: The corpus does not exist, or a folder is not as this version writes it.
    """
    for each, folder in ((recipe, uri), (probe_recipe(recipe), probe_folder(uri))):
        if not each.has_probe or Artifact.open(open_storage(join(folder, "probe"))) is None:
            continue
        run = build_run(each, folder)
        step = next(step for step in run.steps if step.name == "probe")
        artifact = run.artifact(step)
        if artifact is not None and run.state(step) == "done":
            return {"storage": run.storage.uri} | judged(artifact)
    return None


def print_judged(found: dict[str, Any], console: Console) -> None:
    """Prints the table and the verdict."""
    table = Table(box=None, header_style="bold")
    table.add_column("how well the teacher judges")
    for heading in ("seed first", "better", "worse", "p"):
        table.add_column(heading, justify="right")
    for place, row in enumerate(found["judges"]):
        chosen = (row["fusion"], row["scale"]) == (found["fusion"], found["scale"])
        against = [f"{row['better']:,}", f"{row['worse']:,}", f"{row['p']:.2g}"]
        if place == 0:  # the retriever itself
            against = [""] * 3
        share = f"{row['seed_first']:.1%}".replace("%", " %")
        table.add_row(row["ranking"], share, *against, style="bold" if chosen else "")
    console.print(table)
    console.print(
        Text(
            "Of the queries whose seed the retriever has among the candidates that are scored; ties"
            " count as their share. Better and worse: queries, against the retriever; p: exact sign"
            " test.",
            "dim",
        ),
        soft_wrap=True,
    )
    console.print(Text(found["reason"], f"bold {COLOURS[found['verdict']]}"), soft_wrap=True)
