import io
import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import UserError
from cluster.session import ClusterResources
from cluster.storage import open_storage
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.run import execute as execution
from pipelines.run.execute import execute

WORDS = "the quick brown fox jumps over a lazy dog and runs home to sleep until noon"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose first two steps need no Ray, which is not started."""
    rows = [
        {"_id": str(n), "text": " ".join(random.Random(n).choices(WORDS.split(), k=40))}
        for n in range(9)
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    resources = ClusterResources(num_nodes=1, num_cpus=1, num_gpus=0)
    monkeypatch.setattr(execution, "connect", lambda folder: resources)
    return recipe_with(tmp_path)


def recipe_with(folder: Path, *settings: str) -> Recipe:
    return load_recipe("laptop", [f"corpus.path={folder / 'corpus.jsonl'}", *settings])


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Path:
    """A run with its first two steps."""
    start(recipe, tmp_path / "run", until="seeds")
    assert {"passages", "seeds"} <= {path.name for path in (tmp_path / "run").iterdir()}
    return tmp_path / "run"


def start(recipe: Recipe, folder: Path, **options: object) -> None:
    execute(recipe, str(folder), Console(file=io.StringIO()), **options)  # type: ignore[arg-type]


def state(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_fresh_in_a_folder_that_is_no_run_touches_nothing(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("index/chapter.txt", "training/train.py", "recipe.yaml", "report.html"):
        open_storage(tmp_path / "mine").write_bytes(name, b"mine")
    before = state(tmp_path / "mine")
    for until in ("nosuch", "seeds", None):
        for options in ({"fresh": True}, {"rebuild": True}, {}):
            with pytest.raises(UserError, match="is no run of Tokay, and holds files"):
                start(recipe, tmp_path / "mine", until=until, **options)
    assert state(tmp_path / "mine") == before


def test_fresh_while_another_process_is_at_work_touches_nothing(
    run: Path, recipe: Recipe, tmp_path: Path
) -> None:
    before = state(run)
    other = recipe_with(tmp_path, "training.epochs=7", "seeds.num_seeds=5")
    with build_run(recipe, str(run)).alone():
        for options in ({"fresh": True}, {"rebuild": True}, {}):
            with pytest.raises(UserError, match="another process is at work"):
                start(other, run, until="seeds", **options)
    assert state(run) == before


def test_fresh_that_is_refused_for_anything_else_touches_nothing(
    run: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(run)
    with pytest.raises(UserError, match="'nosuch' is no step"):
        start(recipe, run, until="nosuch", fresh=True)

    def refuse(*_: object, **__: object) -> None:
        raise UserError("no room, or no cluster")

    for check in ("refuse_unfit", "connect"):
        with monkeypatch.context() as patch:
            patch.setattr(execution, check, refuse)
            with pytest.raises(UserError, match="no room, or no cluster"):
                start(recipe, run, until="seeds", fresh=True)
    open_storage(run).write_bytes("training/train.py", b"mine")
    with pytest.raises(UserError, match="training holds files that no step 'training' made"):
        start(recipe, run, until="seeds", fresh=True)
    (run / "training" / "train.py").unlink()
    assert state(run) == before


def test_fresh_makes_the_steps_anew_and_leaves_all_else(run: Path, recipe: Recipe) -> None:
    (run / "notes.txt").write_text("mine")
    shard = run / "passages" / "shards" / "000000000.parquet"
    before = shard.stat().st_mtime_ns
    start(recipe, run, until="seeds")
    assert shard.stat().st_mtime_ns == before
    start(recipe, run, until="seeds", fresh=True)
    assert shard.stat().st_mtime_ns > before
    assert (run / "notes.txt").read_text() == "mine"


def test_recipe_of_another_configuration_does_not_replace_that_of_the_run(
    run: Path, tmp_path: Path
) -> None:
    before = state(run)
    with pytest.raises(UserError, match="of another configuration"):
        start(recipe_with(tmp_path, "seeds.num_seeds=5"), run, until="seeds")
    assert state(run) == before
    again = build_run(recipe_with(tmp_path), str(run))
    assert {again.state(step) for step in again.steps_until("seeds")} == {"done"}
