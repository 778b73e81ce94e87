"""Each line of SECURITY.md names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    line
    for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| from |")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[2].strip()[:40])
def test_line_of_the_security_page_is_shown_by_tests_that_exist(row: str) -> None:
    named = re.findall(r"\[(test_\w+)\]\((tests/[\w/]+\.py)\)", row.split("|")[4])
    assert named
    for test, file in named:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:async )?def {test}\(", code, flags=re.MULTILINE), (test, file)
