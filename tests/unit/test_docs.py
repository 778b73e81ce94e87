"""The pages that lead in: their links, the steps that they list, their pictures."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from pipelines.recipe.graph import OPTIONAL_STAGES, TITLES

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SVG = "{http://www.w3.org/2000/svg}"


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_has_no_dead_link(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def test_overview_lists_the_steps_in_their_order() -> None:
    page = (ROOT / "docs/overview.md").read_text()
    table = page.partition("| step |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(TITLES)


def test_picture_of_the_data_flow_has_every_step() -> None:
    picture = ElementTree.parse(ROOT / "docs/data-flow.svg")
    steps = {each.text for each in picture.iter() if each.get("class") == "name"}
    optional = (*OPTIONAL_STAGES, "gate", "probe", "cross_scores")
    assert steps == {step for step in TITLES if not step.startswith(optional)}


@pytest.mark.parametrize("picture", (ROOT / "docs").glob("*.svg"), ids=lambda file: file.name)
def test_picture_is_described_and_has_dark_colours(picture: Path) -> None:
    tree = ElementTree.parse(picture).getroot()
    assert tree.findtext(f"{SVG}title")
    assert tree.findtext(f"{SVG}desc")
    assert "prefers-color-scheme: dark" in (tree.findtext(f"{SVG}style") or "")


def test_pre_commit_checks_what_make_lint_checks() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    checks = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()[1:]]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == checks
