"""No key or password gets into a run's files or into what is printed."""

from pathlib import Path

import pytest

from cluster.errors import StorageError, UserError
from cluster.storage import open_storage
from pipelines.recipe.read import load_recipe


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("corpus.path", "s3://KEY:SECRET@bucket/corpus"),
        ("corpus.path", "S3://SECRET@bucket/corpus"),
        ("evaluation.0.path", "s3://KEY:SECRET@bucket/test-set"),
        ("llm.model", "https://user:SECRET@hub.example/org/model"),
        ("prompts", "https://:SECRET@example.org/prompts.yaml"),
    ],
)
def test_recipe_with_credentials_in_an_address_is_refused_and_they_are_not_repeated(
    key: str, address: str
) -> None:
    with pytest.raises(UserError, match=rf"{key}: .*credentials.*environment") as error:
        load_recipe("laptop", [f"{key}={address}"])
    assert "SECRET" not in str(error.value) and "\n" not in str(error.value)


def test_credentials_that_a_variable_brings_are_refused_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOKAY_CORPUS", "s3://KEY:SECRET@bucket/corpus")
    (tmp_path / "mine.yaml").write_text("base: laptop\ncorpus: {path: '${TOKAY_CORPUS}'}\n")
    with pytest.raises(UserError, match=r"corpus\.path: .*credentials") as error:
        load_recipe(tmp_path / "mine.yaml")
    assert "SECRET" not in str(error.value)


def test_addresses_with_an_at_sign_elsewhere_are_taken() -> None:
    recipe = load_recipe("laptop", ["corpus.path=s3://bucket/a@b", "name=me"])
    assert recipe.corpus.path == "s3://bucket/a@b"


def test_storage_with_credentials_is_refused_and_they_are_not_repeated() -> None:
    for uri in ("s3://KEY:SECRET@bucket/run", "file://user:SECRET@host/run", "gs://SECRET@bucket"):
        with pytest.raises(StorageError, match="credentials") as error:
            open_storage(uri)
        assert "SECRET" not in str(error.value)
    assert open_storage("runs/a@b").uri.endswith("runs/a@b")
    assert open_storage("s3://bucket/a@b").uri == "s3://bucket/a@b"
