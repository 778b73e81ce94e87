"""Reports as Ray 2.60's libraries gave them, some of their frames left out."""

import pytest

from cluster.errors import ArtifactError, StorageError, TokayError, UserError
from cluster.ray_errors import reported_error

BEGIN = """\
The actor died because of an error raised in its creation task, \x1b[36mray::{actor}.__init__()\
\x1b[39m (pid=15987, ip=127.0.0.1, actor_id=a6c8e85869667652488fc8b601000000, repr={actor})
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 401, in __get_result
    raise self._exception
           ^^^^^^^^^^^^^^^^
  File "/app/stages.py", line 10, in __init__
    raise {raised}
    ^^^^^^^^^^^^^^^
"""
ACTOR = BEGIN.format(actor="Actor", raised="UserError(...)") + (
    "cluster.errors.UserError: model 'x' does not exist: correct llm.model"
)
ACTOR_OTHER = BEGIN.format(actor="Actor", raised="ValueError(...)") + "ValueError: bad\nsecond line"
KILLED = """\
The actor died unexpectedly before finishing this task.
\tclass_name: Actor
\tactor_id: 296fb20a1a9e1bf3d5cb80e201000000
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file."""
DATA = """\
\x1b[36mray::MapWorker(MapBatches(D)).submit()\x1b[39m (pid=16304, ip=127.0.0.1, \
actor_id=2764a4e5c8bb4c61ebe8d9ee01000000, repr=MapWorker(MapBatches(D)))
  File "/app/stages.py", line 32, in __call__
    raise {raised}
    ^^^^^^^^^^^^^^^
{raised}

The above exception was the direct cause of the following exception:

\x1b[36mray::MapWorker(MapBatches(D)).submit()\x1b[39m (pid=16304, ip=127.0.0.1, \
actor_id=2764a4e5c8bb4c61ebe8d9ee01000000, repr=MapWorker(MapBatches(D)))
ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure \
`ray.data.DataContext.get_current()` (`retried_io_errors` for I/O; `retried_map_errors` and \
`max_map_retries` for any task) if you believe this to be transient."""
TRAIN = """\
Training failed due to worker errors:
[Rank 0,1 Error Snippet]:
Traceback (most recent call last):
  File "/app/worker.py", line 42, in worker
    raise UserError(...)
    ^^^^^^^^^^^^^^^^^^^^
{raised}
"""
SERVE = """\
Failed to update the deployments ['S'].
The deployment failed to start 3 times in a row. This may be due to a problem with its constructor \
or initial health check failing. See controller logs for details. Error:
\x1b[36mray::ServeReplica:tokay:S.initialize_and_get_metadata()\x1b[39m (pid=18244, ip=127.0.0.1)
  File "/site-packages/ray/serve/_private/replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/app/served_model.py", line 64, in __init__
    raise {raised}
    ^^^^^^^^^^^^^^^
{raised}"""
SERVE_KILLED = """\
Failed to update the deployments ['S'].
The deployment failed to start 3 times in a row. This may be due to a problem with its constructor \
or initial health check failing. See controller logs for details. Error:
ActorDiedError()"""


@pytest.mark.parametrize(
    ("report", "kind", "message"),
    [
        (ACTOR, UserError, "model 'x' does not exist: correct llm.model"),
        (
            DATA.format(raised="cluster.errors.StorageError: cannot use s3://x: no; check it"),
            StorageError,
            "cannot use s3://x: no; check it",
        ),
        (
            TRAIN.format(raised="cluster.errors.UserError: worker 0: lower batch_size"),
            UserError,
            "worker 0: lower batch_size",
        ),
        (
            SERVE.format(raised="cluster.errors.ArtifactError: artifact x: it holds no shards"),
            ArtifactError,
            "artifact x: it holds no shards",
        ),
    ],
    ids=["actor", "data", "train", "serve"],
)
def test_own_error_keeps_its_kind_and_message(
    report: str, kind: type[TokayError], message: str
) -> None:
    error = reported_error(report, "it failed")
    assert (type(error), str(error)) == (kind, message)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (ACTOR_OTHER, "it failed: ValueError: bad"),
        (KILLED, f"it failed: {KILLED.splitlines()[-1]}"),
        (DATA.format(raised="ValueError: bad"), "it failed: ValueError: bad"),
        (
            TRAIN.format(raised="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"),
            "it failed: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate",
        ),
        (SERVE.format(raised="ValueError: bad"), "it failed: ValueError: bad"),
        (SERVE_KILLED, "it failed: ActorDiedError()"),
        ("", "it failed: Ray does not say why"),
    ],
    ids=["actor", "killed", "data", "train", "serve", "serve killed", "nothing"],
)
def test_error_of_others_is_one_line(report: str, message: str) -> None:
    error = reported_error(report, "it failed")
    assert (type(error), str(error)) == (TokayError, message)


def test_last_of_several_own_errors_counts() -> None:
    report = "cluster.errors.EngineDied: first\n  cluster.errors.UserError: second\nKeyError: 'x'"
    error = reported_error(report, "it failed")
    assert (type(error), str(error)) == (UserError, "second")
