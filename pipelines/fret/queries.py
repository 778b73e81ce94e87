"""The step `queries`: the LLM reads each seed passage and writes a task and a query for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
from pydantic import Field

from actors.engine import EngineConfig, LlmConfig
from actors.language_model import LanguageModel, Sampling
from cluster.artifacts import Json
from cluster.config import Config
from cluster.stages import Limit, Stage, StageFunction, StageOutput, run_stage
from cluster.steps import Step, StepContext
from pipelines.corpus.held_out import HELD_OUT
from pipelines.fingerprints import NotFingerprinted, fingerprinted
from pipelines.fret.languages import OF_PASSAGE, is_other_language, language_code, language_of
from pipelines.fret.prompts import (
    STOP,
    Prompts,
    QueryPrompts,
    load_prompts,
    require_plain,
    unfit,
)
from pipelines.ids import query_id
from pipelines.records import QUERY, SEED

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "the LLM writes queries"


class QueriesConfig(Config):
    """How queries are written."""

    tasks: tuple[str, ...] = Field(
        default=("question answering",),
        min_length=1,
        description="each query is of one, drawn uniformly by its id; ['written']: the LLM names"
        " the task itself, as in the paper, which takes a larger model",
    )
    queries_per_seed: int = Field(default=1, ge=1)
    language: str | None = Field(
        default=None,
        description="asked for in the prompt, as 'German', or 'passage' for that of each passage;"
        " queries that are clearly of another language are dropped; null: not spoken of",
    )
    chat: bool = Field(
        default=False,
        description="put the prompt, with its instruction, into the model's chat template",
    )
    temperature: float = Field(default=0.5, ge=0, le=2, description="vLLM takes 2 at most")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_query_tokens: int = Field(default=40, ge=8)
    max_passage_tokens: int = Field(default=160, ge=16)
    seed: int = 0
    max_unusable_share: Annotated[float, NotFingerprinted] = Field(
        default=0.5, ge=0, le=1, description="the step fails when more completions are no query"
    )


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    prompts = load_prompts(recipe.prompts)

    def write_queries(context: StepContext) -> dict[str, Json]:
        stage = WriteQueries(
            config=recipe.queries,
            prompts=query_prompts(recipe.queries, prompts),
            llm=recipe.llm,
            engine=recipe.resources.engine,
            resources=recipe.resources.llm,
        )
        seeds = context.input("seeds")
        limit = Limit(
            share=recipe.queries.max_unusable_share,
            num_all=seeds.num_rows * recipe.queries.queries_per_seed,
            remedy="use another llm.model, a lower queries.temperature, or raise"
            " queries.max_unusable_share",
        )
        return run_stage(stage, seeds, context, limit)

    return Step(
        name="queries",
        config={
            "llm": fingerprinted(recipe.llm),
            "queries": fingerprinted(recipe.queries),
            "prompts": prompts.model_dump(
                mode="json", exclude={"scores": True, "tasks": {"__all__": {"judged"}}}
            ),
        },
        inputs=("seeds",),
        work=write_queries,
    )


@dataclass(frozen=True, kw_only=True)
class WriteQueries(Stage):
    """Seed passages in, queries out; a completion that is no query keeps its row, and the reason.

    So the ids of everything after it do not depend on what an LLM happens to write.
    """

    config: QueriesConfig
    prompts: QueryPrompts
    llm: LlmConfig
    engine: EngineConfig
    columns: tuple[str, ...] = tuple(SEED.names)

    @property
    def rows_per_row(self) -> int:
        """Queries a seed."""
        return self.config.queries_per_seed

    def load(self) -> StageFunction:
        """Starts the engine."""
        config, ask = self.config, self.prompts
        asked = None if config.language in (None, OF_PASSAGE) else language_code(config.language)
        llm = LanguageModel.load(self.llm, self.engine)
        require_plain(ask.prompts, llm)
        sampling = Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_query_tokens,
            stop=STOP,
        )

        async def write(seeds: pa.Table) -> StageOutput:
            rows: list[dict[str, Any]] = []
            prompts, texts = [], []
            for passage in seeds.to_pylist():
                text = llm.truncate(passage["text"], config.max_passage_tokens)
                for number in range(config.queries_per_seed):
                    id_ = query_id(passage["id"], number)
                    task = ask.task(id_)
                    prompts.append(ask.render(task, passage["title"], text))
                    texts.append(f"{passage['title']} {passage['text']}")
                    row = {"id": id_, "seed_id": passage["id"], "task": task}
                    rows.append(row | {"dropped_by": HELD_OUT if passage["held_out"] else None})
            # A query's randomness is its own, so a killed run writes the same queries again.
            draws = [int(row["id"][:8], 16) ^ config.seed for row in rows]
            answers = await llm.generate(prompts, sampling=sampling, seeds=draws, chat=config.chat)
            for row, text, answer in zip(rows, texts, answers, strict=True):
                task, query, reason = ask.parse(row["task"], answer.text, cut=answer.cut)
                reason = answer.error or reason or unfit(query, text)
                code = language_of(text) if config.language == OF_PASSAGE else asked
                if reason is None and code and is_other_language(query, code):
                    reason = "wrong language"
                row |= {"task": task, "query": query, "dropped_by": reason or row["dropped_by"]}
            unusable = [
                (row["id"], row["dropped_by"], row["query"])
                for row in rows
                if row["dropped_by"] not in (None, HELD_OUT)
            ]
            metrics = {
                "num_unusable": len(unusable),
                "num_held_out": sum(row["dropped_by"] == HELD_OUT for row in rows),
                "num_prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
                "num_cached_tokens": sum(answer.num_cached_tokens for answer in answers),
                "num_written_tokens": sum(answer.num_tokens for answer in answers),
            }
            table = pa.Table.from_pylist(rows, schema=QUERY)
            return StageOutput(rows=table, unusable=unusable, metrics=metrics)

        return write


def query_prompts(config: QueriesConfig, prompts: Prompts) -> QueryPrompts:
    """Returns how a recipe asks for queries."""
    return QueryPrompts(
        prompts=prompts, tasks=config.tasks, language=config.language, instruct=config.chat
    )
