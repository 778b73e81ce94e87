"""What an encoder folder says is done as sentence-transformers does it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

from actors.encoder import Encoder
from cluster.errors import UserError

TinyModel = Callable[..., Path]
Changes = dict[str, dict[str, Any]]  # file -> keys
TEXTS = [
    "The QUICK Harbour Office opens at Seven.",
    "bread dough rises faster in a warm kitchen",
    "",
    " \n ",
    "  blanks around\t",
    "İSTANBUL, STRASSE or STRAẞE, ΣΊΣΥΦΟΣ",
    "雪が降る夜に猫が眠る。 مرحبا 🦎 नमस्ते",
    "[SEP] [MASK] [CLS] inside",
    "word " * 200,
    "x" * 3000,
]
OPTIONS = "config_sentence_transformers.json"
LIMITS = "sentence_bert_config.json"
POOLING = "1_Pooling/config.json"
ST = "sentence_transformers"
POOLS = ("mean", "cls", "lasttoken")


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def base(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentence-transformers' own; the tests change copies of it."""
    folder = tmp_path_factory.mktemp("base")
    Encoder.load(str(plain), device="cpu").save(folder, model_card="")
    (folder / "tokay.json").unlink()
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def change(folder: Path, changes: Changes) -> None:
    for name, keys in changes.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, **keys}))


def put_modules(folder: Path, *kinds: str, form: str = "models.{}", root: str = "") -> None:
    """Lists modules behind one another, each in a folder of its own."""
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else root,
            "type": f"{ST}.{form.format(kind)}",
        }
        for number, kind in enumerate(["Transformer", "Pooling", *kinds])
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def put_dense(path: Path, rows: int, columns: int, **keys: Any) -> None:
    path.mkdir(exist_ok=True)
    kind = {"in_features": columns, "out_features": rows, **keys}
    (path / "config.json").write_text(json.dumps(kind))
    generator = torch.Generator().manual_seed(rows)
    weights = {"linear.weight": torch.randn(rows, columns, generator=generator)}
    if keys.get("bias", True):
        weights["linear.bias"] = torch.randn(rows, generator=generator)
    save_file(weights, path / "model.safetensors")


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert (ours * unit(theirs)).sum(1).min() > 0.99999


def same_vectors(folder: Path, texts: list[str] = TEXTS) -> Encoder:
    """Compares texts as they are, as queries and as passages."""
    theirs: Any = SentenceTransformer(str(folder), device="cpu")
    encoder = Encoder.load(str(folder), device="cpu")
    same(encoder.encode(texts), theirs.encode(texts, prompt="", batch_size=4))
    if theirs.prompts.get("query"):
        same(encoder.encode_queries(texts, task=""), theirs.encode_query(texts))
    for name in ("document", "passage", "corpus"):
        if theirs.prompts.get(name):
            same(encoder.encode_passages(texts), theirs.encode(texts, prompt_name=name))
            break
    return encoder


def same_again(encoder: Encoder, folder: Path) -> None:
    """Saves what was loaded, and sees that both libraries read the same of it."""
    encoder.save(folder, model_card="", task="")
    expected = encoder.encode(TEXTS)
    np.testing.assert_allclose(Encoder.load(str(folder)).encode(TEXTS), expected, atol=1e-6)
    theirs: Any = SentenceTransformer(str(folder), device="cpu")
    same(expected, theirs.encode(TEXTS, prompt=""))


DONE: dict[str, Changes] = {
    "nothing": {},
    "do_lower_case": {LIMITS: {"do_lower_case": True}, "tokenizer_config.json": {}},
    "max_seq_length": {LIMITS: {"max_seq_length": 7}},
    "max_seq_length null": {LIMITS: {"max_seq_length": None}},
    "truncate_dim": {OPTIONS: {"truncate_dim": 12}},
    "truncate_dim above": {OPTIONS: {"truncate_dim": 1024}},
    "prompts": {OPTIONS: {"prompts": {"query": "Query {now}: ", "document": "passage: "}}},
    "passage prompt": {OPTIONS: {"prompts": {"query": "query: ", "passage": "passage: "}}},
    "null prompt": {OPTIONS: {"prompts": {"query": None, "sts": "Compare: "}}},
    "default of a role": {OPTIONS: {"prompts": {"query": "q: "}, "default_prompt_name": "query"}},
    "dot": {OPTIONS: {"similarity_fn_name": "dot"}},
    "written by 6": {
        LIMITS: {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "last_hidden_state"}
            },
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,
        }
    },
    "arguments": {
        LIMITS: {
            "model_args": {"torch_dtype": "float32", "add_pooling_layer": False},
            "tokenizer_args": {"padding_side": "right", "trust_remote_code": True},
            "config_args": {"use_cache": False},
        }
    },
    "truncation on the left": {"tokenizer_config.json": {"truncation_side": "left"}},
    "tokenizer lowers nothing": {"tokenizer_config.json": {"do_lower_case": False}},
    "tokenizer strips accents": {"tokenizer_config.json": {"strip_accents": True}},
    "limit of the tokenizer": {
        LIMITS: {"max_seq_length": None},
        "tokenizer_config.json": {"model_max_length": 9},
    },
}


