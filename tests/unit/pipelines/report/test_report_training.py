"""The training part of the report: each stage, its sets and what it was watched on."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.artifacts import Json
from pipelines.report.write import write_report


@pytest.fixture
def document(finished_run: str, tmp_path: Path) -> dict[str, Json]:
    """The report of the finished run with a first stage, two sets of it, that stopped early."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.copytree(run / "mixture", run / "prefinetuning_mixture")
    shutil.copytree(run / "training", run / "prefinetuning")
    manifest = run / "prefinetuning_mixture" / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["metrics"] = {"num_batches": 60, "sets": {"faq": 640, "<titles>": 320, "never": 1}}
    manifest.write_text(json.dumps(fields))
    rows = [
        {
            "batch": batch,
            "dataset": "faq" if batch % 2 else "<titles>",
            "loss": 4 - batch / 10,
            "learning_rate": 1e-4,
            "examples_per_s": 100.0 + batch,
            "tokens_per_s": 2000.0,
        }
        for batch in range(40)
    ]
    rows[19] |= {"validation_loss": 2.5, "validation_ndcg_at_10": 0.25}
    rows[39] |= {"validation_loss": 1.5, "validation_ndcg_at_10": 0.5}
    (run / "prefinetuning" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return write_report(str(run))


def test_report_tells_each_stage_of_the_training(document: dict[str, Json]) -> None:
    first = document["prefinetuning"]
    assert (first["done"], first["batches"]) == (40, 60)
    assert first["validation_loss"] == [[19, 2.5], [39, 1.5]]
    assert first["validation_ndcg_at_10"] == [[19, 0.25], [39, 0.5]]
    assert (first["median_examples_per_s"], first["median_tokens_per_s"]) == (119.5, 2000.0)
    faq, titles, never = first["sets"]
    # Its batches are 1, 3, ... 39; a tenth of the twenty is two.
    assert (faq["examples"], len(faq["loss"])) == (640, 20)
    assert faq["first_loss"] == pytest.approx(4 - (0.1 + 0.3) / 2)
    assert faq["last_loss"] == pytest.approx(4 - (3.7 + 3.9) / 2)
    assert [batch for batch, _ in titles["loss"]] == list(range(0, 40, 2))
    assert (never["loss"], never["first_loss"]) == ([], None)
    assert document["training"]["loss"] == [[0, 3.0], [1, 2.5], [2, 2.0]]
    assert document["training"]["validation_loss"] == []


def test_page_shows_both_stages_where_there_are_two(
    document: dict[str, Json], report: dict[str, Json]
) -> None:
    two, one = (Path(each["html"]).read_text() for each in (document, report))
    part = two[two.index('<h2 id="training">') : two.index('<h2 id="time">')]
    for shown in ("<h3>Pre-finetuning</h3>", "<h3>Fine-tuning</h3>", "&lt;titles&gt;"):
        assert shown in part
    assert "40 of 60 batches, stopped early; 120 examples and 2,000 tokens" in part
    # Loss, rate and throughput of each; nDCG and two sets' losses of the first.
    assert part.count("<svg") == 2 * 3 + 3
    assert part.count("held out") == 1
    assert "<h3>Fine-tuning</h3>" not in one and "stopped early" not in one
