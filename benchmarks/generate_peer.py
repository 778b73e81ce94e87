"""The step `queries`, streamed and written to Parquet, beside distilabel's text generation.

    python benchmarks/generate_peer.py FOLDER [--seeds 384] [--repeats 3] [--venv FOLDER]

FOLDER is a corpus as recipes take it. Both write answers to the same prompts with the same model,
engine settings and sampling, as Parquet; the clock runs from the moment the engine is up to the
last file. distilabel 1.5.3 runs with the vLLM that Tokay uses, in a virtual environment of its own
because its other pins clash, which is made at the first run; two calls that vLLM 0.32 no longer
accepts are adapted for it (`distilabel_generation.py`). It is measured with its own batch size, 50,
and with all prompts in one batch, which is the best that it can do and holds all of them in memory;
`ratio` is of the first, `ratio_one_batch` of the second, both of prompts per second: the
rival's requests carry no seeds, so that what it writes differs a little. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

from streamed_generation import write_step

from cluster.artifacts import Artifact
from pipelines.fret.prompts import STOP, load_prompts
from pipelines.fret.queries import query_prompts
from pipelines.ids import query_id
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.run.console import JsonLines

BATCH_SIZE = 50  # distilabel's default
PACKAGES = (
    "distilabel==1.5.3",
    "multiprocess==0.70.18",
    "dill==0.4.0",
    "nest-asyncio==1.6.0",
    "orjson==3.11.4",
    "portalocker==3.2.0",
    "tblib==3.2.2",
    "universal-pathlib==0.3.6",
    "pathlib-abc==0.5.2",
)


def make_environment(folder: Path) -> Path:
    """Returns the Python of an environment with distilabel over Tokay's own packages."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        site = next(folder.glob("lib/python*/site-packages"))
        ours = sysconfig.get_paths()["purelib"]
        (site / "tokay-packages.pth").write_text(
            f"import site; site.addsitedir({ours!r})\n", encoding="utf-8"
        )
        pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed"]
        subprocess.run([*pip, *PACKAGES], check=True)
    return python


def prompts_of(recipe: Recipe, seeds: Artifact) -> list[str]:
    """Returns the prompts that the step gives its engine."""
    from transformers import AutoTokenizer

    from actors.embedded import resolve_model
    from actors.plain_text import PlainText

    plain = PlainText(AutoTokenizer.from_pretrained(resolve_model(recipe.llm.model)))
    ask = query_prompts(recipe.queries, load_prompts())
    return [
        ask.render(
            ask.task(query_id(passage["id"])),
            passage["title"],
            plain.truncate(passage["text"], recipe.queries.max_passage_tokens),
        )
        for passage in seeds.read().to_pylist()
    ]


def distilabel(python: Path, job: dict[str, Any]) -> tuple[float, int]:
    """Runs the rival; returns its seconds without engine start, and tokens written."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True)
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "200"}
    code = "import distilabel_generation; distilabel_generation.main()"
    subprocess.run(
        [str(python), "-c", code],
        input=json.dumps(job).encode(),
        env=here,
        stdout=sys.stderr,
        check=True,
    )
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["rows"] == len(job["prompts"]), result
    return result["seconds"], result["tokens"]


def main() -> None:
    """Runs all in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--venv", type=Path, default=Path(".venv-distilabel"))
    arguments = parser.parse_args()
    python = make_environment(arguments.venv.absolute())
    recipe = load_recipe(
        "laptop", [f"corpus.path={arguments.folder}", f"seeds.num_seeds={arguments.seeds}"]
    )
    results: dict[str, list[tuple[float, int]]] = {"ours": [], "rival": [], "rival_one_batch": []}
    sys.stdout, stdout = sys.stderr, sys.stdout
    with tempfile.TemporaryDirectory(prefix="generate-") as folder:
        seeds = build_run(recipe, f"{folder}/run").execute(JsonLines(), until="seeds")["seeds"]
        job = {
            "prompts": prompts_of(recipe, seeds),
            "llm": recipe.llm.model_dump(),
            "engine": recipe.resources.engine.model_dump(),
            "generation": {
                "temperature": recipe.queries.temperature,
                "max_new_tokens": recipe.queries.max_query_tokens,
                "stop": list(STOP),
            },
        }
        sizes = {"rival": BATCH_SIZE, "rival_one_batch": arguments.seeds}
        for number in range(arguments.repeats):
            results["ours"].append(write_step(recipe, seeds, Path(folder, f"ours-{number}")))
            for name, size in sizes.items():
                place = {"folder": f"{folder}/{name}-{number}", "batch_size": size}
                results[name].append(distilabel(python, job | place))
    sys.stdout = stdout
    rates = {
        name: arguments.seeds / statistics.median(seconds for seconds, _ in rows)
        for name, rows in results.items()
    }
    print(
        json.dumps(
            {
                "benchmark": "generate_peer",
                "prompts": arguments.seeds,
                **{f"{name}_prompts_per_s": round(rate, 2) for name, rate in rates.items()},
                "ratio": round(rates["ours"] / rates["rival"], 3),
                "ratio_one_batch": round(rates["ours"] / rates["rival_one_batch"], 3),
                "seconds_and_tokens": results,
            }
        )
    )


if __name__ == "__main__":
    main()
