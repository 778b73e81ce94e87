"""What an encoder folder says and is not done is refused, in one line that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.encoder import Encoder
from actors.encoder_folder import read_folder
from actors.parity import check_parity
from cluster.errors import TokayError, UserError
from pipelines.training.layers import add_projection

TinyModel = Callable[..., Path]
OPTIONS = "config_sentence_transformers.json"
LIMITS = "sentence_bert_config.json"
POOLING = "1_Pooling/config.json"
DENSE = "2_Dense/config.json"
MODELS = "sentence_transformers.models"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 90868376\n"


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    encoder = Encoder.load(str(tiny_model("bert", tmp_path_factory.mktemp("plain"))), device="cpu")
    add_projection(encoder, 16)
    encoder.save(folder, model_card="")
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def change(path: Path, keys: dict[str, Any]) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **keys}))


def refused(folder: Path, *words: str, read: Callable[..., Any] | None = None) -> str:
    """Loads a folder and returns the line that refuses it, which holds each of the words."""
    with pytest.raises(UserError) as caught:
        (read or (lambda path: Encoder.load(str(path), device="cpu")))(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    for word in words:
        assert word in line
    return line


@pytest.mark.parametrize(
    ("file", "key", "value", "accepted"),
    [
        (POOLING, "include_prompt", False, "true"),
        (POOLING, "pooling_mode", "weightedmean", "'mean', 'cls' or 'lasttoken'"),
        (POOLING, "pooling_mode", ["mean", "cls"], "'mean', 'cls' or 'lasttoken'"),
        (POOLING, "pooling_mode_max_tokens", True, "false"),
        (POOLING, "pooling_mode_mean_sqrt_len_tokens", True, "false"),
        (POOLING, "word_embedding_dimension", "32", "integer"),
        (POOLING, "head", 3, "pooling_mode"),
        (LIMITS, "max_seq_length", -1, "greater than or equal to 1"),
        (LIMITS, "max_seq_length", 0, "greater than or equal to 1"),
        (LIMITS, "max_seq_length", 10**30, "less than or equal to 1000000"),
        (LIMITS, "max_seq_length", "512", "integer"),
        (LIMITS, "max_seq_length", True, "integer"),
        (LIMITS, "max_seq_length", 12.5, "integer"),
        (LIMITS, "do_lower_case", "yes", "boolean"),
        (LIMITS, "transformer_task", "fill-mask", "'feature-extraction'"),
        (LIMITS, "module_output_name", "sentence_embedding", "'token_embeddings'"),
        (LIMITS, "tokenizer_name_or_path", "other/tokenizer", "null"),
        (LIMITS, "query_length", 32, "null"),
        (LIMITS, "query_expansion", {"strategy": "fixed"}, "null"),
        (LIMITS, "processing_kwargs", {"text": {"max_length": 3}}, "at most 0"),
        (LIMITS, "model_name_or_path", "../other", "max_seq_length"),
        (LIMITS, "backend", "onnx", "max_seq_length"),
        (OPTIONS, "model_type", "SparseEncoder", "'SentenceTransformer'"),
        (OPTIONS, "similarity_fn_name", "manhattan", "'cosine', 'dot' or 'euclidean'"),
        (OPTIONS, "truncate_dim", 0, "greater than or equal to 1"),
        (OPTIONS, "truncate_dim", "128", "integer"),
        (OPTIONS, "prompts", ["query: "], "dictionary"),
        (OPTIONS, "requirements", {"transformers": ">99"}, "at most 0"),
        (OPTIONS, "matryoshka", True, "truncate_dim"),
        (DENSE, "activation_function", "os.system", "torch.nn.modules.linear.Identity"),
        (DENSE, "use_residual", True, "false"),
        (DENSE, "module_input_name", "token_embeddings", "'sentence_embedding'"),
        (DENSE, "out_features", 10**12, "less than or equal to"),
        (DENSE, "in_features", 31, "32 dimensions"),
        (DENSE, "init_weight", [1.0], "use_residual"),
        (
            "3_Normalize/config.json",
            "module_input_name",
            "token_embeddings",
            "'sentence_embedding'",
        ),
        ("tokay.json", "max_tokens", -3, "greater than or equal to 1"),
        ("tokay.json", "templates", {"query": "{text:>1000000}"}, "{text} once"),
        ("tokay.json", "templates", {"query": "{text}", "image": "{text}"}, "means nothing"),
        ("tokay.json", "pooling", "cls", "templates, max_tokens"),
        ("config.json", "model_type", None, "kind of model"),
        ("config.json", "model_type", "no-such-model", "no model of this kind"),
        ("config.json", "transformers_weights", "other.safetensors", "take this key out"),
        ("config.json", "attn_implementation", "somebody/kernel", "take this key out"),
        ("tokenizer_config.json", "model_max_length", -1, "whole numbers from 1"),
        ("tokenizer_config.json", "model_max_length", "512", "whole numbers from 1"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    file: str, key: str, value: Any, accepted: str, folder: Path
):
    change(folder / file, {key: value})
    refused(folder, file.split("/")[-1], key, accepted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_args", {"device_map": "auto"}),
        ("model_args", {"attn_implementation": "somebody/kernel"}),
        ("tokenizer_args", {"model_max_length": 7}),
        ("config_args", {"is_causal": False}),
        ("modality_config", {"message": {"method": "forward"}}),
        ("modality_config", {"text": {"method": "generate", "method_output_name": "x"}}),
    ],
)
def test_arguments_that_change_more_are_refused(key: str, value: Any, folder: Path):
    change(folder / LIMITS, {key: value})
    refused(folder, LIMITS, f"{key}.", read=read_folder)


@pytest.mark.parametrize("kind", ["t5", "clip", "vit"])
def test_model_of_another_kind_is_refused(kind: str, folder: Path):
    from transformers import AutoConfig, AutoModel

    tiny = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    small = {**tiny, "intermediate_size": 8}
    settings: dict[str, Any] = {
        "t5": {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2},
        "clip": {"text_config": small, "vision_config": small, "projection_dim": 8},
        "vit": small,
    }
    AutoModel.from_config(AutoConfig.for_model(kind, **settings[kind])).save_pretrained(folder)
    refused(folder, "config.json", "model_type", f'"{kind}"', "encoders")


def test_two_poolings_at_once_are_refused(folder: Path):
    keys = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    change(folder / POOLING, keys)
    refused(folder, "1_Pooling/config.json", "mean+cls", read=read_folder)


@pytest.mark.parametrize("name", ["dot", "euclidean"])
def test_scores_of_lengths_are_refused_where_there_are_lengths(name: str, folder: Path):
    change(folder / OPTIONS, {"similarity_fn_name": name})
    read_folder(folder)  # a Normalize is the last module
    change(folder / OPTIONS, {"truncate_dim": 8})
    refused(folder, OPTIONS, name, "'cosine'", read=read_folder)
    change(folder / OPTIONS, {"truncate_dim": None})
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:-1]))
    refused(folder, OPTIONS, name, "'cosine'", read=read_folder)


def test_default_prompt_is_refused_where_two_could_be_meant(folder: Path):
    (folder / "tokay.json").unlink()
    change(folder / OPTIONS, {"prompts": {"sts": "s: "}, "default_prompt_name": "retrieval"})
    refused(folder, OPTIONS, "default_prompt_name", '"retrieval"', "sts", read=read_folder)
    prompts = {"query": "q: ", "retrieval": "r: "}
    change(folder / OPTIONS, {"prompts": prompts})
    refused(folder, OPTIONS, "default_prompt_name", "one or the other", read=read_folder)


@pytest.mark.parametrize(
    "text",
    [
        "[{",
        "",
        "null",
        "{}",
        "[]",
        "[1]",
        "[[]]",
        '["sentence_transformers.models.Transformer"]',
        "[{}]",
        '[{"idx": 0, "name": "0", "path": ""}]',
        '[{"name": "0", "path": 0, "type": "sentence_transformers.models.Transformer"}]',
        '{"a": ' * 100_000,
        "[" * 100_000,
        "[" * 900 + "]" * 900,
        "9" * 10_000,
        "\x00",
        "NaN",
    ],
    ids=lambda text: f"{text[:40]}({len(text)})",
)
def test_broken_modules_are_refused_by_one_line(text: str, folder: Path):
    (folder / "modules.json").write_text(text)
    refused(folder, "modules.json", read=read_folder)


@pytest.mark.parametrize("file", [LIMITS, OPTIONS, POOLING, DENSE, "tokay.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000, b"\xff\xfe", POINTER])
def test_broken_configuration_is_refused_by_one_line(file: str, text: str | bytes, folder: Path):
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, file, read=read_folder)


def test_huge_configuration_is_not_read(folder: Path):
    with (folder / LIMITS).open("wb") as file:
        file.truncate(2**32)
    refused(folder, LIMITS, "4294967296 bytes", read=read_folder)


def modules_with(folder: Path, number: int, **keys: Any) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[number].update(keys)
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("path", ["/etc", "..", "../other", "1_Pooling/../../other", "..\\other"])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_module_outside_the_folder_is_refused(path: str, number: int, folder: Path):
    shutil.copytree(folder, folder.parent / "other")
    modules_with(folder, number, path=path)
    refused(folder, "modules.json", "path", "inside the model's own", read=read_folder)


def test_module_behind_a_link_out_of_the_folder_is_refused(folder: Path):
    shutil.move(folder / "2_Dense", folder.parent / "outside")
    (folder / "2_Dense").symlink_to(folder.parent / "outside")
    refused(folder, "modules.json", "2_Dense", "inside the model's own", read=read_folder)


@pytest.mark.parametrize(
    "name",
    [
        f"{MODELS}.LSTM",
        f"{MODELS}.CNN",
        f"{MODELS}.LayerNorm",
        "sentence_transformers.Transformer",
        "Transformer",
        "custom.Transformer",
        f"evil.{MODELS}.Transformer",
        "os.system",
    ],
)
def test_module_of_another_name_is_refused(name: str, folder: Path):
    modules_with(folder, 0, type=name)
    refused(folder, "modules.json", name, "accepted are Transformer", read=read_folder)


def test_modules_in_another_order_or_of_one_name_are_refused(folder: Path):
    modules_with(folder, 3, name="2")
    refused(folder, "modules.json", "one name", read=read_folder)
    modules_with(folder, 3, name="3", kwargs=["task"])
    refused(folder, "modules.json", "kwargs", read=read_folder)
    modules = json.loads((folder / "modules.json").read_text())
    for wrong in (modules[:1], modules[1:], [*modules, modules[0]], modules[::-1]):
        named = [{**module, "name": str(n), "kwargs": []} for n, module in enumerate(wrong)]
        (folder / "modules.json").write_text(json.dumps(named))
        refused(folder, "modules.json", "a Transformer, a Pooling", read=read_folder)


# Weights and tokenizers.


@pytest.mark.parametrize("file", ["model.safetensors", "2_Dense/model.safetensors"])
@pytest.mark.parametrize("damage", ["pointer", "cut", "cut head", "bytes", "empty", "missing"])
def test_broken_weights_are_refused_by_name(file: str, damage: str, folder: Path):
    path = folder / file
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        broken = {
            "pointer": POINTER.encode(),
            "cut": whole[: len(whole) // 2],
            "cut head": whole[:50],
            "bytes": b"\xff" * 1000,
            "empty": b"",
        }
        path.write_bytes(broken[damage])
    line = refused(folder, "model.safetensors")
    assert ("git lfs pull" in line) == (damage == "pointer")


def test_pickled_weights_are_refused_with_the_way_out(folder: Path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    refused(folder, "pytorch_model.bin", "can run code", "save_pretrained")


def shard(folder: Path) -> dict[str, str]:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file, {"format": "pt"})
    return {name: file for file, held in parts.items() for name in held}


def test_sharded_weights_are_read_where_they_are_whole(folder: Path, base: Path):
    places = shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    expected = Encoder.load(str(base)).encode(["wing"])
    np.testing.assert_array_equal(Encoder.load(str(folder)).encode(["wing"]), expected)
    (folder / "part-2.safetensors").rename(folder.parent / "part-2.safetensors")
    refused(folder, "part-2.safetensors", "missing")
    for elsewhere in (
        "../part-2.safetensors",
        "/etc/x.safetensors",
        "part-2.bin",
        "a/b.safetensors",
    ):
        moved = {name: elsewhere if "2" in file else file for name, file in places.items()}
        index.write_text(json.dumps({"weight_map": moved}))
        refused(folder, "model.safetensors.index.json", "weight_map")
    index.write_text('{"weight_map": []}')
    refused(folder, "model.safetensors.index.json", "weight_map")


def test_weights_of_another_model_are_refused(folder: Path):
    weights = load_file(folder / "model.safetensors")
    some = {name: weight for name, weight in weights.items() if "layer.1." not in name}
    save_file(some, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "16 are missing", "encoder.layer.1.")
    save_file(
        {f"base_model.{name}": w for name, w in weights.items()}, folder / "model.safetensors"
    )
    refused(folder, "embeddings.")
    weights["embeddings.word_embeddings.weight"] = torch.zeros(3, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "1 have other shapes", "word_embeddings.weight of shape [3, 32]")


def test_projection_of_another_shape_is_refused_before_it_is_made(folder: Path):
    change(folder / DENSE, {"out_features": 2**20})
    refused(folder, "2_Dense/model.safetensors", "[16, 32]", "[1048576, 32]")
    change(folder / DENSE, {"out_features": 16, "bias": True})
    refused(folder, "2_Dense/model.safetensors", "linear.bias")


def test_adapters_of_another_model_are_refused(folder: Path):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere"}')
    refused(folder, "adapter_config.json", "merge", read=read_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_no_numbers_are_told(value: float, folder: Path):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    encoder = Encoder.load(str(folder), device="cpu")
    with pytest.raises(TokayError, match=f"{folder}.*no numbers in torch.float32"):
        encoder.encode(["wing"])


def test_tokenizer_that_is_missing_or_broken_is_refused(folder: Path):
    for text in ("{", POINTER, "{}", '{"model": {"type": "WordPiece"}}'):
        (folder / "tokenizer.json").write_text(text)
        refused(folder, "tokenizer")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer")


def test_tokenizer_of_another_model_is_refused(tiny_model: TinyModel, tmp_path: Path):
    folder = tiny_model("bert", tmp_path, vocab_size=1000)
    refused(folder, "tokenizer", "30521", "1000 embeddings")


def test_added_token_without_an_embedding_is_read_as_unknown(folder: Path, base: Path):
    plain = Encoder.load(str(base), device="cpu")
    plain.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    plain.tokenizer.save_pretrained(folder)
    encoder = Encoder.load(str(folder), device="cpu")
    assert encoder.tokenizer.convert_tokens_to_ids("<image>") == 30522
    same = encoder.encode(["an <image> here", "an [UNK] here"])
    np.testing.assert_array_equal(same[0], same[1])


@pytest.mark.parametrize("limit", [1, 2])
def test_limit_that_leaves_nothing_of_a_text_is_refused(limit: int, folder: Path):
    refused(
        folder,
        f"max_tokens {limit}",
        "from 3",
        read=lambda path: Encoder.load(str(path), max_tokens=limit),
    )
    change(folder / LIMITS, {"max_seq_length": limit})
    refused(folder, f"max_seq_length {limit}", "from 3")


@pytest.mark.parametrize("limit", [0, -5])
def test_limit_below_one_is_refused(limit: int, folder: Path):
    with pytest.raises(UserError, match=f"max_tokens {limit}"):
        Encoder.load(str(folder), max_tokens=limit)


def test_dimensions_outside_the_model_are_refused(base: Path):
    encoder = Encoder.load(str(base), device="cpu")
    for inside in (1, 16):
        encoder.check_dimensions(inside)
    for outside in (0, -1, 17, 999):
        with pytest.raises(UserError, match=f"dimensions {outside}: accepted are 1 to 16"):
            encoder.check_dimensions(outside)
        with pytest.raises(UserError, match=f"dimensions {outside}: accepted are 1 to 16"):
            check_parity(base, dimensions=[outside])


def test_configuration_is_utf8_in_every_locale(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "tokay.json").unlink()
    path = folder / OPTIONS
    written = {**json.loads(path.read_text()), "prompts": {"query": "为这个: "}}
    path.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    assert read_folder(folder).templates.query == "为这个: {text}"


def test_folder_is_read_through_links_of_its_own(folder: Path, base: Path):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")  # as in the hub's cache
    expected = Encoder.load(str(base)).encode(["wing"])
    np.testing.assert_array_equal(Encoder.load(str(folder)).encode(["wing"]), expected)
