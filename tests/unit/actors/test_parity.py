import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from actors.parity import DIFFICULT, Agreement, ParityText, check_parity
from pipelines.training.layers import add_projection, cut_layers

TinyModel = Callable[..., Path]
GECKO = PromptTemplates(
    query="task: {task} | query: {text}", passage="title: {title} | text: {text}"
)


@pytest.fixture
def student() -> Encoder:
    return small(GECKO)


def small(templates: PromptTemplates) -> Encoder:
    encoder = Encoder.load(
        "embedded:all-MiniLM-L6-v2",
        device="cpu",
        query_template=templates.query,
        passage_template=templates.passage,
    )
    cut = cut_layers(encoder, [0])
    add_projection(cut, 64)
    return cut


def worst(agreements: list[Agreement]) -> Agreement:
    return min(agreements, key=lambda each: each.cosine)


def test_every_way_gives_the_trained_vectors(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="", task="search result")
    found = check_parity(tmp_path, dimensions=[32, 16], trained=student)
    assert worst(found).cosine > 0.99999
    assert {each.way for each in found} == {
        "the export",
        "sentence-transformers",
        "plain transformers",
        "the endpoint's passes",
    }
    assert {each.kind for each in found} == {each.kind for each in DIFFICULT}
    assert {each.dimensions for each in found} == {64, 32, 16}
    assert len(found) == 4 * 6 * 3


@pytest.mark.parametrize("kind", ["xlm-roberta", "modernbert", "gemma3_text"])
def test_other_kinds_agree_too(kind: str, tiny_model: TinyModel, tmp_path: Path):
    encoder = Encoder.load(str(tiny_model(kind, tmp_path / "plain")), device="cpu")
    encoder.save(tmp_path / "export", model_card="")
    assert worst(check_parity(tmp_path / "export", dimensions=[8])).cosine > 0.9999


def test_export_of_other_weights_is_found_at_every_size(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="")
    with torch.no_grad():
        student.model.projection[0].weight[:16].neg_()  # as if trained after the export
    found = check_parity(tmp_path, dimensions=[16], trained=student)
    assert all(each.cosine < 0 for each in found if each.dimensions == 16)


def test_difference_in_one_way_alone_is_named(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="", task="search result")
    path = tmp_path / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    settings["prompts"]["document"] = "passage: "
    path.write_text(json.dumps(settings))
    found = worst(check_parity(tmp_path, trained=student))
    assert (found.way, found.kind) == ("sentence-transformers", "prompt-carrying")
    assert found.cosine < 0.9999


def test_prompts_are_compared_by_their_names(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="", task="search result")
    texts = [ParityText(kind="query", text="wing", role="query")]
    assert worst(check_parity(tmp_path, texts)).cosine > 0.99999
    assert worst(check_parity(tmp_path, texts, task="another task")).cosine < 0.9999


@pytest.mark.parametrize("passage", ["{text}", "passage: {text}", "{title}. {text}"])
def test_titles_reach_sentence_transformers(passage: str, tmp_path: Path):
    student = small(PromptTemplates(passage=passage))
    student.save(tmp_path, model_card="")
    found = check_parity(tmp_path)
    assert worst(found).cosine > 0.99999
    # What a user of sentence-transformers writes where a prompt has no place for the title.
    if "{title}" not in passage:
        model = SentenceTransformer(str(tmp_path), device="cpu")
        theirs = model.encode("Wings lift", prompt_name="document")
        ours = student.encode_passages(["lift"], ["Wings"])[0]
        assert ours @ theirs > 0.99999


def test_damaged_projection_is_found(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="")
    file = tmp_path / "2_Dense/model.safetensors"
    save_file({name: weight.flip(0) for name, weight in load_file(file).items()}, file)
    found = check_parity(tmp_path, trained=student)
    assert all(each.cosine < 0.9 for each in found)


def test_no_text_is_refused(student: Encoder, tmp_path: Path):
    student.save(tmp_path, model_card="")
    with pytest.raises(ValueError, match="no text"):
        check_parity(tmp_path, [])
