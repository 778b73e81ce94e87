"""Front matter that the hub's own reader understands."""

import pytest
import yaml
from huggingface_hub import ModelCard

from pipelines.evaluation.model_card import add_to_card, model_index, training_sets

CARD = "---\ntags: [tokay]\ndatasets:\n- snli\n- quora\n---\n\n# A model\n\n---\n"
ROW = {
    "dataset": "stsb",
    "task_type": "STS",
    "split": "test",
    "metric": "cosine_spearman",
    "mteb_score": 0.8203214,
    "dimensions": 384,
}


def test_model_index_is_read_by_the_hubs_client() -> None:
    rows = [ROW, {**ROW, "dimensions": 64, "mteb_score": 0.7}]
    card = ModelCard(add_to_card(CARD, model_index("student", rows)))
    assert card.data.tags == ["tokay", "mteb"]
    assert card.data.model_name == "student"
    full, cut = card.data.eval_results
    assert (full.dataset_name, full.task_type, full.metric_type) == (
        "stsb",
        "STS",
        "cosine_spearman",
    )
    assert (full.metric_value, cut.metric_value) == (0.82032, 0.7)
    assert "64" in cut.metric_name
    assert card.text.strip() == "# A model\n\n---"


def test_card_without_front_matter_gets_one() -> None:
    assert add_to_card("# Title\n", {"tags": ["mteb"]}) == "---\ntags:\n- mteb\n---\n# Title\n"


def test_front_matter_ends_at_a_line_of_its_own() -> None:
    card = add_to_card("# Title\n", {"datasets": ["a---", "b"]})
    assert training_sets(card) == training_sets(card.replace("\n", "\r\n")) == ("a---", "b")
    assert add_to_card(card, {}) == card


def test_training_sets_are_those_that_the_card_names() -> None:
    assert training_sets(CARD) == ("snli", "quora")
    assert training_sets("---\n" + yaml.safe_dump({"datasets": "snli"}) + "---\n") == ("snli",)
    assert training_sets("# none") == training_sets("") == ()


@pytest.mark.parametrize(
    "head",
    [
        "datasets: [unclosed",
        "datasets: 5",
        "datasets: {a: b}",
        "a: &a [*a]\ndatasets: *a",
        "[" * 9999,
        "x: !!python/object:os.system {}",
        "datasets: [1, [2]]",
        "datasets: 2024-13-99",
        "- a",
    ],
)
def test_card_that_names_no_sets_is_no_reason_to_stop(head: str) -> None:
    assert training_sets(f"---\n{head}\n---\ntext") == ()
