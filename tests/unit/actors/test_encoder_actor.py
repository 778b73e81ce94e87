"""Two actors with a copy of the encoder each, through real Ray."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from actors.encoder import Encoder
from actors.encoder_actor import EncoderActors
from cluster.errors import UserError
from pipelines.datasets.folders import LabelledDataset
from pipelines.evaluation.command import EvalOptions, _load
from pipelines.evaluation.evaluate import evaluate

MINILM = "embedded:all-MiniLM-L6-v2"
SHORT = EvalOptions(max_tokens=32)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.load(MINILM, max_tokens=32, device="cpu")


@pytest.mark.usefixtures("ray_session")
def test_two_actors_give_the_vectors_and_scores_of_one_encoder(encoder: Encoder) -> None:
    texts = [f"text {'very ' * (i % 40)} number {i}" for i in range(150)]
    columns = {
        "score": [float(i % 7) for i in range(75)],
        "sentence1": texts[:75],
        "sentence2": texts[75:],
    }
    data = LabelledDataset(name="s", kind="sts", columns={"test": columns})
    actors = EncoderActors(partial(_load, MINILM, SHORT), 2)
    try:
        assert actors.fingerprint == encoder.fingerprint
        assert (actors.dimensions, actors.num_parameters) == (384, encoder.num_parameters)
        np.testing.assert_allclose(
            actors.encode_queries(texts, task="x"),
            encoder.encode_queries(texts, task="x"),
            atol=1e-5,
        )
        titles = ["Title", None] * 75
        np.testing.assert_allclose(
            actors.encode_passages(texts, titles), encoder.encode_passages(texts, titles), atol=1e-5
        )
        counts: list[int] = []
        ours = evaluate(actors, data, on_progress=counts.append)
        alone = evaluate(encoder, data)
    finally:
        actors.close()
    assert sum(counts) == 150
    assert ours.mteb_score == pytest.approx(alone.mteb_score, abs=1e-4)


@pytest.mark.usefixtures("ray_session")
def test_model_that_does_not_load_is_the_users_error(tmp_path: Path) -> None:
    actors = EncoderActors(partial(_load, str(tmp_path), SHORT), 1)
    with pytest.raises(UserError, match=r"has no config\.json"):
        assert actors.fingerprint
    actors.close()


@pytest.mark.usefixtures("ray_session")
def test_more_actors_than_cores_are_refused() -> None:
    with pytest.raises(UserError, match=r"1000 actors: the cluster has \d+ cores"):
        EncoderActors(partial(_load, MINILM, SHORT), 1000)


def test_one_actor_starts_no_ray(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "test.tsv").write_text("1\ta\tb\n2\tc\td\n3\te\tf\n")
    code = (
        "import sys\n"
        "from pipelines.evaluation.command import EvalOptions, folder_test_set, run_eval\n"
        f"run_eval({{'m': '{MINILM}'}}, [folder_test_set('sts', '{tmp_path}')],\n"
        "    EvalOptions(as_json=True))\n"
        "sys.exit('ray' in sys.modules and __import__('ray').is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
