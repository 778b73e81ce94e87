"""What stands for models in `benchmarks/scale.py`: stages that return seeded numbers."""

import hashlib
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from actors.encoder_templates import PromptTemplates
from cluster.artifacts import Artifact
from cluster.stages import Stage, StageFunction, StageOutput, run_stage
from cluster.steps import Step, StepContext
from pipelines.ids import query_id
from pipelines.recipe.recipe import Recipe
from pipelines.records import CANDIDATES, QUERY, SCORES

SEED = 0
QUERY_WORDS = 8
NUM_SCORED = 20
DIMENSIONS = 384


class SeededEncoder:
    """Seeded vectors, as an encoder gives them: of a text alone, and of a query near its seed's."""

    templates = PromptTemplates()
    _pool = np.random.default_rng(SEED).standard_normal(2**20 + DIMENSIONS, np.float32)

    def format_passages(self, texts: Sequence[str], titles: Sequence[str | None]) -> list[str]:
        pairs = zip(texts, titles, strict=True)
        return [self.templates.format_passage(text, title) for text, title in pairs]

    def prepare(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float32 ``[texts, dimensions]``, unit length.

        A query's is that of the text whose key it ends with, and half as much of its own.
        """
        own = [text_key(text) for text in texts]
        ends = [re.search(r" ([0-9a-f]{16})$", text) for text in texts]
        keys = [end[1] if end else key for key, end in zip(own, ends, strict=True)]
        vectors = self._drawn(keys) + 0.5 * self._drawn(own)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    encode_prepared = encode

    def _drawn(self, keys: Sequence[str]) -> np.ndarray:
        places = np.array([divmod(int(key, 16), 2**32) for key in keys]) % 2**20
        first, second = (
            self._pool[places[:, side, None] + np.arange(DIMENSIONS)] for side in (0, 1)
        )
        return first + second


def text_key(text: str) -> str:
    """Returns 16 hexadecimal digits that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_query(title: str, text: str) -> str:
    """Returns words of a passage, and the key of what the encoder reads of it."""
    key = text_key(SeededEncoder.templates.format_passage(text, title))
    return " ".join([*random.Random(key).sample(text.split(), QUERY_WORDS), key])


@dataclass(frozen=True, kw_only=True)
class WithSeededEncoder(Stage):
    """A stage of the product that is given the seeded encoder to load."""

    stage: Stage

    @property
    def rows_per_row(self) -> int:
        return self.stage.rows_per_row

    def load(self) -> StageFunction:
        module = sys.modules[type(self.stage).__module__]
        with mock.patch.object(module, "load_encoder", lambda *_, **__: SeededEncoder()):
            return self.stage.load()


@dataclass(frozen=True, kw_only=True)
class SeededQueries(Stage):
    """Seed passages in, a query of each out."""

    columns: tuple[str, ...] = ("id", "title", "text")

    def load(self) -> StageFunction:
        async def write(seeds: pa.Table) -> StageOutput:
            rows = [
                {
                    "id": query_id(seed["id"]),
                    "seed_id": seed["id"],
                    "task": "question answering",
                    "query": write_query(seed["title"], seed["text"]),
                }
                for seed in seeds.to_pylist()
            ]
            return StageOutput(rows=pa.Table.from_pylist(rows, schema=QUERY))

        return write


@dataclass(frozen=True, kw_only=True)
class DrawnCandidates(Stage):
    """Queries in, with neighbours out that are drawn from some shards of the passages."""

    passages: Artifact
    columns: tuple[str, ...] = tuple(QUERY.names)

    def load(self) -> StageFunction:
        shards = self.passages.shards

        async def find(queries: pa.Table) -> StageOutput:
            rows = queries.to_pylist()
            draw = np.random.default_rng(int(rows[0]["id"][:16], 16))
            numbers = draw.choice(len(shards), min(4, len(shards)), replace=False)
            read = [shards[int(number)] for number in numbers]
            ids = np.concatenate(
                [self.passages.shard(each, ["id"])["id"].to_numpy() for each in read]
            )
            for row in rows:
                others = draw.choice(ids, min(NUM_SCORED, len(ids)), replace=False)
                others = others[others != row["seed_id"]][: NUM_SCORED - 1]
                similarities = np.sort(draw.random(1 + len(others), np.float32))[::-1]
                row |= {
                    "candidate_ids": [row["seed_id"], *others],
                    "similarities": similarities.tolist(),
                    "lexical": [],
                    "hybrid": [],
                    "seed_rank": 1,
                }
            return StageOutput(rows=pa.Table.from_pylist(rows, schema=CANDIDATES))

        return find


@dataclass(frozen=True, kw_only=True)
class SeededScores(Stage):
    """Passages with their queries in, drawn scores of each pair out."""

    columns: tuple[str, ...] = ("passage_id", "query_ids")

    def load(self) -> StageFunction:
        async def score(passages: pa.Table) -> StageOutput:
            rows = passages.to_pylist()
            for row in rows:
                num = len(row["query_ids"])
                draw = np.random.default_rng(int(row["passage_id"][:16], 16))
                ql, rc = (draw.standard_normal(num, np.float32).tolist() for _ in range(2))
                row |= {"query_likelihoods": ql, "relevances": rc, "errors": [None] * num}
            metrics = {"num_pairs": sum(len(row["query_ids"]) for row in rows)}
            return StageOutput(rows=pa.Table.from_pylist(rows, schema=SCORES), metrics=metrics)

        return score


STAND_INS: dict[str, Callable[[Stage], Stage]] = {
    "queries": lambda stage: SeededQueries(resources=stage.resources),
    "embeddings": lambda stage: with_seeded_encoder(stage),
    "candidates": lambda stage: with_seeded_encoder(stage),
    "scores": lambda stage: SeededScores(resources=stage.resources),
}


def with_seeded_encoder(stage: Stage) -> Stage:
    return WithSeededEncoder(stage=stage, columns=stage.columns, resources=stage.resources)


def module_of(step: Step) -> Any:
    """Returns the module in which the work of a step is written."""
    return sys.modules[step.work.__module__]


def seeded(step: Step) -> Step:
    """Returns a step that runs a stand-in in place of its stage; one without a model as it is.

    Its configuration says so, so that no run of the product takes its artifact for its own.
    """
    if step.name not in STAND_INS:
        return step

    def run(stage: Stage, *rest: Any, **named: Any) -> Any:
        return run_stage(STAND_INS[step.name](stage), *rest, **named)

    def work(context: StepContext) -> Any:
        with mock.patch.object(module_of(step), "run_stage", run):
            return step.work(context)

    return replace(step, work=work, config={**step.config, "benchmark": "seeded"})


def drawn(step: Step, recipe: Recipe) -> Step:
    """Returns the step `candidates` without its search."""

    def work(context: StepContext) -> Any:
        stage = DrawnCandidates(
            passages=context.input("embeddings"), resources=recipe.resources.encoder
        )
        return run_stage(stage, context.input("queries"), context)

    return replace(step, work=work, config={**step.config, "benchmark": "drawn"})
