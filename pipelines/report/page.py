"""The report as one self-contained HTML page."""

from pathlib import Path
from typing import Any

from cluster.artifacts import Json
from pipelines.recipe.graph import TITLES
from pipelines.report import figures
from pipelines.report.test_sets import model_titles
from pipelines.report.training import STAGES

TEMPLATE = "report.html"


def render_page(document: dict[str, Json], recipe_text: str) -> str:
    """Returns the page; all text from the run is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "score": show_score,
        "gain": "{:+.3f}".format,
        "percent": "{:.1%}".format,
        "interval": "{0[0]:.3f} to {0[1]:.3f}".format,
        "gain_interval": "{0[0]:+.3f} to {0[1]:+.3f}".format,
        "duration": show_duration,
        "number": show_number,
    }
    return environment.get_template(TEMPLATE).render(
        document=document,
        figures=_figures(document),
        recipe_text=recipe_text,
        models=model_titles(document["gate"]),
        stages={
            "embedding_distillation": "Embedding distillation",
            "prefinetuning": "Pre-finetuning",
            "training": "Fine-tuning",
        },
        titles=TITLES,
    )


def show_score(score: float | None) -> str:
    """Returns a score to three decimal places; `none` where a test set has none."""
    return "none" if score is None else f"{score:.3f}"


def show_duration(seconds_s: float) -> str:
    """Returns a duration in hours, minutes or seconds."""
    if seconds_s < 60:
        return f"{seconds_s:.1f} s"
    minutes, seconds = divmod(round(seconds_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def show_number(value: float) -> str:
    """Returns a whole number with thousands separators, another to four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _figures(document: dict[str, Json]) -> dict[str, Any]:
    """Draws whatever there are figures for; only these SVGs are not escaped."""
    from markupsafe import Markup

    drawn: dict[str, str] = {}
    if document["funnel"]:
        rows = [(row["name"], row["count"], f"{row['count']:,}") for row in document["funnel"]]
        drawn["funnel"] = figures.bars("funnel", "From documents to training examples", rows)
    if document["seed_ranks"]:
        ranks = [(row["rank"], row["scored"], row["kept"]) for row in document["seed_ranks"]]
        drawn["seed_ranks"] = figures.seed_ranks("seeds", "Where the seed ranks", ranks)
    if document["labels"]:
        shifts = [(row["rank"], row["count"]) for row in document["labels"]["rank_shifts"]]
        label = "Where the retriever ranks the positive"
        drawn["rank_shifts"] = figures.rank_shifts("shifts", label, shifts)
    for step in STAGES:
        if document[step]:
            drawn |= _training_figures(step, document[step])
    if document["steps"]:
        times = [
            (step["name"], step["seconds_s"], show_duration(step["seconds_s"]))
            for step in document["steps"]
        ]
        drawn["steps"] = figures.bars("steps", "Time of each step", times)
    for number, test_set in enumerate(document["test_sets"].values()):
        titles = model_titles(document["gate"])
        of_models = [(title, test_set[key]) for key, title in titles.items() if key in test_set]
        scores = [
            (title, row["ndcg_at_10"], *row["ndcg_at_10_interval"]) for title, row in of_models
        ]
        label = "nDCG@10 with 95 % interval"
        drawn[f"scores_{number}"] = figures.intervals(f"scores-{number}", label, scores)
    return {name: Markup(svg) for name, svg in drawn.items()}


# Curves drawn side by side: their labels and the names of their axes.
_SMALL_CURVES = {
    "learning_rate": ("Learning rate of each batch", "learning rate"),
    "examples_per_s": ("Throughput of each batch", "examples/s"),
    "validation_ndcg_at_10": ("nDCG@10 while training", "nDCG@10"),
}


def _training_figures(step: str, stage: dict[str, Any]) -> dict[str, str]:
    drawn = {}
    if stage["loss"]:
        drawn[f"{step}_loss"] = figures.loss_curve(
            f"{step}-loss", "Loss of each batch", stage["loss"], stage["validation_loss"]
        )
    for key, (label, what) in _SMALL_CURVES.items():
        if stage[key]:
            name = f"{step}_{key}"
            drawn[name] = figures.curve(
                name.replace("_", "-"), label, stage[key], what, noisy=key == "examples_per_s"
            )
    for number, each in enumerate(stage["sets"]):
        if each["loss"]:
            label = f"Loss of set {number + 1}"
            drawn[f"{step}_set_{number}"] = figures.sparkline(label, each["loss"])
    return drawn
