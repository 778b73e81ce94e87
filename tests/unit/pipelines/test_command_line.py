"""The `tokay` command, with a cluster's answers made up: anybody may have written them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import jobs
from cluster.errors import UserError
from pipelines import cli
from pipelines.recipe.read import load_recipe
from pipelines.yaml_files import read_yaml

MESSAGE = "[bold]broke[/x] \x1b]0;owned\x07\x1b[2J " + "y" * 100_000


class Cluster:
    """A job server that says what it likes."""

    def list_jobs(self) -> list[Any]:
        return [self.get_job_info("raysubmit_1")]

    def get_job_info(self, job_id: str) -> Any:
        return SimpleNamespace(
            submission_id=job_id * 1000,
            job_id=None,
            status=SimpleNamespace(value="FAILED"),
            metadata={"recipe": "[red]" * 1000, "storage": 7},
            message=MESSAGE,
            driver_exit_code=1,
            start_time=None,
            end_time=None,
        )

    def stop_job(self, job_id: str) -> bool:
        raise RuntimeError(f"Request failed: {MESSAGE}")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_connect", lambda address: Cluster())


def test_status_shows_what_a_cluster_says_as_short_text(cluster: None) -> None:
    (state,) = jobs.status("http://head:8265")
    assert max(map(len, (state.id, state.recipe, state.storage, state.message))) <= 1000
    answer = CliRunner().invoke(cli.app, ["status"], env={"COLUMNS": "400"})
    assert answer.exit_code == 0, answer.exception
    assert "[bold]broke" in answer.stdout
    assert not set("\x1b\x07") & set(answer.stdout)


def test_stop_tells_why_a_cluster_refused_in_short(cluster: None) -> None:
    with pytest.raises(Exception, match="refused: Request failed") as refused:
        jobs.stop("http://head:8265", "a")
    assert len(str(refused.value)) < 1200


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def submit(recipe: str, **given: Any) -> str:
        found.append({"recipe": recipe, **given})
        return "job-1"

    monkeypatch.setattr(jobs, "submit", submit)
    return found


def test_submitted_recipe_is_whole_and_says_again_that_code_may_be_run(
    submitted: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKAY_DATA", "s3://bucket")
    command = [
        "submit",
        "laptop",
        "--storage",
        "s3://b/run",
        "--set",
        "corpus.path=${TOKAY_DATA}/x",
    ]
    command += ["--set", "student.trust_remote_code=true"]
    refused = CliRunner().invoke(cli.app, command)
    assert isinstance(refused.exception, UserError) and not submitted
    assert "student.trust_remote_code" in str(refused.exception)
    answer = CliRunner().invoke(cli.app, [*command, "--trust-remote-code"])
    assert answer.exit_code == 0, answer.exception
    (job,) = submitted
    assert job["flags"] == ["--trust-remote-code"]
    (tmp_path / "recipe.yaml").write_text(job["recipe"], encoding="utf-8")
    settings = ["corpus.path=s3://bucket/x", "student.trust_remote_code=true"]
    assert load_recipe(tmp_path / "recipe.yaml", trust_remote_code=True) == load_recipe(
        "laptop", settings, trust_remote_code=True
    )


def test_submitted_prompts_travel_with_the_recipe(
    submitted: list[dict[str, Any]], tmp_path: Path
) -> None:
    from pipelines.fret import prompts

    text = (Path(prompts.__file__).parent / "prompts.yaml").read_text(encoding="utf-8")
    (tmp_path / "words.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("base: laptop\nprompts: words.yaml\n", encoding="utf-8")
    command = ["submit", str(tmp_path / "mine.yaml"), "--storage", "s3://b/run"]
    answer = CliRunner().invoke(cli.app, command)
    assert answer.exit_code == 0, answer.exception
    (job,) = submitted
    assert job["files"] == {"prompts.yaml": text}
    assert read_yaml(job["recipe"], "")["prompts"] == "prompts.yaml"
    assert job["flags"] == []
