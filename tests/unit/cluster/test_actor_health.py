"""Actors that note where they begin: which deaths count, and who is there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from cluster import actor_health
from cluster.actor_health import MAX_DEATHS, actor_begins, clear_actors
from cluster.errors import TokayError
from cluster.storage import Storage, open_storage


class Nodes:
    """The cluster as an actor sees it: the nodes that are alive, and the one it is on."""

    alive: set[str] = {"a", "b"}  # noqa: RUF012
    here = "a"
    actor = "1"


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    nodes = Nodes()
    context = SimpleNamespace(
        get_actor_id=lambda: nodes.actor,
        get_node_id=lambda: nodes.here,
        get_worker_id=lambda: "ffff",
    )
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(actor_health, "_alive_nodes", lambda: nodes.alive)
    monkeypatch.setattr(actor_health, "_exit_reason", lambda worker: f"{worker} was killed")
    return nodes


@pytest.fixture
def notes(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "scores")


def test_actor_may_begin_anew_a_few_times(nodes: Nodes, notes: Storage) -> None:
    for _ in range(1 + MAX_DEATHS):
        actor_begins(notes, "stage")
    with pytest.raises(
        TokayError, match=r"^step 'scores': an actor died 4 times .*ffff was killed"
    ):
        actor_begins(notes, "stage")
    nodes.actor = "2"  # another's deaths are its own
    actor_begins(notes, "stage")


def test_loss_of_nodes_counts_for_nothing(nodes: Nodes, notes: Storage) -> None:
    for number in range(3 * MAX_DEATHS):
        nodes.here = f"spot {number}"
        nodes.alive = {"a", nodes.here}
        actor_begins(notes, "stage")


def test_actor_is_there_while_its_last_node_is(nodes: Nodes, notes: Storage) -> None:
    for nodes.actor, nodes.here in (("1", "a"), ("2", "b"), ("2", "a"), ("3", "b")):
        actor_begins(notes, "stage")
    actor_begins(notes, "index")
    assert actor_health._num_running(notes, "stage") == 3
    nodes.alive = {"a"}
    assert actor_health._num_running(notes, "stage") == 2
    clear_actors(notes, "stage")
    assert actor_health._num_running(notes, "stage") == 0
    nodes.alive = {"b"}
    assert actor_health._num_running(notes, "index") == 1
