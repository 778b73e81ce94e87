"""The endpoint's words on the wire: OpenAI's embedding requests, search, and OpenAI's errors.

Clients written for OpenAI's API must work unchanged, so names, defaults and error bodies are
OpenAI's. What Tokay adds is optional: `input_type`, `task`, `title` and `truncate`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, StrictBool, StrictInt, StrictStr

from cluster.config import Config
from cluster.errors import excerpt

Role = Literal["query", "passage"]
INPUT_FORMS = (
    "input must be a string, a list of strings, a list of token ids, or a list of lists of token"
    " ids"
)
_MESSAGE_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may hold.

    Attributes:
        max_bytes: Of its body, before it is parsed.
        max_texts: In it; 2048 is OpenAI's limit.
        max_characters: Of its texts together, in the model's template.
        token_ids: Whether texts may come as ids of the model's own tokenizer.
    """

    max_bytes: int = 8 * 2**20
    max_texts: int = 2048
    max_characters: int = 2 * 2**20
    token_ids: bool = False


class ApiError(Exception):
    """A refusal in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        # A refusal may quote what was given, which may be as long as a request.
        super().__init__(excerpt(message, _MESSAGE_CHARACTERS))
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def _check_input(given: Any) -> Any:
    """Accepts OpenAI's four forms; pydantic would note every wrong item of a million."""
    if type(given) is str:
        return given
    if type(given) is list:
        kinds = {type(item) for item in given}
        if kinds == {list}:
            kinds = {type(item) for row in given for item in row}
            if kinds <= {int}:
                return given
        elif kinds in (set(), {str}, {int}):
            return given
    raise ValueError(INPUT_FORMS)


def _check_title(given: Any) -> Any:
    """Accepts a string or a list of strings, in one pass as above."""
    if (
        given is None
        or type(given) is str
        or (type(given) is list and {*map(type, given)} <= {str})
    ):
        return given
    raise ValueError("give a string, or a list with one string for each input")


class EmbeddingRequest(Config):
    """`POST /v1/embeddings`."""

    input: Annotated[
        Any,
        PlainValidator(
            _check_input, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ] = Field(
        description="A text or texts; where the operator allows it, the token ids of a text (of"
        " this model's tokenizer, without special tokens), or lists of token ids"
    )
    model: StrictStr
    dimensions: StrictInt | None = Field(
        None, description="Keep the first ones, this many, renormalised"
    )
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    input_type: Role | None = Field(
        None, description="Apply the model's template for this role; null embeds the text as it is"
    )
    task: str | None = Field(None, description="The task in the query template")
    title: Annotated[
        Any, PlainValidator(_check_title, json_schema_input_type=str | list[str] | None)
    ] = Field(
        None,
        description="The title of the passage, or of each passage in a list; empty for none. A"
        " template without a place for it gets it in front of the text",
    )
    truncate: StrictBool | None = Field(
        None, description="Cut texts over the token limit, instead of refusing"
    )


class Embedding(BaseModel):
    """One vector: floats, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that the model read, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """The served model; the fields after `owned_by` are Tokay's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tokay"] = "tokay"
    dimensions: int
    max_tokens: int
    num_passages: int


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class SearchRequest(Config):
    """`POST /v1/search`."""

    query: StrictStr
    top_k: Annotated[StrictInt, Field(ge=1, le=1000)] | None = None
    task: str | None = Field(None, description="The task in the query template")


class Hit(BaseModel):
    """One passage; `score` is the cosine with the query."""

    id: str
    title: str
    text: str
    score: float


class SearchResponse(BaseModel):
    """The nearest passages, best first."""

    results: list[Hit]
    model: str
    usage: Usage
