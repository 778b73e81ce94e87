"""What a person is told when vLLM refuses an option, does not start or dies."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from actors.embedded import embedded_model
from actors.engine import EngineConfig, EngineLog, LlmConfig, start_engine
from cluster.errors import TokayError, UserError

MODEL = "embedded:SmolLM2-135M-Instruct"

# Lines as vLLM 0.32's processes print them, shortened.
OUT_OF_MEMORY = """\
(EngineCore pid=9) ERROR 11-26 06:00:00 [core.py:1146] EngineCore encountered a fatal error.
(EngineCore pid=9) ERROR 11-26 06:00:00 [core.py:1146] torch.OutOfMemoryError: CUDA out of memory. \
Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 23.57 GiB of which 1.10 GiB is free.
(EngineCore pid=9) ERROR 11-26 06:00:01 [x.py:1] EngineDeadError: EngineCore encountered an issue.
"""
TOO_LITTLE_FREE = """\
(EngineCore pid=9) ERROR 11-26 06:00:00 [core.py:900] ValueError: Free memory on device cuda:0 \
(2.1/23.57 GiB) on startup is less than desired GPU memory utilization (0.9, 21.21 GiB). Decrease \
GPU memory utilization or reduce GPU memory used by other processes.
(EngineCore pid=9) RuntimeError: Engine core initialization failed. See root cause above.
"""
WORKER_OF_SEVERAL = """\
(Worker_TP1 pid=8) ERROR 11-26 06:00:00 [x.py:1] ValueError: 7 heads cannot be split over 2 GPUs
(EngineCore pid=9) ERROR 11-26 06:00:00 [core.py:900] Exception: WorkerProc initialization failed \
due to an exception in a background process. See stack trace for root cause.
"""


@pytest.fixture(scope="module")
def refused() -> Any:
    """Returns the one line for options that do not fit the model; no engine is started."""

    def refuse(max_model_tokens: int = 512, **settings: Any) -> str:
        llm = LlmConfig(model=MODEL, max_model_tokens=max_model_tokens)
        # Unchecked, so that it is vLLM that refuses.
        config = EngineConfig.model_construct(enforce_eager=True, kv_cache_gib=1, **settings)
        with pytest.raises(UserError) as error:
            start_engine(llm, config)
        return str(error.value)

    return refuse


def test_a_refusal_says_the_sentence_that_matters(refused: Any):
    for message in (
        refused(max_model_tokens=100_000),
        refused(gpu_memory_utilization=1.5),
    ):
        assert "\n" not in message
        assert "errors.pydantic.dev" not in message
        assert "validation error" not in message
        assert len(message) < 600
    assert "max_model_len (100000) is greater than the derived" in refused(max_model_tokens=100_000)
    assert "gpu_memory_utilization: Input should be less than or equal to 1" in message


def test_the_engine_gets_the_defaults_of_offline_work(monkeypatch: pytest.MonkeyPatch):
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    seen: dict[str, Any] = {}

    def started(arguments: Any, **given: Any) -> object:
        seen.update(given, length=arguments.max_model_len)
        return object()

    monkeypatch.setattr(AsyncLLM, "from_engine_args", started)
    _, log = start_engine(LlmConfig(model=MODEL, max_model_tokens=640), EngineConfig())
    log.delete()
    assert seen == {"usage_context": UsageContext.LLM_CLASS, "length": 640}


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (OUT_OF_MEMORY, r"CUDA out of memory.*; lower resources\.engine\.gpu_memory_utilization"),
        (TOO_LITTLE_FREE, r"Free memory on device cuda:0 \(2\.1/23\.57 GiB\).*; lower resources"),
        (WORKER_OF_SEVERAL, r"^7 heads cannot be split over 2 GPUs$"),
        ("INFO nothing happened\n", "^it gave no reason$"),
    ],
)
def test_the_reason_is_read_in_what_the_engine_printed(printed: str, expected: str):
    log = EngineLog()
    log.path.write_text(printed, encoding="utf-8")
    reason = log.reason()
    assert re.search(expected, reason)
    assert "\n" not in reason
    log.delete()


def test_a_process_begun_inside_writes_to_the_log_and_this_one_does_not(
    capfd: pytest.CaptureFixture[str],
):
    log = EngineLog()
    print("before")
    with log.capture():
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; input(); print('ValueError: late', file=sys.stderr)",
            ],
            stdin=subprocess.PIPE,
        )
    print("after")
    child.communicate(b"\n")
    assert log.reason() == "late"
    assert capfd.readouterr().out.split() == ["before", "after"]
    assert log.path.stat().st_mode & 0o077 == 0  # other users' eyes are kept out
    log.delete()
    assert not log.path.exists()


def test_a_ray_workers_engine_logs_beside_the_worker(tmp_path: Path):
    code = "from actors.engine import EngineLog; print(EngineLog().path.parent)"
    for folder, expected in (("logs", str(tmp_path / "logs")), ("mine", tempfile.gettempdir())):
        (tmp_path / folder).mkdir()
        with (tmp_path / folder / "worker.err").open("w") as err:
            said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=err)
        assert said.stdout.decode().strip() == expected


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_one_line_with_its_reason_and_its_log():
    embedded_model(MODEL)
    llm = LlmConfig(model=MODEL, max_model_tokens=256)
    with pytest.raises(TokayError) as error:
        start_engine(llm, EngineConfig(enforce_eager=True, kv_cache_gib=10_000))
    message = str(error.value)
    assert "less than requested memory for kv (10000.0 GiB)" in message
    assert "lower resources.engine" in message
    assert "\n" not in message
    path = Path(message.rpartition("its log: ")[2].rstrip(")").partition(":")[2])
    assert "Traceback" in path.read_text(encoding="utf-8")
    path.unlink()
