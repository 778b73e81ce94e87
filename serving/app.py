"""The Ray Serve application: replicas that each hold the encoder, the corpus and the HTTP routes.

One deployment, not an ingress in front of an encoder: a hop between two deployments costs a second
Ray call and a copy of every vector for each request, and on a small machine a second process that
competes with the encoder for cores. More traffic is met by more replicas.
"""

from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from cluster.config import Config
from serving.protocol import RequestLimits

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

# Above what the token budget admits, so that overload is answered by our 429 and never by a queue
# in Serve's router, which knows nothing of tokens.
_MAX_ONGOING_REQUESTS = 4096
# Beyond those, small requests may queue in each proxy; beyond this, Serve answers 503.
_MAX_QUEUED_REQUESTS = 1024
_LIMITS = RequestLimits()


class ServeOptions(Config):
    """What `tokay serve` and a Serve configuration's `args` accept."""

    model: str = Field(description="Model folder, hub id, or embedded:NAME")
    name: str = Field(min_length=1, description="What requests call the model")
    corpus: str | None = Field(None, description="What /v1/search searches; see serving.corpus")
    task: str = Field("search result", description="The task of queries that name none")
    max_tokens: int = Field(
        8192, ge=8, description="Longer texts are refused; a model may allow less"
    )
    dtype: str = Field("float32", pattern="^(float32|bfloat16|float16)$")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")
    replicas: int = Field(1, ge=1)
    cpus_per_replica: float = Field(1, ge=0, description="Also the encoder's number of threads")
    gpus_per_replica: float = Field(0, ge=0)
    batch_tokens: int = Field(
        2048, ge=1, description="Tokens taken from the queue at once; 16384 suits a GPU"
    )
    max_queued_tokens: int = Field(
        262_144, ge=1, description="Tokens that may wait in a replica; beyond it, 429"
    )
    max_request_bytes: int = Field(
        _LIMITS.max_bytes, ge=1024, description="Bytes of a request's body; beyond it, 413"
    )
    max_texts: int = Field(_LIMITS.max_texts, ge=1, description="Texts in one request")
    max_characters: int = Field(
        _LIMITS.max_characters,
        ge=1,
        description="Characters of a request's texts, in the model's template; beyond it, 413",
    )
    allow_token_ids: bool = Field(
        False, description="Take token ids of the model's own tokenizer; others give wrong vectors"
    )
    allowed_hosts: frozenset[str] | None = Field(
        None, description="Host names by which requests may address the server; null: any"
    )
    api_key_sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the key that requests must send: printf %s KEY | sha256sum",
    )


class TokayServer:
    """One replica: loads everything once, then hands Serve the HTTP application."""

    def __init__(self, options: ServeOptions) -> None:
        from ray import serve

        from actors.encoder import Encoder
        from serving.corpus import load_corpus
        from serving.guard import Access
        from serving.metrics import Metrics
        from serving.served_model import ServedModel

        self.access = Access(hosts=options.allowed_hosts, key_sha256=options.api_key_sha256)
        encoder = Encoder.load(
            options.model,
            max_tokens=options.max_tokens,
            dtype=options.dtype,
            device="cuda" if options.gpus_per_replica else "cpu",
            trust_remote_code=options.trust_remote_code,
        )
        self.model = ServedModel(
            encoder,
            name=options.name,
            task=options.task,
            batch_tokens=options.batch_tokens,
            max_queued_tokens=options.max_queued_tokens,
            metrics=Metrics(serve.get_replica_context().replica_id.unique_id),
            corpus=load_corpus(options.corpus, encoder) if options.corpus else None,
            limits=RequestLimits(
                max_bytes=options.max_request_bytes,
                max_texts=options.max_texts,
                max_characters=options.max_characters,
                token_ids=options.allow_token_ids,
            ),
        )

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Called by Serve after the constructor."""
        from serving.api import create_app

        return create_app(self.model, self.access)


def build(options: ServeOptions) -> "Application":
    """Builds the application; the entry point of a Serve configuration (`serving.app:build`)."""
    from ray import serve

    deployment: Any = serve.deployment(
        name="server",
        num_replicas=options.replicas,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        max_queued_requests=_MAX_QUEUED_REQUESTS,
        ray_actor_options={
            "num_cpus": options.cpus_per_replica,
            "num_gpus": options.gpus_per_replica,
            # OpenMP's threads spin while they wait for each other. Where the proxy, the clients or
            # another process want the same cores, that made a query 30 times as slow.
            "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "passive"}},
        },
    )(serve.ingress()(TokayServer))
    return cast("Application", deployment.bind(options))
