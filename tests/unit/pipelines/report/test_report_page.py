"""The page and the terminal's table, as a reader and as a browser would take them."""

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from cluster.artifacts import Json
from pipelines.report.page import render_page, show_duration
from pipelines.report.terminal import print_evaluation
from pipelines.report.write import write_report

HOSTILE = (
    "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>"
    """"' & {{ 7*7 }} [red]$x^$"""
)


class Page(HTMLParser):
    """Collects what the page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(report: dict[str, Json]) -> tuple[Page, str]:
    text = Path(report["html"]).read_text()
    return Page(text), text


def test_page_asks_for_nothing_outside_itself(report: dict[str, Json]) -> None:
    page, text = page_of(report)
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_page_may_run_no_script_even_if_one_got_in(report: dict[str, Json]) -> None:
    page, _ = page_of(report)
    policies = [value for name, value in page.attributes if name == "content" and "-src" in value]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    assert page.tags.index("meta") < page.tags.index("style")


def test_page_links_only_to_what_is_there(report: dict[str, Json]) -> None:
    page, text = page_of(report)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in page.attributes if name in ("href", "xlink:href")}
    assert targets | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_page_holds_its_figures_as_text_in_the_page_colours(report: dict[str, Json]) -> None:
    page, text = page_of(report)
    # Scores, funnel, seed ranks, shifts, loss, learning rate, throughput, steps.
    assert page.tags.count("svg") == 8
    assert "not repeating another query" in page.text
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--accent)" in svgs and not re.search(r"#0[1-5]0[1-5]0[1-5]", svgs)


def test_page_and_table_escape_hostile_text(build_run: Callable[..., str]) -> None:
    report = write_report(build_run(decoration=HOSTILE))
    page, _ = page_of(report)
    assert "img" not in page.tags and "script" not in page.tags
    assert not [name for name, _ in page.attributes if name == "onerror"]
    for shown in ("tiny", "query 0", "question answering", "text 0", "question e1", "empty"):
        assert f"{shown}{HOSTILE}" in page.text, shown
    console = Console(file=io.StringIO(), width=200)
    print_evaluation(report, console)
    assert f"question e1{HOSTILE}" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
def test_print_evaluation_fits_a_terminal(report: dict[str, Json], width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_evaluation(report, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    (after,) = [line for line in lines if line.startswith("Student after")]
    assert re.match(r"Student after +0\.823 \[0\.\d{3}, 0\.\d{3}\] +1\.000 .* 14\.0 M$", after)
    assert any(line.startswith("after - before: nDCG@10 +0.019 [-0.") for line in lines)
    assert any(line.startswith("0.50 → 1.00  question e1") for line in lines)
    found = re.compile(r"[✓·] title 1  text 1 .*[✓·] title 0  text 0")
    assert any(found.match(line) for line in lines)


def test_print_evaluation_of_a_run_without_one_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: begun\n")
    (tmp_path / ".tokay").touch()
    console = Console(file=io.StringIO(), width=80)
    print_evaluation(write_report(str(tmp_path)), console)
    assert "no evaluation" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (3599.6, "1 h 00 min")],
)
def test_show_duration_reads_as_a_person_says_it(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown


def gated(report: dict[str, Json], weight: float) -> dict[str, Json]:
    """The report of a run with a gate that chose this weight."""
    decision = "The trained student was not better than its start on 512 held-out queries."
    candidates = [
        {"weight": 0.0, "name": "the start", "ndcg_at_10": 0.5},
        {
            "weight": 1.0,
            "name": "the trained student",
            "ndcg_at_10": 0.497,
            "difference": -0.003,
            "interval": [-0.01, 0.004],
            "p": 0.81,
        },
    ]
    return report | {
        "gate": {
            "weight": weight,
            "exported": "the start",
            "decision": decision,
            "candidates": candidates,
            "num_queries": 512,
            "num_passages": 2000,
            "queries": {"title": 300, "first sentence": 212},
            "notes": ["There are few."],
        }
    }


def test_page_says_first_what_the_gate_chose_and_why(report: dict[str, Json]) -> None:
    document = gated(report, 0.0)
    page = Page(render_page(document, ""))
    decision = document["gate"]["decision"]
    assert page.text.index(decision) < page.text.index("Evaluation", page.text.index(decision))
    assert page.text.index(decision) < page.text.index("recall@10")
    assert "-0.003" in page.text and "-0.010 to +0.004" in page.text and "0.81" in page.text
    assert "title: 300, first sentence: 212" in page.text and "There are few." in page.text
    assert "Student after (its start)" in page.text
    assert "gate" in {value for name, value in page.attributes if name == "id"}
    assert "What was exported" not in page_of(report)[0].text


@pytest.mark.parametrize(
    ("weight", "title"),
    [(0.0, "Student after (its"), (0.25, "Student after (0.25"), (1.0, "Student after  ")],
)
def test_terminal_says_first_what_the_gate_chose_and_why(
    report: dict[str, Json], weight: float, title: str
) -> None:
    document = gated(report, weight)
    console = Console(file=io.StringIO(), width=120)
    print_evaluation(document, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.strip().startswith(document["gate"]["decision"])
    assert "There are few." in printed
    assert any(line.startswith(title) for line in printed.splitlines())
