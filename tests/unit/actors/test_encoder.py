import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from actors.parity import ParityText, check_parity
from cluster.errors import UserError
from pipelines.training.layers import cut_layers

TEXTS = [
    "the boundary layer of a flat plate",
    "how do I read a file line by line?",
    "",
    "naïve café — 雪が降る",
    " ".join(["a passage that is longer than the model takes"] * 60),
    *[f"sentence number {n} " * n for n in range(1, 12)],
]
GECKO = PromptTemplates(
    query="task: {task} | query: {text}", passage="title: {title} | text: {text}"
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu")


@pytest.fixture(scope="module")
def student() -> Encoder:
    gecko = Encoder.load(
        "embedded:all-MiniLM-L6-v2",
        device="cpu",
        query_template=GECKO.query,
        passage_template=GECKO.passage,
    )
    return cut_layers(gecko, [0, 2, 5])


@pytest.fixture(scope="module")
def export(student: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    student.save(folder, model_card="# A student\n", task="search result")
    return folder


def parity(folder: Path) -> float:
    found = check_parity(folder, [ParityText(kind="text", text=text) for text in TEXTS])
    return min(each.cosine for each in found)


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours * theirs).sum(1)


def test_texts_are_cut_where_the_folder_says(tiny_model: Callable[..., Path], tmp_path: Path):
    folder = tiny_model("bert", tmp_path / "plain", max_position_embeddings=512)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 10**30
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Encoder.load(str(folder)).max_tokens == 256
    Encoder.load(str(folder), max_tokens=400).save(tmp_path / "said", model_card="")
    assert Encoder.load(str(tmp_path / "said")).max_tokens == 400
    assert Encoder.load(str(tmp_path / "said"), max_tokens=32).max_tokens == 32


def test_tokenizer_without_padding_gets_one(tiny_model: Callable[..., Path], tmp_path: Path):
    folder = tiny_model("qwen3", tmp_path / "plain")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"pad_token": None, "eos_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = Encoder.load(str(folder))
    assert encoder.tokenizer.pad_token == "[SEP]"
    encoder.save(tmp_path / "export", model_card="")
    assert parity(tmp_path / "export") > 0.9999


def test_encode_equals_sentence_transformers(encoder: Encoder):
    from actors.embedded import embedded_model

    theirs = SentenceTransformer(str(embedded_model("embedded:all-MiniLM-L6-v2")), device="cpu")
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.dimensions) == (len(TEXTS), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert cosines(vectors, theirs.encode(TEXTS)).min() > 0.99999


def test_encode_does_not_depend_on_the_batch(encoder: Encoder):
    together = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    small = encoder.encode(TEXTS[::-1], batch_tokens=64)[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, small, atol=1e-5)


def test_encode_of_nothing_is_empty(encoder: Encoder):
    assert encoder.encode([]).shape == (0, 384)


def test_encode_cuts_at_max_tokens():
    short = Encoder.load("embedded:all-MiniLM-L6-v2", max_tokens=8, device="cpu")
    assert [len(row) for row in short.tokenize(["word " * 50, "one"])] == [8, 3]
    np.testing.assert_array_equal(short.encode(["word " * 50]), short.encode(["word " * 6]))


def test_max_tokens_is_held_to_what_the_model_takes():
    assert Encoder.load("embedded:all-MiniLM-L6-v2", max_tokens=4096).max_tokens == 256


def test_embed_gives_gradients_and_encode_keeps_training_mode(student: Encoder):
    student.model.train()
    student.encode(["a"])
    assert student.model.training
    student.model.eval()
    student.embed(["a", "b c d"])[:, 0].sum().backward()
    weights = student.model.encoder.layer[0].attention.self.query.weight
    assert weights.grad is not None and weights.grad.abs().sum() > 0
    student.model.zero_grad(set_to_none=True)


def test_templates_surround_queries_and_passages(student: Encoder):
    queries = student.encode_queries(["wing"], task="fact checking")
    np.testing.assert_array_equal(queries, student.encode(["task: fact checking | query: wing"]))
    passages = student.encode_passages(["lift", "drag"], ["Wings", None])
    written = ["title: Wings | text: lift", "title: none | text: drag"]
    np.testing.assert_allclose(passages, student.encode(written), atol=1e-6)


def test_export_equals_sentence_transformers(student: Encoder, export: Path):
    theirs = SentenceTransformer(str(export), device="cpu")
    ours = student.encode(TEXTS)
    assert cosines(ours, theirs.encode(TEXTS)).min() > 0.99999
    assert parity(export) > 0.99999
    queries = student.encode_queries(TEXTS, task="search result")
    assert cosines(queries, theirs.encode_query(TEXTS)).min() > 0.99999
    passages = student.encode_passages(TEXTS)
    assert cosines(passages, theirs.encode_document(TEXTS)).min() > 0.99999


def test_export_is_restored_by_load(student: Encoder, export: Path):
    restored = Encoder.load(str(export), device="cpu")
    assert restored.templates == GECKO
    assert restored.max_tokens == student.max_tokens
    np.testing.assert_array_equal(restored.encode(TEXTS), student.encode(TEXTS))
    assert (export / "README.md").read_text() == "# A student\n"
    assert not list(export.rglob("*.bin"))


def test_modules_without_a_pooling_are_refused(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="")
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps([modules[0]]))
    with pytest.raises(UserError, match="accepted are a Transformer, a Pooling"):
        Encoder.load(str(tmp_path))


def test_prompts_of_sentence_transformers_become_templates(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="")
    (tmp_path / "tokay.json").unlink()
    (tmp_path / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "ask {now}: ", "passage": "p: "}})
    )
    templates = Encoder.load(str(tmp_path)).templates
    assert templates.format_query("x", task="t") == "ask {now}: x"
    assert templates.format_passage("x", "title") == "p: title x"


TinyModel = Callable[..., Path]


def test_decoder_is_pooled_at_its_last_token_and_exported(tiny_model: TinyModel, tmp_path: Path):
    decoder = Encoder.load(str(tiny_model("qwen3", tmp_path / "plain")), device="cpu")
    assert decoder.pooling == "lasttoken"
    alone = np.concatenate([decoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(decoder.encode(TEXTS), alone, atol=1e-5)
    ids = torch.tensor([decoder.tokenize(["one two three"])[0]])
    with torch.inference_mode():
        last = decoder.model(input_ids=ids).last_hidden_state[0, -1]
    expected = torch.nn.functional.normalize(last, dim=0).numpy()
    np.testing.assert_allclose(decoder.encode(["one two three"])[0], expected, atol=1e-5)
    decoder.save(tmp_path / "export", model_card="")
    assert parity(tmp_path / "export") > 0.9999


def test_equal_texts_get_equal_vectors(encoder: Encoder):
    texts = ["wing", "lift", "wing", "drag", "lift"]
    vectors = encoder.encode(texts)
    np.testing.assert_array_equal(vectors[[0, 1]], vectors[[2, 4]])
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-6)


def test_unknown_module_is_refused(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="")
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.LSTM"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"LSTM.*accepted are Transformer"):
        Encoder.load(str(tmp_path))


def test_pickled_weights_are_not_read(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="")
    (tmp_path / "model.safetensors").unlink()
    torch.save(student.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        Encoder.load(str(tmp_path))


def test_missing_model_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError):
        Encoder.load(str(tmp_path / "nowhere"))
