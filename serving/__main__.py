"""`python -m serving MODEL`: the command `tokay serve` without the rest of Tokay."""

import sys

import typer

from cluster.errors import TokayError
from serving.command import serve


def main() -> None:
    """Runs the command; a refusal is one line and its exit code."""
    try:
        typer.run(serve)
    except TokayError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
