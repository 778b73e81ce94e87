from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from serving.api import create_app
from serving.corpus import Corpus
from serving.metrics import Metrics
from serving.protocol import RequestLimits
from serving.served_model import ServedModel

ModelFactory = Callable[..., ServedModel]


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu")


@pytest.fixture(scope="session")
def prompted(encoder: Encoder) -> Encoder:
    return Encoder(
        encoder.model,
        encoder.tokenizer,
        pooling=encoder.pooling,
        max_tokens=encoder.max_tokens,
        templates=PromptTemplates(
            query="task: {task} | query: {text}", passage="title: {title} | text: {text}"
        ),
    )


@pytest.fixture(scope="session")
def make_model() -> ModelFactory:
    def make(
        encoder: Encoder,
        *,
        corpus: Corpus | None = None,
        max_queued_tokens: int = 100_000,
        **limits: Any,
    ) -> ServedModel:
        return ServedModel(
            encoder,
            name="minilm",
            task="search result",
            batch_tokens=512,
            max_queued_tokens=max_queued_tokens,
            metrics=Metrics(),
            corpus=corpus,
            limits=RequestLimits(**limits),
        )

    return make


@pytest.fixture
def client(encoder: Encoder, make_model: ModelFactory) -> TestClient:
    return TestClient(create_app(make_model(encoder)))
