"""Text of others on a terminal: shown as it is, and obeyed by nobody."""

import io
import os
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from cluster.steps import Step
from pipelines.run import console
from pipelines.run.console import RunConsole
from pipelines.screen import Screen, plain


def shown(*objects: object) -> str:
    out = io.StringIO()
    screen = Screen(file=out)
    for each in objects:
        screen.print(each, soft_wrap=True)
    return out.getvalue()


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/x]", "a [red] b", ":smile:", "[link=x]y"])
def test_screen_shows_markup_of_others_as_it_is(text: str) -> None:
    table = Table(box=None)
    table.add_column("job")
    table.add_row(text)
    assert shown(text) == f"{text}\n"
    assert text in shown(table)


def test_screen_gives_the_terminal_no_orders_of_others() -> None:
    text = "a\x1b[31mred\x1b]0;title\x07\x9b2Jb\x7f\rc\td"
    out = shown(text, Text(text))
    assert not set("\x1b\x07\x9b\x7f\r") & set(out)


def test_plain_takes_out_sequences_and_controls_in_linear_time() -> None:
    assert plain("a\x1b[1;31mb\x1b[0m\nc\td\x00") == "ab\nc\td"
    assert len(plain("\x1b[" + "0" * 1_000_000)) == 1_000_001
    assert plain("\x1b[" * 500_000 + "m").count("\x1b") == 0


@pytest.mark.parametrize("command", [["keys", "corpus"], ["plan", "nosuch-é"], ["version"]])
def test_ascii_terminal_shows_a_question_mark_for_what_it_cannot(command: list[str]) -> None:
    plainest = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answer = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *command],
        capture_output=True,
        env={**os.environ, **plainest},
    )
    assert b"Traceback" not in answer.stderr
    assert answer.returncode == (2 if command[0] == "plan" else 0)


def test_run_console_marks_are_printed_on_an_ascii_terminal() -> None:
    code = (
        "from pipelines.screen import Screen, write_any_text\n"
        "from rich.text import Text\n"
        "write_any_text()\n"
        "Screen().print(Text.assemble(('\\u2713', 'green'), ' \\u2026 na\\xefve \\ud83d'))\n"
    )
    plainest = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, **plainest}
    )
    assert (answer.stdout, answer.stderr) == (b"? ? na?ve ?\n", b"")


def test_run_console_shows_notes_of_others_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", -1.0)
    step = Step(name="mixture", config={}, inputs=(), work=lambda _: {})
    out = io.StringIO()
    with RunConsole(Screen(file=out)) as shown:
        progress = shown.step_begins(step, resumed=True)
        progress.update(1, 2, "reading [/x] [bold]\x1b[2J")
    assert out.getvalue().splitlines() == [
        "… mixture: going on where it stopped",
        "… mixture: 1/2 after 0 s reading [/x] [bold]",
    ]


def test_run_console_on_a_terminal_shows_notes_of_others_as_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    step = Step(name="mixture", config={}, inputs=(), work=lambda _: {})
    out = io.StringIO()
    with RunConsole(Screen(file=out)) as shown:
        shown.step_begins(step, resumed=False).update(1, 2, "reading [/x]\x1b]0;t\x07")
        shown.progress.refresh()
    assert "reading [/x]" in out.getvalue()
    assert "\x1b]0;" not in out.getvalue() and "\x07" not in out.getvalue()
