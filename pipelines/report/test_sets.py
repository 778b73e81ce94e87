"""The scores on a run's test sets, and a few queries that show them, for better and for worse."""

import json
from typing import Any

from cluster.artifacts import Json
from pipelines.report.run_folder import RunFolder, find_documents, find_passages

MODELS = {
    "retriever": "Retriever",
    "student_before": "Student before",
    "student_embedding_distilled": "Student embedding-distilled",
    "student_prefinetuned": "Student pre-finetuned",
    "student_after": "Student after",
}
SCORES = (
    "ndcg_at_10",
    "ndcg_at_10_interval",
    "recall_at_10",
    "recall_at_10_interval",
    "texts_per_s",
)
NUM_QUERIES = 5
NUM_RESULTS = 3
SAME = 1e-9


def model_titles(gate: dict[str, Json] | None) -> dict[str, str]:
    """Returns the models' titles; a gate says what the student after training is."""
    if gate is None or gate["weight"] == 1:
        return MODELS
    what = "its start" if gate["weight"] == 0 else f"{gate['weight']:g} of it"
    return {**MODELS, "student_after": f"Student after ({what})"}


def collect_test_sets(run: RunFolder) -> dict[str, dict[str, Json]]:
    """Returns scores, differences and chosen queries of each test set, in the recipe's order.

    Left out are those of other kinds than retrieval, and mteb's tasks, whose queries are not kept.
    """
    document = _read_results(run)
    gains = {
        row["dataset"]: row
        for row in sorted(document["differences"], key=lambda row: row["after_dimensions"])
        if (row["before"], row["after"]) == ("student_before", "student_after")
        and row["metric"] == "ndcg_at_10"
        and row["dataset"] in document["queries"]
    }
    test_sets: dict[str, dict[str, Json]] = {}
    for name, gain in gains.items():
        results = {
            row["model"]: row
            for row in sorted(document["results"], key=lambda row: row["dimensions"])
            if row["dataset"] == name and row["task_type"] == "Retrieval"
        }
        if not results:
            continue
        after = results["student_after"]
        test_sets[name] = {
            **{model: _scores(results[model], document) for model in MODELS if model in results},
            "difference": {"ndcg_at_10": gain["difference"], "interval": gain["interval"]},
            **{key: after[key] for key in ("split", "task", "num_queries", "num_passages")},
            "changes": _changes(results),
            "queries": _queries(results, document, run),
        }
    return test_sets


def collect_scores(run: RunFolder) -> dict[str, Json]:
    """Returns every test set's main score by model and dimensions, and their means by type.

    Empty where :func:`collect_test_sets` says more of all of them, each being retrieval at the same
    number of dimensions.
    """
    document = _read_results(run)
    rows: dict[tuple[Any, ...], dict[str, Json]] = {}
    for result in document["results"]:
        about = {key: result[key] for key in ("dataset", "task_type", "dimensions", "metric")}
        row, metric = rows.setdefault(tuple(about.values()), about), result["metric"]
        row[result["model"]] = {"score": result[metric], "interval": result[f"{metric}_interval"]}
    kinds = {(row["task_type"], row["dimensions"]) for row in rows.values()}
    searched = all(row["dataset"] in document["queries"] for row in rows.values())
    if not rows or (searched and len(kinds) == 1 and kinds.pop()[0] == "Retrieval"):
        return {}
    return {
        "models": [model for model in MODELS if any(model in row for row in rows.values())],
        "rows": list(rows.values()),
        "means": _means(document["averages"]),
    }


def _means(averages: list[dict[str, Any]]) -> list[dict[str, Json]]:
    """Returns a row for each kind of mean and number of dimensions, with each model's mean."""
    rows: dict[tuple[str, int], dict[str, Json]] = {}
    for name, key in (("mean of test sets", "mean_task"), ("mean of types", "mean_task_type")):
        for each in averages:
            size = each["dimensions"]
            row = rows.setdefault((name, size), {"name": name, "dimensions": size})
            row[each["model"]] = each[key]
    return list(rows.values())


def _read_results(run: RunFolder) -> dict[str, Any]:
    """Reads what the step `evaluation` wrote; no results until it is done."""
    evaluation = run.artifacts.get("evaluation")
    if evaluation is None:
        return {"results": [], "differences": []}
    results: dict[str, Any] = json.loads(evaluation.storage.read_bytes("results.json"))
    return results


def choose_queries(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Chooses queries, by their scores before and after, that show the difference honestly.

    The two that gained most, the two that lost most and one that stayed the same; where there are
    too few of a kind, the largest remaining differences fill the five.
    """
    gains = {query: after[query] - before[query] for query in sorted(before)}
    order = sorted(gains, key=lambda query: -gains[query])
    better = [query for query in order if gains[query] > SAME]
    worse = [query for query in reversed(order) if gains[query] < -SAME]
    same = [query for query in order if abs(gains[query]) <= SAME]
    chosen = [*better[:2], *worse[:2], *same[:1]]
    rest = [query for query in order if query not in chosen]
    chosen += sorted(rest, key=lambda query: -abs(gains[query]))[: NUM_QUERIES - len(chosen)]
    return sorted(chosen, key=lambda query: -gains[query])


def _scores(result: dict[str, Any], document: dict[str, Any]) -> dict[str, Json]:
    return {
        **{key: result[key] for key in SCORES},
        "num_parameters": document["num_parameters"][result["model"]],
    }


def _changes(results: dict[str, Any]) -> dict[str, int]:
    before = results["student_before"]["per_query"]["ndcg_at_10"]
    after = results["student_after"]["per_query"]["ndcg_at_10"]
    gains = [after[query] - before[query] for query in before]
    better, worse = sum(gain > SAME for gain in gains), sum(gain < -SAME for gain in gains)
    return {"better": better, "worse": worse, "unchanged": len(gains) - better - worse}


def _queries(
    results: dict[str, Any], document: dict[str, Any], run: RunFolder
) -> list[dict[str, Json]]:
    name = results["student_after"]["dataset"]
    models = ("student_before", "student_after")
    ndcg = {model: results[model]["per_query"]["ndcg_at_10"] for model in models}
    chosen = choose_queries(*ndcg.values())
    top = {
        model: {query: results[model]["top_results"][query][:NUM_RESULTS] for query in chosen}
        for model in models
    }
    ids = {id_ for of_model in top.values() for hits in of_model.values() for id_, _ in hits}
    texts = find_passages(run.artifacts.get("passages"), ids)
    if _is_the_corpus(name, run):
        texts = find_documents(run.artifacts.get("passages"), ids - texts.keys()) | texts
    judged = document["qrels"][name]

    def hit(query: str, id_: str, score: float) -> dict[str, Json]:
        passage = texts.get(id_, {"title": "", "text": ""})
        relevant = judged[query].get(id_, 0) > 0
        return {**passage, "id": id_, "score": score, "relevant": relevant}

    return [
        {
            "id": query,
            "query": document["queries"][name][query],
            "ndcg_at_10": {model: ndcg[model][query] for model in models},
            "top_results": {
                model: [hit(query, *match) for match in top[model][query]] for model in models
            },
        }
        for query in chosen
    ]


def _is_the_corpus(name: str, run: RunFolder) -> bool:
    """Says whether a test set searches the run's own corpus: its ids are then documents' names."""
    corpus, test_sets = run.recipe.get("corpus"), run.recipe.get("evaluation")
    if not isinstance(corpus, dict) or not isinstance(test_sets, list):
        return False
    named = [each for each in test_sets if isinstance(each, dict) and each.get("name") == name]
    return corpus.get("path") in [each.get("path") for each in named]
