"""The platform of the GPU lock: what `make lock` resolves for is what the docs ask of a node."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_lock_for_gpus_takes_wheels_alone_for_the_glibc_that_the_docs_name() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nlock:")[2].partition("\n\n")[0]
    lines = recipe.replace("\\\n", " ").splitlines()
    for_gpus = next(line for line in lines if "--extra gpu" in line)
    assert "--only-binary :all:" in for_gpus
    major, minor = re.findall(r"x86_64-manylinux_(\d+)_(\d+)", for_gpus)[0]
    named = [
        version
        for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
        for version in re.findall(r"glibc (\d+\.\d+)", page.read_text())
    ]
    assert set(named) == {f"{major}.{minor}"}
