"""Models, runs and recipes that anybody may have written: each is read, or refused in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.encoder_folder import read_folder
from cluster.artifacts import MANIFEST, Artifact, Manifest, parse_object
from cluster.errors import ArtifactError, UserError
from cluster.storage import open_storage
from pipelines.recipe.keys import recipe_keys
from pipelines.recipe.read import load_recipe
from pipelines.report.run_folder import files_of_a_run, open_run_folder
from pipelines.yaml_files import read_yaml

MODEL = {
    "config.json": {"model_type": "bert", "hidden_size": 8, "architectures": ["BertModel"]},
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_P", "type": "sentence_transformers.models.Pooling"},
    ],
    "1_P/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
    "sentence_bert_config.json": {"max_seq_length": 64},
    "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "cosine"},
    "tokay.json": {},
    "tokenizer_config.json": {},
}
WORDS = sorted(
    {key for content in MODEL.values() if isinstance(content, dict) for key in content}
    | {"name", "path", "type", "query", "templates", "default_prompt_name", "auto_map"}
    | set(Manifest.__dataclass_fields__)
)


def trees(words: list[str]) -> st.SearchStrategy[Any]:
    """Returns JSON values, among whose keys and texts these words are frequent."""
    return st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.floats()
        | st.text(max_size=20)
        | st.sampled_from(["${TOKAY_X}", "${HOME}", "~x/y", "embedded:", "s3://", "\0", "../x"]),
        lambda inside: (
            st.lists(inside, max_size=3)
            | st.dictionaries(st.sampled_from(words) | st.text(max_size=9), inside, max_size=3)
        ),
        max_leaves=8,
    )


def one_line(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for name, content in MODEL.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    assert read_folder(folder).pooling == "mean"
    return folder


@given(
    st.sampled_from(sorted(MODEL)),
    st.binary(max_size=60) | trees(WORDS).map(lambda tree: json.dumps(tree).encode()),
)
def test_model_of_any_configuration_is_read_or_refused(
    model: Path, name: str, content: bytes
) -> None:
    whole = (model / name).read_bytes()
    (model / name).write_bytes(content)
    try:
        read_folder(model)
    except UserError as error:
        one_line(error)
    finally:
        (model / name).write_bytes(whole)


SEEDS = Manifest(step="seeds", fingerprint="f", config={}, inputs={}).to_json()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose step `seeds` anybody may have written."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "seeds").mkdir()
    (folder / "seeds" / MANIFEST).write_bytes(SEEDS)
    assert set(open_run_folder(str(folder)).artifacts) == {"seeds"}
    return folder


@given(st.binary(max_size=60) | trees(WORDS).map(lambda tree: json.dumps(tree).encode()))
def test_manifest_of_any_content_is_read_or_refused(run: Path, content: bytes) -> None:
    (run / "seeds" / MANIFEST).write_bytes(content)
    try:
        Artifact.open(open_storage(run / "seeds"))
    except ArtifactError as error:
        one_line(error)


@given(st.dictionaries(st.sampled_from(sorted(Manifest.__dataclass_fields__)), trees(WORDS)))
def test_manifest_with_any_fields_is_read_or_refused(run: Path, fields: dict[str, Any]) -> None:
    (run / "seeds" / MANIFEST).write_text(json.dumps(json.loads(SEEDS) | fields))
    try:
        with files_of_a_run(str(run)):
            open_run_folder(str(run))
    except (ArtifactError, UserError) as error:
        one_line(error)


@given(st.binary(max_size=200))
def test_note_of_any_content_is_read_or_refused(content: bytes) -> None:
    try:
        parse_object(content, "work/begun.json")
    except ArtifactError as error:
        one_line(error)


KEYS = [re.sub(r"\[\]|NAME", "0", key.key) for key in recipe_keys()]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(KEYS) | st.text(max_size=12),
            trees([key.split(".")[-1] for key in KEYS]),
        ),
        max_size=3,
    ),
    st.booleans(),
)
def test_recipe_of_any_values_is_read_or_refused(
    changes: list[tuple[str, Any]], keep_unset: bool
) -> None:
    asked = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes]
    try:
        load_recipe("laptop", asked, keep_unset=keep_unset)
    except UserError as error:
        assert len(str(error)) < 2000


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.text(max_size=12)), max_size=3))
def test_setting_of_any_text_is_read_or_refused(changes: list[tuple[str, str]]) -> None:
    try:
        load_recipe("laptop", [f"{key}={value}" for key, value in changes])
    except UserError as error:
        assert len(str(error)) < 2000


@given(
    st.binary(max_size=200)
    | st.text(max_size=200)
    | st.text("[]{}:,-&*!|>'\"#?@ \n\tab01.", max_size=60)
)
def test_yaml_of_random_characters_is_read_or_refused(content: str | bytes) -> None:
    try:
        read_yaml(content, "r.yaml")
    except UserError as error:
        assert len(str(error)) < 500
