"""A recipe: everything a run is made from, read from YAML, checked key by key.

A recipe may name another one as its `base`, by name or file, and then holds only what differs.
"""

import difflib
import os
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.errors import UserError
from cluster.stages import StageResources
from pipelines.corpus.sources import CorpusConfig
from pipelines.corpus.steps import SeedsConfig
from pipelines.encoders import EncoderConfig
from pipelines.evaluation.steps import TestSet
from pipelines.fret.fusion import FretConfig
from pipelines.fret.language_models import EngineConfig, LlmConfig
from pipelines.fret.languages import language_code
from pipelines.fret.neighbours import CandidatesConfig, check_index
from pipelines.fret.prompts import WRITTEN, load_prompts
from pipelines.fret.queries import QueriesConfig
from pipelines.fret.scores import ScoresConfig
from pipelines.mixture.config import MixtureConfig, PrefinetuningMixtureConfig
from pipelines.sizes import ModelSize
from pipelines.student import StudentConfig
from pipelines.training.config import TrainingConfig

GpuUser = Literal["llm", "encoder", "index", "training"]


class ActorResources(BaseModel):
    """What each actor of a kind needs; see `cluster.stages.StageResources`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_actors: int = Field(
        default=1,
        ge=1,
        description="at most; the pool starts with one, with node_resource with all",
    )
    num_cpus: float = Field(default=1.0, ge=0, description="an actor")
    num_gpus: float = Field(default=0.0, ge=0, description="an actor")
    node_resource: str | None = Field(
        default=None, description="custom resource of the nodes that may have such actors"
    )
    shards_in_flight: int = Field(
        default=2, ge=1, description="shards at work at once in an actor, so that it never idles"
    )

    def stage(self) -> StageResources:
        """Returns it as the runner knows it."""
        return StageResources(**self.model_dump())


class Resources(BaseModel):
    """Where the work runs. Nothing here changes a number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    llm: ActorResources = ActorResources(shards_in_flight=4)
    engine: EngineConfig = EngineConfig()
    encoder: ActorResources = ActorResources()
    index: ActorResources = ActorResources()
    gpu_memory_gib: float | dict[GpuUser, float] | None = Field(
        default=None,
        description="of one GPU, as torch sees it (an L4 22, an L40S 44, an H100 79), or of one for"
        " each of llm, encoder, index and training; what cannot fit is refused. null: as the"
        " machine's own have, if it has any",
    )

    @model_validator(mode="after")
    def _a_gpu_for_each_part(self) -> "Resources":
        num_gpus, parts = self.llm.num_gpus, self.engine.tensor_parallel_size
        if num_gpus and parts > 1 and num_gpus != parts:
            raise ValueError(
                f"resources.llm.num_gpus: {num_gpus:g} given, and engine.tensor_parallel_size"
                f" {parts} cuts the LLM over {parts} GPUs; set num_gpus to {parts}"
            )
        return self


