"""A whole run of five passages, made by the real runner and, where no engine is needed, by the real
steps; every figure of it can be worked by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from actors.text_encoder import TextEncoder
from cluster.artifacts import Artifact, Json, write_rejects, write_shards
from cluster.steps import Run, Step, StepContext
from cluster.storage import open_storage
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.test_sets import TestSet
from pipelines.evaluation.evaluation import run_evaluation
from pipelines.fingerprints import fingerprinted
from pipelines.fret.fret import FretConfig, make_fret
from pipelines.fret.judging import Judging
from pipelines.records import CANDIDATES, EXAMPLE, PASSAGE, QUERY, SCORES
from pipelines.report.write import write_report

# Relevant passage and the rank each model gives it: retriever, student before, student after.
JUDGED = {
    "e1": ("p0", 1, 3, 1),
    "e2": ("p1", 1, 2, 1),
    "e3": ("p2", 1, 1, 3),
    "e4": ("p3", 1, 1, 2),
    "e5": ("p4", 1, 1, 1),
    "e6": ("p0", 1, 3, 2),
    "e7": ("p1", 1, 1, 1),
}
PASSAGES = [f"p{number}" for number in range(5)]


class Silent:
    """A listener and a progress that say nothing."""

    def step_found(self, step: Step, artifact: Artifact) -> None: ...

    def step_begins(self, step: Step, resumed: bool) -> "Silent":
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None: ...

    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


class RankedPassages(TextEncoder):
    """An encoder that ranks the relevant passage of each query where the test wants it."""

    num_parameters = 14_000_000

    def __init__(self, place: int, decoration: str) -> None:
        self.vectors = {}
        for query, judged in JUDGED.items():
            others = [passage for passage in PASSAGES if passage != judged[0]]
            others.insert(judged[place] - 1, judged[0])
            vector = np.zeros(len(PASSAGES), np.float32)
            for rank, passage in enumerate(others):
                vector[int(passage[1])] = 1 - rank / 10
            self.vectors[f"question {query}{decoration}"] = vector / np.linalg.norm(vector)

    def encode_queries(self, queries: list[str], *, task: str) -> np.ndarray:
        return np.stack([self.vectors[query] for query in queries])

    def encode_passages(self, texts: list[str], titles: Any = None) -> np.ndarray:
        places = [int(text.removeprefix("text ")[0]) for text in texts]
        return np.eye(len(PASSAGES), dtype=np.float32)[places]


def build(
    folder: Path,
    by_passage: Any,
    until: str | None = None,
    decoration: str = "",
    labels: FretConfig | None = None,
) -> str:
    """Makes the run; `decoration` is put behind every text in it."""
    beir, uri = folder / "beir", str(folder / "run")
    _write_beir(beir, decoration)
    name = f"tiny{decoration}"
    recipe = {
        "name": name,
        "corpus": {"path": "corpus.jsonl"},
        "resources": {"llm": {"num_actors": 2}},
        "estimate": {"actor_hour_usd": 36.0},
        "evaluation": [{"name": f"questions{decoration}", "path": str(beir)}],
    }
    Run(uri, _steps(beir, decoration, by_passage, labels or FretConfig())).execute(
        Silent(), until=until
    )
    open_storage(uri).write_bytes("recipe.yaml", yaml.safe_dump(recipe).encode())
    return uri


def _steps(beir: Path, decoration: str, by_passage: Any, labels: FretConfig) -> list[Step]:
    def query(number: int) -> dict[str, Any]:
        return {
            "id": f"q{number}",
            "seed_id": f"p{number}",
            "task": f"question answering{decoration}",
            "query": ("how do I sort a list" if number == 3 else f"query {number}") + decoration,
            "dropped_by": f"query too short{decoration}" if number == 4 else None,
        }

    def rows(table: list[dict[str, Any]], schema: pa.Schema, per_shard: int = 3) -> Any:
        def work(context: StepContext) -> dict[str, Json]:
            write_shards(context.storage, pa.Table.from_pylist(table, schema), per_shard)
            return {}

        return work

    passages = [
        {
            "id": id_,
            "title": f"title {id_[1]}{decoration}",
            "text": f"text {id_[1]}{decoration}",
            "source": f"document {id_[1]}#1",
        }
        for id_ in PASSAGES
    ]

    def make_passages(context: StepContext) -> dict[str, Json]:
        rejects = [("a", "duplicate", "x"), ("b", f"empty{decoration}", ""), ("c", "duplicate", "")]
        write_rejects(context.storage, rejects)
        rows(passages, PASSAGE)(context)
        return {"num_documents": 4, "num_passages": 5}

    def write_queries(context: StepContext) -> dict[str, Json]:
        rows([query(number) for number in range(5)], QUERY)(context)
        return {"num_prompt_tokens": 1200.0, "num_cached_tokens": 200, "num_unusable": 1}

    scores = [
        _scored(query(0), 1, ["p0", "p1", "p2"], [-1, -2, -3], [-0.1, -0.2, -0.3])
        | {"lexical": [7.25, 0.5, 0.0]},
        _scored(query(1), 2, ["p2", "p1"], [-1, -2], [-0.1, -0.2]),
        _scored(query(2) | {"dropped_by": "round trip failed"}, 0, ["p0", "p1", "p2"], [], []),
        _scored(query(3), 1, ["p3", "p0", "p1"], [-1, -2, -3], [-0.3, -0.2, -0.1]),
        _scored(query(4), None, [], [], []),
    ]

    def fret(context: StepContext) -> dict[str, Json]:
        return make_fret(labels, Decontamination([f"How do I sort a list?{decoration}"]), context)

    def skip(context: StepContext) -> dict[str, Json]:
        """A probe that scored nothing: the teacher may not relabel."""
        rows([], SCORES)(context)
        return {"num_scored": 3, **Judging().metrics()}

    def model(context: StepContext) -> dict[str, Json]:
        context.storage.write_bytes("model/model.safetensors", b"weights")
        return {"num_parameters": 14_000_000, "dimensions": 384}

    def mixture(context: StepContext) -> dict[str, Json]:
        rows([], EXAMPLE)(context)
        return {"num_batches": 3, "num_examples": 2, "sets": {f"fret{decoration}": 2}}

    def training(context: StepContext) -> dict[str, Json]:
        lines = [
            {"batch": batch, "loss": loss, "learning_rate": 1e-4, "examples_per_s": 20.0}
            for batch, loss in enumerate((3.0, 2.5, 2.0))
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        context.storage.write_bytes("metrics.jsonl", content.encode())
        return {"final_loss": 2.0}

    def evaluation(context: StepContext) -> dict[str, Json]:
        test_set = TestSet.model_construct(  # a name that an earlier version took
            name=f"questions{decoration}", path=str(beir), task=f"search{decoration}"
        )
        models = ("retriever", "student_before", "student_after")
        encoders: Any = {
            model: RankedPassages(place, decoration) for place, model in enumerate(models, 1)
        }
        return run_evaluation((test_set,), encoders, context)

    auto = labels.fusion == "auto"
    judged, probe = ([], " probe") if auto else (by_passage(scores).to_pylist(), "")

    def step(name: str, inputs: str, work: Callable[[StepContext], dict[str, Json]]) -> Step:
        config = fingerprinted(labels) if name == "fret" else {}
        return Step(name=name, config=config, inputs=tuple(inputs.split()), work=work)

    return [
        step("passages", "", make_passages),
        step("seeds", "passages", rows(passages, PASSAGE)),
        step("queries", "seeds", write_queries),
        step("candidates", "queries passages", rows(scores, CANDIDATES)),
        *([step("probe", "candidates", skip)] if auto else []),
        step("scores", "candidates", rows(judged, SCORES)),
        step("fret", "candidates scores passages" + probe, fret),
        step("student", "", model),
        step("mixture", "fret student", mixture),
        step("training", "mixture student", training),
        step("export", "training", model),
        step("evaluation", "passages student export", evaluation),
    ]


def _scored(
    query: dict[str, Any], seed_rank: int | None, ids: list[str], ql: list[float], rc: list[float]
) -> dict[str, Any]:
    return {
        **query,
        "candidate_ids": ids,
        "similarities": [0.9 - place / 10 for place in range(len(ids))],
        "seed_rank": seed_rank,
        "query_likelihoods": ql,
        "relevances": rc,
    }


def _write_beir(beir: Path, decoration: str) -> None:
    (beir / "qrels").mkdir(parents=True)
    corpus = [{"_id": id_, "title": "", "text": f"text {id_[1]}{decoration}"} for id_ in PASSAGES]
    queries = [{"_id": id_, "text": f"question {id_}{decoration}"} for id_ in JUDGED]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        content = "\n".join(json.dumps(line) for line in lines)
        (beir / f"{name}.jsonl").write_text(content, encoding="utf-8")
    qrels = "\n".join(f"{query}\t{judged[0]}\t1" for query, judged in JUDGED.items())
    (beir / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}\n")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, by_passage: Any) -> str:
    """The URI of a finished run; tests that change it copy it first."""
    return build(tmp_path_factory.mktemp("finished"), by_passage)


@pytest.fixture(scope="session")
def report(finished_run: str) -> dict[str, Json]:
    """The report of the finished run."""
    return write_report(finished_run)


@pytest.fixture
def build_run(tmp_path: Path, by_passage: Any) -> Callable[..., str]:
    """Makes a run of one's own: `build_run(until=..., decoration=..., labels=...)`."""

    def made(**settings: Any) -> str:
        return build(tmp_path, by_passage, **settings)

    return made
