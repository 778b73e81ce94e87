import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import Part, make_plan, markdown, read_figures, run_part

EQUIPPED: dict[str, Any] = {
    "python": "3.12.3",
    "packages": dict.fromkeys(("torch", "transformers", "pydantic", "pytest"), "1.0"),
    "embedded": True,
    "gpu": "NVIDIA H100",
    "gpu_gib": 79.2,
    "sm": 90,
    "driver": "580.159",
    "faiss_gpus": 1,
    "vllm_cuda": True,
}
BARE: dict[str, Any] = {
    "python": "3.12.3",
    "packages": {"torch": "2.13.0"},
    "embedded": False,
    "faiss": "faiss-cpu is installed",
    "vllm": "ModuleNotFoundError: No module named 'vllm'",
}


def python(code: str) -> Part:
    return Part(name="part", command=[sys.executable, "-c", code], share=1)


def test_every_part_runs_where_nothing_is_absent(tmp_path: Path):
    plan = make_plan(EQUIPPED, corpus=str(tmp_path), small=False)
    assert [part.lacks for part in plan] == [None] * len(plan)
    assert [part.name for part in plan if part.name.startswith("tests/gpu/test_")]
    assert [part.name for part in plan][-3:] == [
        "flat_search.py",
        "training_steps.py",
        "relabel.py",
    ]


@pytest.mark.parametrize(
    ("here", "lacking"),
    [
        (
            BARE,
            [
                "needs faiss-gpu and a GPU it finds: faiss-cpu is installed",
                "pip install transformers pydantic pytest",
                "PyTorch finds no GPU",
            ],
        ),
        (
            EQUIPPED | {"vllm_cuda": False, "vllm": "its platform here is cpu"},
            [None, None, "needs vLLM's build for CUDA: its platform here is cpu"],
        ),
        (EQUIPPED, [None, None, "needs a corpus in BEIR's layout: make gpu CORPUS=FOLDER"]),
    ],
)
def test_a_part_tells_what_it_lacks(here: dict[str, Any], lacking: list[str | None]):
    assert [part.lacks for part in make_plan(here, corpus=None, small=False)[-3:]] == lacking


def test_tests_are_counted_and_their_reasons_told(tmp_path: Path):
    Path(tmp_path, "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_ok(n): ...\n"
        "@pytest.mark.parametrize('n', range(2))\n"
        "def test_absent(n): pytest.skip('no such card')\n"
        "def test_wrong(): assert 1 == 2, 'far off'\n"
    )
    pytest_here = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    part = Part(name="tests", command=pytest_here, share=1)
    run_part(part, limit_s=60)
    assert (part.state, part.tests) == ("failed", {"passed": 3, "failed": 1, "skipped": 2})
    assert "no such card (2)" in part.reason
    assert "test_wrong: AssertionError: far off" in part.reason


def test_a_crash_and_a_refusal_are_failures_with_a_reason():
    part = python("import os; print('before'); os.abort()")
    run_part(part, limit_s=30)
    assert (part.state, part.reason) == ("failed", "exit code -6: before")
    part = python("raise MemoryError('of the card')")
    run_part(part, limit_s=30)
    assert (part.state, part.reason) == ("failed", "exit code 1: MemoryError: of the card")


def test_a_part_that_hangs_is_stopped_and_its_measurements_are_kept():
    code = (
        "import subprocess, sys, time\n"
        "print('bert float32 plain', '{\"step_s\": 0.5}', file=sys.stderr, flush=True)\n"
        "subprocess.Popen(['sleep', '60'])\n"  # holds the pipes too
        "time.sleep(60)\n"
    )
    part = python(code)
    run_part(part, limit_s=3)
    assert (part.state, part.reason) == ("failed", "stopped at its limit of 3 s")
    assert part.figures == {"figures": {"bert": {"float32": {"plain": {"step_s": 0.5}}}}}
    assert part.seconds < 15


def test_a_benchmark_s_figures_are_its_last_line():
    assert read_figures(['{"seen": 1}', "[1]", '{"rows": 2}', "done"], []) == {"rows": 2}


def test_the_table_holds_machine_parts_steps_and_sums():
    modes = {"plain": {"step_s": 0.5, "tokens_per_s": 9}, "auto": {"out_of_memory": True}}
    parts = [
        Part(
            name="tests/gpu/test_a.py",
            command=[],
            share=1,
            state="failed",
            seconds=61.4,
            tests={"passed": 3, "failed": 1, "skipped": 0},
            reason="test_x: a | b",
        ),
        Part(
            name="training_steps.py",
            command=[],
            share=1,
            state="passed",
            seconds=99.6,
            figures={
                "device": "H100",
                "peak_tflops": None,
                "figures": {"bert": {"parameters_m": 110, "float32": modes}},
            },
        ),
        Part(name="relabel.py", command=[], share=1, reason="no corpus"),
    ]
    assert markdown(EQUIPPED | {"packages": {"torch": "2.11"}}, parts, 180).splitlines() == [
        "**NVIDIA H100 (79.2 GiB, sm_90)**, driver 580.159, Python 3.12.3, torch 2.11",
        "",
        "| part | result | seconds | figures | why |",
        "|---|---|---|---|---|",
        "| tests/gpu/test_a.py | failed | 61 | 3 passed, 1 failed | test_x: a \\| b |",
        "| training_steps.py | passed | 100 | device H100 |  |",
        "| relabel.py | skipped | 0 |  | no corpus |",
        "",
        "| training step | step_s | tokens_per_s | out_of_memory |",
        "|---|---|---|---|",
        "| bert float32 plain | 0.5 | 9 |  |",
        "| bert float32 auto |  |  | True |",
        "",
        "Parts: 1 passed, 1 failed, 1 skipped; tests: 3 passed, 1 failed, 0 skipped; 3.0 minutes.",
    ]


def test_a_failing_part_loses_no_other_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    parts = [python("1 / 0"), python("print('{\"rows\": 7}')")]
    monkeypatch.setattr(gpu, "look_around", lambda: EQUIPPED)
    monkeypatch.setattr(gpu, "make_plan", lambda *_: parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert "| part | passed | 0 | rows 7 |  |" in capsys.readouterr().out


def test_no_part_begins_when_the_minutes_are_spent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu, "look_around", lambda: EQUIPPED)
    monkeypatch.setattr(gpu, "make_plan", lambda *_: [python("print('begun')")])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "0.5"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "| part | skipped | 0 |  | no time left of 0.5 minutes" in capsys.readouterr().out


ALONE = """
import importlib.machinery, sys
ABSENT = {"boto3", "botocore", "faiss", "fastapi", "httpx", "mteb", "peft", "pyarrow", "ray",
          "sentence_transformers", "vllm", "pytest_timeout"}
class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *given, **named):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, *given, **named)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare
import benchmarks.training_steps, pytest
sys.exit(pytest.main(["tests/gpu", "--collect-only", "-p", "no:cacheprovider", "-p", "no:timeout"]))
"""


def test_the_gpu_half_needs_torch_transformers_pydantic_and_pytest_alone():
    alone = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=gpu.ROOT, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