class Estimate(BaseModel):
    """What `tokay plan` reckons with; measure your own and put it here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill_tokens_per_s: float = Field(default=1000.0, gt=0, description="of one LLM actor")
    decode_tokens_per_s: float = Field(default=250.0, gt=0, description="of one LLM actor")
    engine_start_s: float = Field(default=60.0, ge=0, description="of one LLM actor, each step")
    query_tokens: float = Field(default=16.0, gt=0, description="that the LLM writes a query")
    scored_share: float = Field(
        default=1.0, gt=0, le=1, description="of the queries, after filters and the round trip"
    )
    actor_hour_usd: float = Field(default=0.0, ge=0, description="price of an LLM actor")


class Prefinetuning(BaseModel):
    """The stage before fine-tuning: pairs with in-batch negatives (Gecko, section 3.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mixture: PrefinetuningMixtureConfig
    training: TrainingConfig = TrainingConfig()


class Recipe(BaseModel):
    """A graph of steps, by the parts that configure them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    corpus: CorpusConfig
    seeds: SeedsConfig = SeedsConfig()
    llm: LlmConfig
    prompts: str | None = Field(
        default=None, description="a file like pipelines/fret/prompts.yaml; null: that one"
    )
    queries: QueriesConfig = QueriesConfig()
    retriever: EncoderConfig
    candidates: CandidatesConfig = CandidatesConfig()
    scores: ScoresConfig = ScoresConfig()
    fret: FretConfig = FretConfig()
    mixture: MixtureConfig = MixtureConfig()
    student: StudentConfig
    prefinetuning: Prefinetuning | None = Field(
        default=None, description="a stage before the fine-tuning, which then starts from it"
    )
    training: TrainingConfig = TrainingConfig()
    evaluation: tuple[TestSet, ...] = Field(
        default=(), description="the first is the headline; names must differ"
    )
    resources: Resources = Resources()
    estimate: Estimate = Estimate()
    sizes: dict[str, ModelSize] = Field(
        default={}, description="of models by name, for `tokay plan` where they are not on its disk"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, tree: object) -> object:
        if key := _key_with_credentials(tree):
            raise ValueError(
                f"{key}: the address holds credentials, and a recipe is kept in the run and shown"
                " in its report: leave them out, and give them to the machine by its environment"
            )
        return tree

    @model_validator(mode="after")
    def _known_prompts(self) -> "Recipe":
        prompts = load_prompts(self.prompts)
        unknown = [task for task in self.queries.tasks if task not in prompts.tasks]
        if unknown and self.queries.tasks != (WRITTEN,):
            raise ValueError(
                f"queries.tasks: {unknown} have no prompt; accepted are"
                f" {', '.join(prompts.tasks)}, or {WRITTEN} alone"
            )
        if self.queries.language:
            language_code(self.queries.language)
        if self.scores.relevance not in prompts.scores:
            raise ValueError(
                f"scores.relevance: {self.scores.relevance!r} has no prompt; accepted are"
                f" {', '.join(prompts.scores)}"
            )
        return self

    @model_validator(mode="after")
    def _index_for_its_gpus(self) -> "Recipe":
        check_index(self.candidates, self.resources.index.stage())
        return self

    @model_validator(mode="after")
    def _known_test_sets(self) -> "Recipe":
        stages = {"training": self.training}
        if self.prefinetuning:
            stages["prefinetuning.training"] = self.prefinetuning.training
        retrieval = [each.name for each in self.evaluation if each.kind == "retrieval"]
        for key, training in stages.items():
            name = training.validation.test_set if training.validation else None
            if name is not None and name not in retrieval:
                raise ValueError(
                    f"{key}.validation.test_set: {name!r} is no retrieval set of the recipe's"
                    f" evaluation; accepted are {', '.join(retrieval) or 'none'}"
                )
        return self

    @field_validator("evaluation")
    @classmethod
    def _named_apart(cls, test_sets: tuple[TestSet, ...]) -> tuple[TestSet, ...]:
        names = [test_set.name for test_set in test_sets]
        if len(set(names)) < len(names):
            raise ValueError(f"two test sets have one name: {names}; give each its own")
        return test_sets


_CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)


def _key_with_credentials(value: object, key: str = "") -> str | None:
    """Returns the key of the first address with a user's name or a password in it."""
    if isinstance(value, str):
        return key if _CREDENTIALS.match(value) else None
    inner: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    parts = (_key_with_credentials(each, f"{key}.{part}".lstrip(".")) for part, each in inner)
    return next(filter(None, parts), None)


def load_recipe(
    source: str | Path, settings: list[str] | None = None, *, keep_unset: bool = False
) -> Recipe:
    """Reads a recipe by its file, or by the name of one that comes with Tokay.

    Args:
        source: A YAML file, or a name such as `laptop`.
        settings: Overrides, each `path.to.key=value`; the value is YAML.
        keep_unset: Leave a ${NAME} that the environment lacks as it stands: a plan can be made
            without the place.

    Raises:
        UserError: No such recipe, not YAML, an unknown key or a value that is not accepted.
    """
    tree = read_keys(source, keep_unset=keep_unset)
    for setting in settings or []:
        _set(tree, setting)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"recipe {source}: {_explain(error)}") from error


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with Tokay."""
    folder = Path(str(files("pipelines") / "recipes"))
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_keys(
    source: str | Path, above: tuple[Path, ...] = (), *, keep_unset: bool = False
) -> dict[str, Any]:
    """Reads a recipe's keys over those of its `base`, unchecked."""
    path = Path(source)
    if not path.is_file() and "/" not in str(source) and not path.suffix:
        path = Path(str(files("pipelines") / "recipes" / f"{source}.yaml"))
    if path in above:
        raise UserError(f"recipe {path} is its own base, by {' and '.join(map(str, above))}")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(_VARIABLE.sub(lambda found: _variable(found, path, keep_unset), text))
    except FileNotFoundError as error:
        known = ", ".join(recipe_names())
        raise UserError(
            f"recipe {str(source)!r} does not exist: give a YAML file or one of {known}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} is not a mapping of keys: see {', '.join(recipe_names())}")
    if tree.get("prompts"):
        tree["prompts"] = _beside(path, tree["prompts"])
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = read_keys(_beside(path, base), (*above, path), keep_unset=keep_unset)
    return _over(tree, below)


# A place that differs from one machine to the next: ${NAME}, from the environment.
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def _variable(found: re.Match[str], path: Path, keep_unset: bool) -> str:
    name = found[1]
    value = os.environ.get(name) or (found[0] if keep_unset else None)
    if not value:
        raise UserError(
            f"recipe {path.stem} reads ${{{name}}}: set it in the environment, {name}=..."
        )
    return value


def _beside(path: Path, name: str) -> str:
    """Returns a file that a recipe names: beside the recipe, or as it stands."""
    beside = path.parent / str(name)
    return str(beside) if beside.is_file() else str(name)


def _over(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in tree.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _over(value, below)
        merged[key] = value
    return merged


def _set(tree: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {setting!r}: write path.to.key=value")
    *parents, last = key.strip().split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list):
            node = node[_index(parent, node, setting)]
        else:
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise UserError(f"--set {setting!r}: {parent} is a value and holds no keys")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {setting!r}: the value is not YAML") from error
    if isinstance(node, list):
        node[_index(last, node, setting)] = parsed
    else:
        node[last] = parsed


def _index(text: str, node: list[Any], setting: str) -> int:
    if not text.isdecimal() or int(text) >= len(node):
        raise UserError(f"--set {setting!r}: {text!r} is no place in a list of {len(node)}")
    return int(text)


def _explain(error: ValidationError) -> str:
    """Says of the first mistakes: the key, what was given, what is accepted."""
    lines = []
    for mistake in error.errors()[:3]:
        key = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            accepted = _accepted_keys(mistake["loc"][:-1])
            near = difflib.get_close_matches(str(mistake["loc"][-1]), accepted, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(accepted)}"
            lines.append(f"unknown key {key}; {hint}")
        elif mistake["type"] == "missing":
            lines.append(f"key {key} is missing")
        elif mistake["type"] == "value_error" and isinstance(mistake["input"], dict):
            # A mistake of several keys, which names them.
            lines.append(mistake["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{key}: {mistake['input']!r} given; {mistake['msg']}")
    return "; ".join(lines)


def _accepted_keys(path: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        arguments = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        model = arguments[0] if arguments else annotation
    return sorted(model.model_fields)
