"""A recipe: everything a run is made from, checked key by key."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from actors.engine import EngineConfig, LlmConfig
from cluster.config import Config
from cluster.stages import StageResources
from pipelines.corpus.seeds import SeedsConfig
from pipelines.credentials import key_with_credentials
from pipelines.datasets.corpus import CorpusConfig
from pipelines.datasets.decontamination import DecontaminationConfig
from pipelines.datasets.test_sets import TestSet
from pipelines.encoders import EncoderConfig
from pipelines.fingerprints import NotFingerprinted
from pipelines.fret.corpus_queries import CorpusQueriesConfig
from pipelines.fret.cross_scores import CrossEncoderConfig
from pipelines.fret.fret import AUTO, FretConfig
from pipelines.fret.probe import ProbeConfig
from pipelines.fret.queries import QueriesConfig
from pipelines.fret.scores import ScoresConfig
from pipelines.mining.candidates import CandidatesConfig, check_index
from pipelines.mixture.config import MixtureConfig
from pipelines.names import RunName
from pipelines.recipe.sizes import ModelSize
from pipelines.recipe.variables import OWN
from pipelines.training.config import TrainingConfig
from pipelines.training.embedding_distillation import TEACHER, EmbeddingDistillation
from pipelines.training.gate import GateConfig
from pipelines.training.linear_adapter import LinearAdapterConfig
from pipelines.training.prefinetuning import Prefinetuning
from pipelines.training.student import StudentConfig

GpuUser = Literal["llm", "encoder", "index", "training"]


class Resources(Config):
    """Where the work runs. Nothing here changes a number."""

    llm: StageResources = StageResources(shards_in_flight=4)
    engine: EngineConfig = EngineConfig()
    encoder: StageResources = StageResources()
    index: StageResources = StageResources()
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


class Estimate(Config):
    """What `tokay plan` estimates with; measure your own and put it here."""

    prefill_tokens_per_s: float = Field(default=1000.0, gt=0, description="of one LLM actor")
    decode_tokens_per_s: float = Field(default=250.0, gt=0, description="of one LLM actor")
    engine_start_s: float = Field(default=60.0, ge=0, description="of one LLM actor, each step")
    passage_tokens: int | None = Field(
        default=None,
        ge=1,
        description="that the LLM reads of a passage, for a plan where the corpus or the LLM's"
        " tokenizer cannot be read; null: its tokens are then unknown",
    )
    query_tokens: float = Field(default=16.0, gt=0, description="that the LLM writes a query")
    scored_share: float = Field(
        default=1.0, gt=0, le=1, description="of the queries, after filters and the round trip"
    )
    actor_hour_usd: float = Field(default=0.0, ge=0, description="price of an LLM actor")


class Recipe(Config):
    """A graph of steps, by the parts that configure them."""

    name: RunName = Field(description="of the run; its folder too, where no other is given")
    corpus: CorpusConfig
    seeds: SeedsConfig = SeedsConfig()
    llm: LlmConfig
    # The prompts themselves are in the fingerprint, wherever they lie.
    prompts: Annotated[str | None, NotFingerprinted] = Field(
        default=None, description="a file like pipelines/fret/prompts.yaml; null: that one"
    )
    queries: QueriesConfig = QueriesConfig()
    corpus_queries: CorpusQueriesConfig | None = Field(
        default=None,
        description="titles and sentences of the corpus, which are queries beside the LLM's and"
        " cost none of its time; null: none",
    )
    retriever: EncoderConfig
    candidates: CandidatesConfig = CandidatesConfig()
    probe: ProbeConfig = ProbeConfig()
    scores: ScoresConfig = ScoresConfig()
    cross_encoder: CrossEncoderConfig | None = Field(
        default=None, description="the judge ce of fret.fusion; null: there is none"
    )
    fret: FretConfig = FretConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    mixture: MixtureConfig = MixtureConfig()
    student: StudentConfig
    embedding_distillation: EmbeddingDistillation | None = Field(
        default=None,
        description="a stage before all others, which teaches a student with fewer layers than its"
        " start the vectors of the retriever, or of a stronger encoder",
    )
    prefinetuning: Prefinetuning | None = Field(
        default=None, description="a stage before the fine-tuning, which then starts from it"
    )
    training: TrainingConfig = TrainingConfig()
    linear_adapter: LinearAdapterConfig | None = Field(
        default=None,
        description="after the training, one matrix behind the pooling learns the lists of"
        " mixture.fixed_passages, for queries and passages alike; null: none",
    )
    gate: GateConfig | None = Field(
        default=None,
        description="export the trained student only if held-out queries show it to be better than"
        " its start; null: export it in any case",
    )
    evaluation: tuple[TestSet, ...] = Field(
        default=(), description="the first is the headline; names must differ"
    )
    resources: Annotated[Resources, NotFingerprinted] = Resources()
    estimate: Annotated[Estimate, NotFingerprinted] = Estimate()
    sizes: Annotated[dict[str, ModelSize], NotFingerprinted] = Field(
        default={}, description="of models by name, for `tokay plan` where they are not on its disk"
    )
    variables: Annotated[tuple[str, ...], NotFingerprinted] = Field(
        default=(), description=f"of the environment, that ${{NAME}} may read beside {OWN}*"
    )

    @property
    def stages(self) -> "dict[str, EmbeddingDistillation | Prefinetuning | Recipe]":
        """The stages in their order, each with its mixture and training, by their keys' prefix."""
        stages = {
            "embedding_distillation.": self.embedding_distillation,
            "prefinetuning.": self.prefinetuning,
            "": self,
        }
        return {prefix: stage for prefix, stage in stages.items() if stage is not None}

    @property
    def trained_by(self) -> str:
        """The step whose encoder is the trained student."""
        return "linear_adapter" if self.linear_adapter else "training"

    @property
    def models(self) -> "dict[str, LlmConfig | EncoderConfig | CrossEncoderConfig]":
        """The models that a run loads, by the keys that name them."""
        stage = self.embedding_distillation
        teacher = {TEACHER: stage.teacher} if stage and stage.teacher else {}
        own = {"retriever": self.retriever, "student": self.student}
        asked = self.cross_encoder if self.fret.asks_cross_encoder else None
        return {"llm": self.llm, **own, **teacher, **({"cross_encoder": asked} if asked else {})}

    @property
    def _model_of_teacher(self) -> str | None:
        stage = self.embedding_distillation
        return (stage.teacher or self.retriever).model if stage else None

    @property
    def has_probe(self) -> bool:
        """Whether some queries are scored before all the others are."""
        return self.fret.fusion == AUTO or self.probe.sample is not None

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, tree: object) -> object:
        if key := key_with_credentials(tree):
            raise ValueError(
                f"{key}: the address holds credentials, and a recipe is kept in the run and shown"
                " in its report: leave them out, and give them to the machine by its environment"
            )
        return tree

    @model_validator(mode="after")
    def _index_for_its_gpus(self) -> "Recipe":
        check_index(self.candidates, self.resources.index)
        return self

    @model_validator(mode="after")
    def _judges_have_scores(self) -> "Recipe":
        judges = self.fret.fusion.split("+")
        if self.fret.asks_cross_encoder and self.cross_encoder is None:
            raise ValueError(
                f"fret.fusion: {self.fret.fusion} given, and there is no cross_encoder, whose"
                " scores ce are: set cross_encoder.model to a folder or hub id, or judge by others"
            )
        if self.candidates.lexical is None and not {"lex", "hybrid"}.isdisjoint(judges):
            raise ValueError(
                f"fret.fusion: {self.fret.fusion} given, and candidates.lexical is off, which lex"
                " and hybrid are the scores of: set candidates.lexical.weight to 0.25, or judge by"
                " ql, rc or sim"
            )
        return self

    @model_validator(mode="after")
    def _known_test_sets(self) -> "Recipe":
        retrieval = [each.name for each in self.evaluation if each.kind == "retrieval"]
        for key, stage in self.stages.items():
            validation = stage.training.validation
            name = validation.test_set if validation else None
            if name is not None and name not in retrieval:
                raise ValueError(
                    f"{key}training.validation.test_set: {name!r} is no retrieval set of the"
                    f" recipe's evaluation; accepted are {', '.join(retrieval) or 'none'}"
                )
        return self

    @model_validator(mode="after")
    def _linear_adapter_has_lists(self) -> "Recipe":
        if self.linear_adapter and self.mixture.fixed_passages is None:
            raise ValueError(
                "linear_adapter: given, and mixture.fixed_passages is off, whose lists it learns:"
                " set mixture.fixed_passages to {}, or leave linear_adapter out"
            )
        return self

    @model_validator(mode="after")
    def _student_is_not_its_teacher(self) -> "Recipe":
        teacher = self._model_of_teacher
        if teacher == self.student.model and _is_uncut(self.student):
            raise ValueError(
                f"embedding_distillation: given, and the student is its teacher {teacher}, uncut,"
                " so that there is nothing to learn: give student.layers, another model or"
                f" {TEACHER}, or set embedding_distillation to null"
            )
        return self

    @model_validator(mode="after")
    def _passages_can_stay(self) -> "Recipe":
        if self.mixture.fixed_passages is None:
            return self
        loss, fret, student = self.training.loss, self.fret, self.student
        given = "given, and with mixture.fixed_passages"
        if self.mixture.fret_weight == 0 or self.mixture.labelled:
            key = "labelled" if self.mixture.labelled else "fret_weight"
            raise ValueError(
                f"mixture.{key}: {given} FRet's lists alone are learnt from: leave it out"
            )
        if fret.negative != "all":
            raise ValueError(
                f"fret.negative: {fret.negative} {given} lists are learnt from: set it to all"
            )
        if fret.scores_pairs and fret.fusion != AUTO and fret.scale == "ranks":
            raise ValueError(
                f"fret.scale: ranks {given} a candidate that was not scored has no rank:"
                " set it to z-scores"
            )
        if loss.contrastive_weight or not loss.distillation_weight:
            raise ValueError(
                f"training.loss: contrastive_weight {loss.contrastive_weight:g} and"
                f" distillation_weight {loss.distillation_weight:g} {given} nothing but the order"
                " of lists is learnt: set the first to 0 and the second to 1"
            )
        whole = student.model == self.retriever.model and _is_uncut(student)
        teacher = self._model_of_teacher
        if self.prefinetuning or not (whole or teacher == self.retriever.model):
            remedy = (
                "leave prefinetuning out, which leaves it"
                if self.prefinetuning
                else f"set student.model to {self.retriever.model} and leave it as it is, or let it"
                " learn the retriever's vectors first by embedding_distillation: {}"
            )
            raise ValueError(
                f"student.model: {student.model} {given} it must begin in the retriever's space:"
                f" {remedy}"
            )
        return self

    @model_validator(mode="after")
    def _lists_are_learnt_from(self) -> "Recipe":
        loss, negative = self.training.loss, self.fret.negative
        has_fret = self.mixture.fret_weight != 0
        if has_fret and negative == "all" and loss.hard_negatives and loss.contrastive_weight:
            raise ValueError(
                "fret.negative: all given, and with training.loss.hard_negatives each scored"
                " candidate would be a negative: set that to false and"
                " training.loss.distillation_weight above 0, or fret.negative to lowest"
            )
        if has_fret and negative == "none" and not loss.contrastive_weight:
            raise ValueError(
                "fret.negative: none given, and training.loss.contrastive_weight 0 leaves nothing"
                " but lists to learn from: set fret.negative to all"
            )
        for key, stage in self.stages.items():
            if isinstance(stage, EmbeddingDistillation):
                continue
            if stage.mixture.labelled and not stage.training.loss.contrastive_weight:
                raise ValueError(
                    f"{key}training.loss.contrastive_weight: 0 given, and the sets of"
                    f" {key}mixture.labelled have no teacher scores to learn from: set it above 0"
                )
        return self

    @model_validator(mode="after")
    def _gate_is_not_the_headline(self) -> "Recipe":
        name = self.gate.test_set if self.gate else None
        if name is None:
            return self
        retrieval = [each.name for each in self.evaluation if each.kind == "retrieval"]
        if name not in retrieval:
            raise ValueError(
                f"gate.test_set: {name!r} is no retrieval set of the recipe's evaluation; accepted"
                f" are {', '.join(retrieval) or 'none'}"
            )
        if name == self.evaluation[0].name:
            raise ValueError(
                f"gate.test_set: {name!r} is the first set of the evaluation, its headline, and"
                " what chooses a model cannot measure it too: put another set first, or leave"
                " gate.test_set out"
            )
        for key, stage in self.stages.items():
            watched = stage.training.validation
            if watched and watched.patience and watched.test_set == name:
                raise ValueError(
                    f"gate.test_set: {name!r} chooses the best weights in"
                    f" {key}training.validation already, and would find them better than they are:"
                    " name another set in one of the two places"
                )
        return self

    @field_validator("evaluation")
    @classmethod
    def _named_apart(cls, test_sets: tuple[TestSet, ...]) -> tuple[TestSet, ...]:
        names = [test_set.name for test_set in test_sets]
        if len(set(names)) < len(names):
            raise ValueError(f"two test sets have one name: {names}; give each its own")
        return test_sets


def _is_uncut(student: StudentConfig) -> bool:
    """Says whether the student is its model as it is: whole, and with that model's own pooling."""
    cut = (student.layers, student.projection, student.pooling, student.bidirectional or None)
    return cut == (None,) * 4


class RunModels(BaseModel):
    """What an evaluation needs of a run's recipe; the other keys may be of another version."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    retriever: EncoderConfig
    student: StudentConfig
    embedding_distillation: Any = None
    prefinetuning: Any = None
