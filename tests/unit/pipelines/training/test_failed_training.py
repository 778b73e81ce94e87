"""What a person reads when Ray Train's workers have failed."""

import pytest
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.errors import TokayError, UserError
from pipelines.training.train import _cause

SNIPPETS = "[Rank 0,1 Error Snippet]:\nTraceback (most recent call last):\nKeyError: 'cut'"
LONG = f"student {'x' * 600}: set student.model"  # Ray's own text would cut it


@pytest.mark.parametrize(
    ("failures", "kind", "message"),
    [
        ({1: UserError("second"), 0: UserError("first")}, UserError, "first"),
        ({0: ConnectionError("closed by peer"), 1: UserError(LONG)}, UserError, LONG),
        (
            {3: ValueError("bad"), 2: KeyError("batch")},
            TokayError,
            "training failed on worker 2: KeyError: 'batch'",
        ),
    ],
    ids=["two of ours", "one of ours", "others"],
)
def test_reason_is_our_own_or_the_first_workers(
    failures: dict[int, Exception], kind: type[TokayError], message: str
) -> None:
    cause = _cause(WorkerGroupError(SNIPPETS, failures))
    assert (type(cause), str(cause)) == (kind, message)


def test_reason_of_an_error_that_caused_another_is_given() -> None:
    failure = RuntimeError("the worker ended")
    failure.__cause__ = UserError("student 'x' does not exist: correct student.model")
    cause = _cause(WorkerGroupError(SNIPPETS, {0: failure}))
    assert (type(cause), str(cause)) == (UserError, str(failure.__cause__))


def test_lost_worker_is_named_as_ray_names_it() -> None:
    lost = RuntimeError("The actor died unexpectedly.\nIts worker process has died.")
    assert str(_cause(ControllerError(lost))) == "training failed: Its worker process has died."
