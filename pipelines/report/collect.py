"""The figures of a run, gathered from its manifests and artifacts into one JSON document."""

from collections import Counter

import pyarrow.compute as pc

from cluster.artifacts import Artifact, Json
from pipelines.corpus.held_out import HELD_OUT
from pipelines.datasets.decontamination import REASONS
from pipelines.report.costs import collect_costs
from pipelines.report.examples import are_lists, choose_examples
from pipelines.report.labels import REPEATS, collect_labels, share
from pipelines.report.languages import collect_languages
from pipelines.report.run_folder import RunFolder
from pipelines.report.test_sets import MODELS, collect_scores, collect_test_sets
from pipelines.report.training import STAGES, collect_stage

# The filters of the step `fret` in the order in which it applies them, and what passed each.
FILTERS = {
    "not repeating an evaluation query": REASONS,
    "not repeating another query": REPEATS[:1],
    "not nearly repeating another query": REPEATS[1:],
}


def collect(run: RunFolder) -> dict[str, Json]:
    """Returns the report's document; a part whose step is unfinished is empty or None."""
    fret = run.metrics("fret")
    test_sets = collect_test_sets(run)
    first: dict[str, Json] = next(iter(test_sets.values()), {})
    return {
        "recipe": run.name,
        "run": run.storage.uri,
        **{key: first.get(key) for key in (*MODELS, "difference")},
        "gate": run.metrics("gate") or None,
        "test_sets": test_sets,
        "scores": collect_scores(run),
        "funnel": collect_funnel(run),
        "rejects": _rejects(run),
        "dropped_by": fret.get("dropped_by", {}),
        "positive_is_not_seed_share": share(
            fret.get("num_positive_is_not_seed"), fret.get("num_scored")
        ),
        "positive_is_not_seed_share_kept": share(
            fret.get("num_kept_positive_is_not_seed"), fret.get("num_kept")
        ),
        "highest_overlap_kept": fret.get("highest_overlap_kept"),
        "judges": collect_judges(run),
        "labels": collect_labels(run.artifacts.get("fret")),
        "languages": collect_languages(run.artifacts.get("fret")),
        "costs": collect_costs(run),
        "seed_ranks": _seed_ranks(run.artifacts.get("fret")),
        "examples": choose_examples(run.artifacts.get("fret"), run.artifacts.get("passages")),
        **{step: collect_stage(run, step) for step in STAGES},
        "steps": [_step(name, artifact) for name, artifact in run.artifacts.items()],
        "unfinished": run.unfinished,
        "outdated": run.outdated,
        "versions": _versions(run),
    }


def collect_judges(run: RunFolder) -> dict[str, Json] | None:
    """Returns how well the teacher judges: of the probe's queries or else of all that were scored.

    `relabels` is false where the probe has left the labels to the seeds and the retriever.
    """
    for step in ("probe", "fret"):
        metrics = run.metrics(step)
        if "judges" in metrics:
            keys = ("num_judged", "judges", "fusion", "scale", "verdict", "reason")
            relabels = step == "fret" or metrics["fusion"] is not None
            return {**{key: metrics[key] for key in keys}, "step": step, "relabels": relabels}
    return None


def collect_funnel(run: RunFolder) -> list[dict[str, Json]]:
    """Returns how many were left after each step, from documents to training examples."""
    fret = run.metrics("fret")
    rows = [
        ("documents", run.metrics("passages").get("num_documents")),
        ("passages", _num_rows(run, "passages")),
        ("seed passages", _num_rows(run, "seeds")),
    ]
    if "queries" in run.artifacts:
        unusable = run.metrics("queries").get("num_unusable", 0)
        written = run.artifacts["queries"].num_rows - unusable
        rows.append(("queries written", written))
        if held_out := run.metrics("queries").get("num_held_out", 0):
            written -= held_out
            rows.append((f"not {HELD_OUT}", written))
        if own := _num_rows(run, "corpus_queries"):
            rows.append(("with titles and sentences of the corpus", written + own))
    skipped = run.metrics("probe").get("fusion", "") is None or "pairs" not in run.steps
    rows.append((f"queries {'labelled' if skipped else 'scored'}", fret.get("num_scored")))
    if fret:
        left = fret["num_scored"]
        for name, reasons in FILTERS.items():
            left -= sum(fret["dropped_by"].get(reason, 0) for reason in reasons)
            rows.append((name, left))
        if not are_lists(run.artifacts["fret"]):
            rows.append(("with a hard negative", fret["num_kept"] - fret["num_without_negative"]))
    rows.append(("training examples", run.metrics("mixture").get("num_examples")))
    return [{"name": name, "count": count} for name, count in rows if count is not None]


def _num_rows(run: RunFolder, step: str) -> int | None:
    return run.artifacts[step].num_rows if step in run.artifacts else None


def _rejects(run: RunFolder) -> dict[str, dict[str, int]]:
    counts = {}
    for name, artifact in run.artifacts.items():
        if artifact.num_rejects or artifact.num_duplicates:
            counts[name] = dict(artifact.reasons().most_common())
    return counts


def _seed_ranks(fret: Artifact | None) -> list[dict[str, int]]:
    """Counts queries by the rank of their seed; rank 0 (not among the neighbours) comes last."""
    scored: Counter[int] = Counter()
    kept: Counter[int] = Counter()
    for table in fret.tables(["seed_rank", "dropped_by"]) if fret else []:
        scored.update(table["seed_rank"].drop_null().to_pylist())
        of_kept = table.filter(pc.is_null(table["dropped_by"]))
        kept.update(of_kept["seed_rank"].drop_null().to_pylist())
    ranks = sorted(scored, key=lambda rank: (rank == 0, rank))
    return [{"rank": rank, "scored": scored[rank], "kept": kept[rank]} for rank in ranks]


def _step(name: str, artifact: Artifact) -> dict[str, Json]:
    return {
        "name": name,
        "seconds_s": artifact.manifest.seconds_s,
        "num_rows": artifact.num_rows if artifact.num_shards else None,
        "num_rejects": artifact.num_rejects,
        "metrics": artifact.manifest.metrics,
    }


def _versions(run: RunFolder) -> dict[str, str]:
    """Returns each library's version; several where the steps were run with different ones."""
    by_library: dict[str, dict[str, None]] = {}
    for artifact in run.artifacts.values():
        for library, version in artifact.manifest.versions.items():
            by_library.setdefault(library, {})[version] = None
    return {library: ", ".join(versions) for library, versions in sorted(by_library.items())}
