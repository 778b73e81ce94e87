"""The endpoint's application gives the vectors of the encoder that was trained."""

from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from actors.encoder import Encoder, PromptTemplates, add_projection, cut_layers
from actors.parity import DIFFICULT
from serving.api import create_app
from serving.metrics import Metrics
from serving.served_model import ServedModel

TASK = "search result"


@pytest.fixture(scope="module")
def trained() -> Encoder:
    student = cut_layers(Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu"), [0, 5])
    student.templates = PromptTemplates(
        query="task: {task} | query: {text}", passage="title: {title} | text: {text}"
    )
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
        texts = [each.text for each in DIFFICULT if each.role == role and each.text]
        expected = {
            None: trained.encode,
            "query": lambda them: trained.encode_queries(them, task=TASK),
            "document": trained.encode_passages,
        }[role](texts)[:, :dimensions]
        body = {
            "model": "student",
            "input": texts,
            "dimensions": dimensions,
            "truncate": True,
            **({"input_type": input_type} if input_type else {}),
            **({"task": TASK} if role == "query" else {}),
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
