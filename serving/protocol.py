"""The endpoint's words on the wire: OpenAI's embedding requests, search, and OpenAI's errors.

Clients written for OpenAI's API must work unchanged, so names, defaults and error bodies are
OpenAI's. What Tokay adds is optional: `input_type`, `task` and `truncate`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

Role = Literal["query", "passage"]
Tokens = list[StrictInt]


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
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of the response."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EmbeddingRequest(_Request):
    """`POST /v1/embeddings`."""

    input: StrictStr | list[StrictStr] | Tokens | list[Tokens] = Field(
        description="A text, texts, the token ids of a text (of this model's tokenizer, without"
        " special tokens), or lists of token ids"
    )
    model: str
    dimensions: int | None = Field(None, description="Keep the first so many, renormalised")
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    input_type: Role | None = Field(
        None, description="Apply the model's template for this role; null embeds the text as it is"
    )
    task: str | None = Field(None, description="The task in the query template")
    truncate: bool = Field(False, description="Cut texts over the token limit, instead of refusing")


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


class SearchRequest(_Request):
    """`POST /v1/search`."""

    query: StrictStr
    top_k: Annotated[int, Field(ge=1, le=1000)] = 10
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
