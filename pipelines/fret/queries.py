"""The step `queries`: the LLM reads each seed passage and writes a task and a query for it."""

import hashlib
from dataclasses import dataclass

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator

from actors.language_model import EngineOptions, LanguageModel, Sampling
from cluster.artifacts import Json
from cluster.errors import TooManyRejects
from cluster.stages import StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import StepContext
from pipelines.fret.prompts import QUERY_PROMPTS, STOP, choose_prompt, parse_query
from pipelines.records import PASSAGE, QUERY


class QueriesConfig(BaseModel):
    """How queries are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[str, ...] = Field(
        default=("question answering",), description="each query is of one, drawn by its id"
    )
    temperature: float = Field(default=0.5, ge=0)
    max_query_tokens: int = Field(default=40, ge=8)
    max_passage_tokens: int = Field(default=160, ge=16)
    seed: int = 0
    max_unusable_share: float = Field(
        default=0.5, ge=0, le=1, description="the step fails when more completions are no query"
    )

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [task for task in tasks if task not in QUERY_PROMPTS]
        if unknown or not tasks:
            raise ValueError(f"{unknown} have no prompt; accepted are {', '.join(QUERY_PROMPTS)}")
        return tasks


@dataclass(frozen=True, kw_only=True)
class WriteQueries:
    """Seed passages in, queries out; a completion that is no query keeps its row, and the reason.

    So the ids of everything after it do not depend on what an LLM happens to write.
    """

    config: QueriesConfig
    engine: EngineOptions
    resources: StageResources
    columns: tuple[str, ...] = tuple(PASSAGE.names)

    def load(self) -> StageFunction:
        """Starts the engine."""
        config = self.config
        llm = LanguageModel.load(self.engine)
        sampling = Sampling(
            temperature=config.temperature, max_tokens=config.max_query_tokens, stop=STOP
        )

        async def write(seeds: pa.Table) -> StageOutput:
            rows, prompts, tasks, ids = [], [], [], []
            passages = seeds.to_pylist()
            for passage in passages:
                id_ = query_id(passage["id"])
                prompt = choose_prompt(config.tasks, id_)
                text = llm.truncate(passage["text"], config.max_passage_tokens)
                prompts.append(prompt.render(passage["title"], text))
                tasks.append(prompt.task)
                ids.append(id_)
            # A query's randomness is its own, so a killed run writes the same queries again.
            draws = [int(id_[:8], 16) ^ config.seed for id_ in ids]
            answers = await llm.generate(prompts, sampling=sampling, seeds=draws)
            for passage, id_, task, answer in zip(passages, ids, tasks, answers, strict=True):
                query, reason = parse_query(answer.text, cut=answer.cut)
                rows.append(
                    {
                        "id": id_,
                        "seed_id": passage["id"],
                        "task": task,
                        "query": query,
                        "dropped_by": answer.error or reason,
                    }
                )
            metrics = {
                "num_unusable": sum(row["dropped_by"] is not None for row in rows),
                "num_prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
                "num_cached_tokens": sum(answer.num_cached_tokens for answer in answers),
                "num_written_tokens": sum(answer.num_tokens for answer in answers),
            }
            table = pa.Table.from_pylist(rows, schema=QUERY)
            return StageOutput(rows=table, metrics=metrics)

        return write


def query_id(seed_id: str) -> str:
    """Returns 16 hex digits that name the query of a seed passage."""
    return hashlib.sha256(f"query of {seed_id}".encode()).hexdigest()[:16]


def write_queries(
    config: QueriesConfig, engine: EngineOptions, resources: StageResources, context: StepContext
) -> dict[str, Json]:
    """Streams the seeds past the vLLM actors.

    Raises:
        TooManyRejects: The LLM writes more nonsense than the recipe allows.
    """
    stage = WriteQueries(config=config, engine=engine, resources=resources)
    metrics = run_stage(stage, context.input("seeds"), context)
    num_seeds = context.input("seeds").num_rows
    if metrics["num_unusable"] > config.max_unusable_share * num_seeds:
        raise TooManyRejects(
            f"{metrics['num_unusable']} of {num_seeds} completions are no query, and accepted is a"
            f" share of {config.max_unusable_share}: use another llm.model, a lower"
            " queries.temperature, or raise queries.max_unusable_share"
        )
    return metrics