@pytest.mark.parametrize("name", DONE)
def test_what_a_folder_says_is_done(name: str, folder: Path):
    if name == "do_lower_case":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"]["lowercase"] = False
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        change(folder, {"tokenizer_config.json": {"do_lower_case": False}})
    change(folder, DONE[name])
    encoder = same_vectors(folder)
    expected = {"max_seq_length": 7, "limit of the tokenizer": 9}.get(name, 64)
    assert encoder.max_tokens == expected
    assert encoder.dimensions == {"truncate_dim": 12}.get(name, 32)
    if name == "do_lower_case":
        assert encoder.tokenizer.tokenize("QUICK") == ["quick"]
    if name in ("do_lower_case", "truncate_dim", "prompts"):
        same_again(encoder, folder.parent / "again")


def test_default_prompt_stands_before_every_text(folder: Path):
    prompts = {"query": "", "document": "", "retrieval": "Find: ", "sts": "Compare: "}
    change(folder, {OPTIONS: {"prompts": prompts, "default_prompt_name": "retrieval"}})
    theirs: Any = SentenceTransformer(str(folder), device="cpu")
    encoder = Encoder.load(str(folder), device="cpu")
    same(encoder.encode_queries(TEXTS, task=""), theirs.encode(TEXTS))
    same(encoder.encode_passages(TEXTS), theirs.encode(TEXTS))


@pytest.mark.parametrize("pooling", POOLS)
@pytest.mark.parametrize("old", [False, True])
def test_each_pooling_is_done(pooling: str, old: bool, folder: Path):
    (folder / POOLING).unlink()
    names = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
    keys = {f"pooling_mode_{name}": mode == pooling for mode, name in names.items()}
    own = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": False, **keys}
    new = {"embedding_dimension": 32, "pooling_mode": [pooling], "include_prompt": True}
    change(folder, {POOLING: own if old else new})
    assert same_vectors(folder).pooling == pooling


def test_pooling_that_says_nothing_is_the_mean(folder: Path):
    (folder / POOLING).unlink()
    change(folder, {POOLING: {"word_embedding_dimension": 32, "pooling_mode_cls_token": False}})
    assert same_vectors(folder).pooling == "mean"


@pytest.mark.parametrize(
    "form", ["models.{}", "sentence_transformer.modules.{}", "base.modules.{lower}.{}"]
)
def test_each_name_of_a_module_is_known(form: str, folder: Path):
    put_modules(folder, "Normalize")
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        own = form.replace("base", "sentence_transformer") if kind == "Pooling" else form
        module["type"] = f"{ST}." + own.replace("{lower}", kind.lower()).format(kind)
    (folder / "modules.json").write_text(json.dumps(modules))
    same_vectors(folder)


@pytest.mark.parametrize(
    "kinds",
    [
        (),
        ("Normalize",),
        ("Dense",),
        ("Normalize", "Dense"),
        ("Dense", "Normalize", "Dense", "Normalize", "Normalize"),
    ],
)
def test_modules_are_done_in_their_order(kinds: tuple[str, ...], folder: Path):
    put_modules(folder, *kinds)
    size = 32
    for number, kind in enumerate(kinds, start=2):
        if kind == "Dense":
            put_dense(folder / f"{number}_Dense", size - 8, size)
            size -= 8
    change(folder, {OPTIONS: {"truncate_dim": 6}} if len(kinds) == 2 else {})
    encoder = same_vectors(folder)
    assert encoder.dimensions == (6 if len(kinds) == 2 else size)
    same_again(encoder, folder.parent / "again")


@pytest.mark.parametrize(
    "activation",
    [
        "linear.Identity",
        *(f"activation.{name}" for name in ("Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")),
    ],
)
def test_each_activation_is_done(activation: str, folder: Path):
    put_modules(folder, "Dense")
    named = f"torch.nn.modules.{activation}"
    put_dense(folder / "2_Dense", 16, 32, bias="e" in activation[-4:], activation_function=named)
    same_vectors(folder)


def test_transformer_in_a_folder_of_its_own_is_read(folder: Path):
    inside = folder / "0_Transformer"
    inside.mkdir()
    for file in list(folder.iterdir()):
        if file.is_file() and file.name not in ("modules.json", OPTIONS, "README.md"):
            file.rename(inside / file.name)
    (inside / LIMITS).rename(inside / "sentence_distilbert_config.json")
    change(folder, {"0_Transformer/sentence_distilbert_config.json": {"max_seq_length": 11}})
    put_modules(folder, "Normalize", root="0_Transformer")
    assert same_vectors(folder).max_tokens == 11


