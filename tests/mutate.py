"""Changes the code a little, in one place at a time, and shows which changes no test notices.

`make mutate` runs it, with mutmut beside the packages of .venv. Mutants are made and tested in a
copy of the checkout; each meets the tests that reach the function it changes. mutmut changes
functions and methods: constants of a module, and functions behind most decorators, it leaves alone.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# What decides on labels, vectors and rows, and the tests that are to notice a change of it. Behind
# a file may stand which of its functions is meant.
SUBJECTS = {
    "pipelines/fret/fusion.py": ["tests/unit/pipelines/fret/test_fusion.py"],
    "pipelines/fret/judging.py": ["tests/unit/pipelines/fret/test_judging.py"],
    "pipelines/corpus/cutting.py": [
        "tests/unit/pipelines/corpus/test_cutting.py",
        "tests/unit/pipelines/test_words.py::test_any_text_is_cut_within_the_limit_and_loses_nothing",
    ],
    "pipelines/mixture/sampling.py": ["tests/unit/pipelines/mixture/test_sampling.py"],
    "pipelines/training/loss.py": ["tests/unit/pipelines/training/test_loss.py"],
    "pipelines/training/gradients.py": ["tests/unit/pipelines/training/test_gradients.py"],
    "actors/kernels/packing.py:cut_batches": ["tests/unit/actors/kernels/test_packing.py"],
    "actors/passage_index.py": ["tests/unit/actors/test_passage_index.py"],
    "cluster/artifacts.py": ["tests/unit/cluster/test_artifacts.py"],
    "cluster/steps.py": ["tests/unit/cluster/test_steps.py"],
    "serving/batching.py": ["tests/unit/serving/test_serving_batching.py"],
}
LIMIT_S = 900  # of one file
SURVIVED, UNREACHED = 0, 33  # mutmut's exit codes: its tests pass; no test comes there


def copy_checkout(folder: Path) -> None:
    """Copies what git tracks, or would."""
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], text=True)
    for name in filter(None, listed.split("\0")):
        if Path(name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, folder / name)


def run_mutants(
    source: str, function: str, tests: list[str], folder: Path
) -> dict[str, int | None]:
    """Returns mutmut's exit code of each mutant, None of those for which there was no time."""
    copy_checkout(folder)
    settings = {
        "source_paths": [source],
        "also_copy": sorted(each.name for each in folder.iterdir() if each.name != "tests"),
        "pytest_add_cli_args_test_selection": tests,
        "timeout_multiplier": 5,
        "use_git_change_detection": False,
    }
    with (folder / "pyproject.toml").open("a") as file:
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        file.write("\n[tool.mutmut]\n" + "".join(lines))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mutmut",
                "run",
                "--max-children",
                "1",
                f"*{function}__mutmut_*",
            ],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
        try:
            failed = process.wait(LIMIT_S) != 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends the mutants that run
            process.wait()
            failed = False
    if failed:
        raise SystemExit(f"{source}: mutmut failed\n{(folder / 'log').read_text()[-3000:]}")
    (meta,) = folder.glob(f"mutants/{source}.meta")
    codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
    return {name: code for name, code in codes.items() if f"{function}__mutmut_" in name}


def difference(mutant: str, source: str, folder: Path) -> str:
    from mutmut.mutation.diff_apply import get_diff_for_mutant  # type: ignore[import-not-found]

    with contextlib.chdir(folder):
        lines = get_diff_for_mutant(mutant, path=source).splitlines()[3:]
    changed = [f"    {line}" for line in lines if line[:1] in ("+", "-")]
    return "\n".join([mutant.rpartition(".")[2], *changed])


def main(wanted: str) -> None:
    names = {Path(subject.partition(":")[0]).stem: subject for subject in SUBJECTS}
    if wanted and wanted not in names:
        raise SystemExit(f"MODULE={wanted}: accepted are {', '.join(names)}")
    headings = ("mutants", "killed", "survived", "unreached", "not run")
    table = [" " * 34 + "".join(f"{heading:>10}" for heading in headings)]
    for subject in [names[wanted]] if wanted else SUBJECTS:
        source, _, function = subject.partition(":")
        with tempfile.TemporaryDirectory() as name:
            codes = run_mutants(source, function, SUBJECTS[subject], Path(name))
            for mutant in (mutant for mutant, code in codes.items() if code == SURVIVED):
                print(difference(mutant, source, Path(name)), flush=True)
        unreached = {m.partition("__mutmut")[0] for m, code in codes.items() if code == UNREACHED}
        if unreached:
            print("no test reaches", ", ".join(sorted(unreached)))
        counts = [[*codes.values()].count(code) for code in (SURVIVED, UNREACHED, None)]
        figures = (len(codes), len(codes) - sum(counts), *counts)
        table.append(f"{subject:34}" + "".join(f"{figure:10}" for figure in figures))
        print(table[-1], flush=True)
    print("\n".join(table))


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
