"""Finding our own error in what Ray reports of a failed actor, training or server.

Ray keeps the exception of a failed task as a text within a text, and of an actor that could not
start nothing but the text. So the text is what is read, whichever of Ray's libraries it is of.
"""

import re

from cluster import errors
from cluster.errors import TokayError

_OWN = re.compile(r"^\s*cluster\.errors\.(\w+): (.*)$", re.MULTILINE)
# Ray's own, such as UserCodeException, only say that there was another one.
_OTHER = re.compile(r"^(?!ray\.)[\w.]*(?:Error|Exception)\b.*$", re.MULTILINE)


def reported_error(report: str, failed: str) -> TokayError:
    """Returns the last of our own errors in a report, or one line about the last error of all.

    Args:
        report: Ray's text, with the tracebacks that it holds.
        failed: What the report is about, as in "an actor failed"; begins the line where none of
            the errors is ours.
    """
    if own := _OWN.findall(report):
        name, message = own[-1]
        kind: type[TokayError] = getattr(errors, name, TokayError)
        return kind(message.strip())
    lines = _OTHER.findall(report) or report.strip().splitlines() or ["Ray does not say why"]
    return TokayError(f"{failed}: {lines[-1]}")
