"""The locks: every file in them has a hash; the GPU lock is for the platform that the docs name."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.txt", "requirements-cpu.txt", "requirements-cpu-torch.txt")


def make(target: str) -> str:
    """What `make` would run for a target."""
    command = ["make", "--always-make", "--dry-run", target]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.replace("\\\n", " ")


def entries(lock: str) -> dict[str, str]:
    """Each package's part of a lock, by `name==version`."""
    parts = re.split(r"\n(?=[a-z0-9])", (ROOT / lock).read_text())
    return {part.split()[0]: part for part in parts}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_of_a_lock_is_pinned_to_files_by_their_hashes(lock: str) -> None:
    for name, part in entries(lock).items():
        assert re.fullmatch(r"[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==[^=\s]+", name)
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", part), name


def test_torchs_cpu_build_is_in_a_lock_of_its_own() -> None:
    pinned = re.search(r'"torch==(.*)"', (ROOT / "pyproject.toml").read_text())
    assert pinned
    assert list(entries("requirements-cpu-torch.txt")) == [f"torch=={pinned[1]}+cpu"]
    assert not any(name.startswith("torch==") for name in entries("requirements-cpu.txt"))


def test_installation_takes_locked_wheels_alone_and_no_second_index() -> None:
    recipe = make("install")
    installs = [line for line in recipe.splitlines() if "pip install" in line]
    for line in installs:
        locked = "--require-hashes" in line and "--only-binary :all:" in line
        assert "--no-deps" in line
        assert locked if " -r " in line else "--no-build-isolation -e ." in line
    assert [line.split(" -r ")[1] for line in installs[:-1]] == [
        "requirements-cpu-torch.txt",
        "requirements-cpu.txt",
    ]
    assert "index-url" not in recipe
    # PyTorch's page is asked for torch, and the only index with it for nothing else.
    assert "--no-index --find-links https://download.pytorch.org/whl/cpu/torch/" in recipe
    assert "page" not in installs[1]


def test_lock_for_gpus_takes_wheels_alone_for_the_glibc_that_the_docs_name() -> None:
    lines = [line for line in make("lock").splitlines() if "pip compile" in line]
    assert all({"--generate-hashes", "--only-binary"} <= set(line.split()) for line in lines)
    for_gpus = next(line for line in lines if "--extra gpu" in line)
    major, minor = re.findall(r"x86_64-manylinux_(\d+)_(\d+)", for_gpus)[0]
    named = [
        version
        for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
        for version in re.findall(r"glibc (\d+\.\d+)", page.read_text())
    ]
    assert set(named) == {f"{major}.{minor}"}
