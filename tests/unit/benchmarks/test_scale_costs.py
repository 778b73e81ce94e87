"""What a run costs, as it is worked out of lines that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scale_costs
from benchmarks.scale_costs import cell, duration, fit, num_shards, of_sizes, requests


def line(passages: int, seeds: float, **given: Any) -> dict[str, Any]:
    seconds = (3 + 200e-6 * passages + 60e-6 * passages * seeds) / 2
    return {
        "step": "pairs",
        "passages": passages,
        "seeds": seeds,
        "workers": 2,
        "seconds": seconds,
        "num_rows": passages,
        "driver_over_imports_mib": 7.0,
        "largest_worker_mib": 300.0,
        "bytes": 330 * passages,
        "work_bytes": 500 * passages,
        **given,
    }


LINES = [line(10_000, 0.1), line(100_000, 0.1), line(1_000_000, 0.1), line(1_000_000, 0.5)]


def test_factors_are_those_that_the_times_were_made_of() -> None:
    factors, off = fit(of_sizes(LINES), [2 * each["seconds"] for each in LINES])
    assert factors == pytest.approx([3, 200e-6, 60e-6])
    assert off == pytest.approx(0, abs=1e-9)
    _, off = fit([[1], [1]], [1, 3])
    assert off > 0.3


def test_shards_grow_with_the_corpus() -> None:
    assert num_shards(10_240, 512) == (1, 10, 2)
    assert num_shards(10**9, 0)[1] == 10**9 / 65_536


def test_requests_are_of_shards_and_of_what_an_exchange_brings_together() -> None:
    lines = [
        line(p, 0.1, requests={"PUT": 7 + 3 * p / 1024 + 5 * p / 2560, "GET": p / 1024})
        for p in (10_240, 102_400)
    ]
    lines.append(line(10_240, 0.5, requests={"PUT": 7 + 3 * 10 + 5 * 20, "GET": 10}))
    _, shards, seed_shards = num_shards(10**8, scale_costs.SEEDS)
    puts, gets = requests("seeds", lines, 10**8)
    assert puts == pytest.approx(7 + 3 * shards + 5 * seed_shards)
    assert gets == pytest.approx(shards)
    sources = 10**8 * scale_costs.PASSAGE_BYTES / 2**24
    more = requests("pairs", lines, 10**8)[1] - gets
    assert more == pytest.approx(2 * sources * seed_shards)
    assert requests("seeds", [], 10**8) == (0, 0)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_seconds_are_said_as_people_do(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_tables_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    alone = line(100_000, 0.1, workers=1, seconds=1e9)
    by_ray = line(100_000, 0.1, by="ray.data hash_shuffle", seconds=1e9)
    done = {"step": "pairs", "done_before": True, "passages": 1}
    texts = [json.dumps(each) for each in (*LINES, alone, by_ray, done)]
    files[0].write_text("\n".join(texts))
    stored = line(10_000, 0.1, requests={"PUT": 20, "GET": 30}, seconds=1e9)
    files[1].write_text(json.dumps(stored))
    monkeypatch.setattr("sys.argv", ["scale_costs.py", *map(str, files)])
    scale_costs.main()
    printed = capsys.readouterr().out
    assert "| `pairs` | 1.5 | 200 | 60 | 0% | 330 | 500 |" in printed
    row = next(each for each in printed.splitlines() if each.startswith("| all of these |"))
    puts, gets = requests("pairs", [stored], 10**6)
    seconds = 1.5 + (200 + 30) / 12
    dollars = seconds / 3600 * 0.81 + puts * 0.005 / 1000 + gets * 0.0004 / 1000
    assert row.split(" | ")[1] == cell(seconds, puts, gets, dollars)
