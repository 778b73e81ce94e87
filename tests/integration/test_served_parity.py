"""The endpoint's application gives the vectors of the encoder that was trained."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from actors.encoder import Encoder
from actors.parity import DIFFICULT
from pipelines.training.layers import add_projection, cut_layers
from serving.api import create_app
from serving.metrics import Metrics
from serving.served_model import ServedModel

TASK = "search result"


@pytest.fixture(scope="module")
def trained() -> Encoder:
    encoder = Encoder.load(
        "embedded:all-MiniLM-L6-v2",
        device="cpu",
        query_template="task: {task} | query: {text}",
        passage_template="title: {title} | text: {text}",
    )
    student = cut_layers(encoder, [0, 5])
    add_projection(student, 128)
    return student


@pytest.fixture(scope="module")
def client(trained: Encoder, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder: Path = tmp_path_factory.mktemp("export")
    trained.save(folder, model_card="")
    served = ServedModel(
        Encoder.load(str(folder), device="cpu"),
        name="student",
        task="another task",
        batch_tokens=4096,
        max_queued_tokens=100_000,
        metrics=Metrics(),
    )
    return TestClient(create_app(served))


@pytest.mark.parametrize("dimensions", [128, 64, 32])
def test_endpoint_gives_the_trained_vectors(
    trained: Encoder, client: TestClient, dimensions: int
) -> None:
    asked = {None: None, "query": "query", "document": "passage"}
    for role, input_type in asked.items():
        difficult = [each for each in DIFFICULT if each.role == role and each.text]
        texts, titles = [each.text for each in difficult], [each.title or "" for each in difficult]
        expected = {
            None: trained.encode,
            "query": partial(trained.encode_queries, task=TASK),
            "document": partial(trained.encode_passages, titles=titles),
        }[role](texts)[:, :dimensions]
        body = {
            "model": "student",
            "input": texts,
            "dimensions": dimensions,
            "truncate": True,
            **({"input_type": input_type} if input_type else {}),
            **({"task": TASK} if role == "query" else {}),
            **({"title": titles} if role == "document" else {}),
        }
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        vectors = np.array([row["embedding"] for row in answer.json()["data"]])
        assert vectors.shape == (len(texts), dimensions)
        cosines = (vectors * expected).sum(1) / np.linalg.norm(expected, axis=1)
        assert cosines.min() > 0.9999


def test_endpoint_refuses_the_empty_text(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"model": "student", "input": ["a", ""]})
    assert answer.status_code == 400
