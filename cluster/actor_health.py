"""Which of a step's actors run: missing ones are reported, and deaths are counted.

Ray restarts a dead actor for ever. That is right for a lost node, but never ends where an actor
runs out of memory over the same shard each time. So every actor notes in its step's folder where it
starts; from its own notes it sees how often it died, and on which nodes.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.errors import StorageError, TokayError
from cluster.steps import StepContext
from cluster.storage import Storage, join

MAX_DEATHS = 3  # of an actor, on nodes that are still alive
_FOLDER = "work/actors"
_LOOK_EVERY_S = 5.0


def actor_begins(notes: Storage, kind: str) -> None:
    """Notes in the step's folder that this Ray actor or task, one of a `kind`, starts.

    Called first in its constructor, which each restart runs, or in the task.

    Raises:
        TokayError: It died too often on nodes that are still alive, so it is no node's fault.
    """
    import ray

    context = ray.get_runtime_context()
    name = context.get_actor_id() or context.get_task_id()  # the same whenever it starts
    path = f"{_FOLDER}/{kind}/{name}.json"
    lives = _lives(notes, path)
    alive = _alive_nodes()
    deaths = [life for life in lives if life["node"] in alive]
    if len(deaths) > MAX_DEATHS:
        raise TokayError(
            f"step {notes.uri.rpartition('/')[2]!r}: an actor died {len(deaths)} times on nodes"
            f" that are still alive, the last time so: {_exit_reason(deaths[-1]['worker'])}; most"
            " often its memory did not suffice: give it a larger node or fewer shards_in_flight,"
            " and run again, for what is done stays"
        )
    lives.append({"node": context.get_node_id(), "worker": context.get_worker_id()})
    notes.write_bytes(path, json.dumps(lives).encode())


def clear_actors(notes: Storage, kind: str) -> None:
    """Forgets the actors of an earlier run."""
    notes.delete(join(_FOLDER, kind))


@contextmanager
def report_waiting(
    context: StepContext,
    kind: str,
    wanted: int,
    needs: Mapping[str, float],
    done: Callable[[], tuple[float, float | None]] = lambda: (0, None),
) -> Iterator[None]:
    """Reports to the step's progress, until the block ends, which actors wait for a place.

    Args:
        context: The step's.
        kind: Of the actors.
        wanted: How many actors there should be.
        needs: What each asks Ray for, by Ray's names.
        done: Returns how far the step is, and of how much.
    """
    ended = threading.Event()

    def look() -> None:
        since, reported = time.monotonic(), ""
        while not ended.wait(_LOOK_EVERY_S):
            try:
                missing = wanted - _num_running(context.storage, kind)
            except StorageError:
                continue  # the actors will fail with it, if it lasts
            note = ""
            if missing > 0:
                waited_s = time.monotonic() - since
                duration = f"{waited_s:.0f} s" if waited_s < 60 else f"{waited_s // 60:.0f} min"
                note = f"waiting for {missing} of {wanted} actors ({_places(needs)}): {duration}"
            else:
                since = time.monotonic()
            if note != reported:
                context.progress.update(*done(), note)
                reported = note

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _num_running(notes: Storage, kind: str) -> int:
    """Counts the actors that have begun on a node that is alive."""
    alive = _alive_nodes()
    lives = [_lives(notes, path) for path in notes.list(join(_FOLDER, kind))]
    return sum(bool(each) and each[-1]["node"] in alive for each in lives)


def _lives(notes: Storage, path: str) -> list[dict[str, str]]:
    try:
        lives: list[dict[str, str]] = json.loads(notes.read_bytes(path))
    except FileNotFoundError:
        return []
    return lives


def _alive_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _places(needs: Mapping[str, float]) -> str:
    """Says what an actor asks for, and how much of that the cluster has now."""
    import ray

    total = ray.cluster_resources()
    each = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
    has = ", ".join(f"{total.get(name, 0):g} {name}" for name, amount in needs.items() if amount)
    return f"each {each}; the cluster has {has}"


def _exit_reason(worker_id: str) -> str:
    """Returns what Ray noted of a worker's end, which only its state API gives.

    That API needs the dashboard, which a local Ray does not have; so its source is read instead.
    """
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    connect: Any = state._connect_and_get_accessor
    for content in connect().get_worker_table():
        row = gcs_pb2.WorkerTableData.FromString(content)
        if row.worker_address.worker_id.hex() == worker_id and row.exit_detail:
            text = " ".join(row.exit_detail.split())
            return str(text.partition(" Some common causes")[0][:300])
    return "Ray does not know why"