def test_folder_that_sentence_transformers_wrote_is_read(folder: Path, tmp_path: Path):
    theirs: Any = SentenceTransformer(str(folder), device="cpu")
    theirs.max_seq_length = 21
    theirs.save(str(tmp_path / "theirs"))
    assert "max_seq_length" not in json.loads((tmp_path / "theirs" / LIMITS).read_text())
    assert same_vectors(tmp_path / "theirs").max_tokens == 21


@pytest.mark.parametrize("kind", ["mpnet", "roberta"])
def test_texts_end_where_positions_do(kind: str, tiny_model: TinyModel, tmp_path: Path):
    folder = tiny_model(kind, tmp_path / "plain")
    change(folder, {"tokenizer_config.json": {"model_max_length": 10**30}})
    encoder = Encoder.load(str(folder), device="cpu")
    assert encoder.max_tokens == 64  # of 66 rows, two of which are the padding's
    assert np.isfinite(encoder.encode(TEXTS)).all()


# What follows is of decoders.


@pytest.fixture(params=["qwen3", "gemma3_text", "llama"])
def decoder(request: Any, tiny_model: TinyModel, tmp_path: Path) -> Path:
    """As a decoder's authors write it: last token, left padding, an instruction for queries."""
    plain = tiny_model(request.param, tmp_path / "plain")
    folder = tmp_path / "model"
    encoder = Encoder.load(str(plain), device="cpu")
    assert encoder.pooling == "lasttoken"
    encoder.save(folder, model_card="")
    (folder / "tokay.json").unlink()
    instruction = "Instruct: Given a question, retrieve passages\nQuery:"
    change(folder, {OPTIONS: {"prompts": {"query": instruction}}})
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoder_is_padded_on_either_side(side: str, decoder: Path):
    change(decoder, {"tokenizer_config.json": {"padding_side": side}})
    assert same_vectors(decoder).pooling == "lasttoken"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_decoder_pools_as_its_folder_says(pooling: str, decoder: Path):
    (decoder / POOLING).unlink()
    change(
        decoder,
        {
            POOLING: {"embedding_dimension": 32, "pooling_mode": pooling},
            "tokenizer_config.json": {"padding_side": "left"},
        },
    )
    assert same_vectors(decoder).pooling == pooling


def test_decoder_has_tokens_of_its_own(decoder: Path):
    theirs: Any = SentenceTransformer(str(decoder), device="cpu")
    tokenizer = theirs.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|embed|>"]})
    tokenizer.add_tokens(["harbourmaster"])
    tokenizer.save_pretrained(decoder)
    theirs.transformers_model.resize_token_embeddings(len(tokenizer))
    theirs.transformers_model.save_pretrained(decoder)
    encoder = same_vectors(decoder, [*TEXTS, "a harbourmaster<|embed|>", "<|embed|>"])
    assert encoder.tokenizer.tokenize("a harbourmaster<|embed|>")[1:] == [
        "harbourmaster",
        "<|embed|>",
    ]


def put_byte_tokenizer(
    folder: Path, *, starts: bool = True, ends: bool = False, **settings: Any
) -> None:
    """Writes a small tokenizer of bytes, as decoders have, that minds blanks and case."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    llama = settings.get("tokenizer_class") == "LlamaTokenizerFast"
    letters = [*map(chr, range(33, 127)), "▁"]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    alphabet = pieces if llama else sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*tokens, *alphabet])}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=llama)
    )
    if not llama:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    if starts:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    backend.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), tokens, strict=True))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps({**given, **names, **settings}))


@pytest.mark.parametrize("decoder", ["qwen3"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding_side": "left", "truncation_side": "left"},
        {"tokenizer_class": "LlamaTokenizerFast", "ends": True, "add_eos_token": True},
        {"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": False},
        {"tokenizer_class": "Qwen2TokenizerFast", "padding_side": "left", "ends": True},
    ],
    ids=str,
)
def test_decoder_keeps_blanks_and_ends_as_its_tokenizer_says(
    settings: dict[str, Any], decoder: Path
):
    put_byte_tokenizer(decoder, **settings)
    encoder = same_vectors(decoder)
    last = encoder.tokenize(["Word"])[0][-1]
    assert (last == encoder.tokenizer.eos_token_id) == settings.get("ends", False)
    assert encoder.tokenize(["word "]) != encoder.tokenize(["word"])
    assert encoder.tokenize(["Word"]) != encoder.tokenize(["word"])


@pytest.mark.parametrize("decoder", ["llama"], indirect=True)
def test_end_that_a_tokenizer_promises_and_does_not_add_is_refused(decoder: Path):
    """transformers 4 added it, and 5 does not look at the key where tokenizer.json is there."""
    put_byte_tokenizer(decoder, tokenizer_class="LlamaTokenizerFast", add_eos_token=True)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: add_eos_token true.*no '</s>'"):
        Encoder.load(str(decoder), device="cpu")


def test_decoder_whose_tokenizer_adds_nothing_has_a_vector_for_nothing(decoder: Path):
    put_byte_tokenizer(decoder, starts=False)
    encoder = same_vectors(decoder, [text for text in TEXTS if text])
    assert np.isfinite(encoder.encode([""])).all()
