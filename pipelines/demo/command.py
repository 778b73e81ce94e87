"""`tokay demo`: the small recipe from end to end, and one query sent to the finished endpoint."""

import os
import subprocess
import sys
import time
from importlib.resources import files

import httpx
from rich.console import Console
from rich.text import Text

from cluster.errors import TokayError
from cluster.session import disconnect, free_port
from cluster.steps import Run
from cluster.storage import join, open_storage
from pipelines.demo.data import write_documents, write_test_set
from pipelines.recipe.read import load_recipe
from pipelines.run.execute import execute, log_folder

QUERY = "how can I find out which line of my program takes the most time"
START_LIMIT_S = 120.0


def run_demo(
    storage: str, settings: list[str], rebuild: bool, fresh: bool, console: Console
) -> None:
    """Writes the demo's data, runs its recipe on them, shows the result, and asks the endpoint."""
    begin = time.monotonic()
    data = open_storage(join(storage, "data"))
    os.environ["TOKAY_DEMO"] = data.uri  # the recipe reads it
    recipe = load_recipe(str(files("pipelines") / "demo" / "demo.yaml"), settings)
    console.print("reading the documentation of this Python environment ...", style="dim")
    with Run(storage, ()).alone():  # refuses a folder that is no run's
        written = write_documents(data), write_test_set(data, recipe.corpus)
    console.print(Text("; ".join(written)), soft_wrap=True)
    execute(recipe, storage, console, rebuild=rebuild, fresh=fresh)
    disconnect()  # the endpoint gets both cores
    _ask_endpoint(storage, console)
    console.print(f"{time.monotonic() - begin:.0f} s in all", style="dim")


def _ask_endpoint(storage: str, console: Console) -> None:
    """Starts `tokay serve` on the run, sends one query, and stops it."""
    folder = log_folder(open_storage(storage))
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "serving", storage, "--port", str(port)]
    log = folder / "serve.log"
    console.print("starting the endpoint ...", style="dim")
    with log.open("w", encoding="utf-8") as output:
        # It is asked without a key.
        environment = {name: text for name, text in os.environ.items() if name != "TOKAY_API_KEY"}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(server, url, str(log))
            answer = httpx.post(
                f"{url}/v1/search", json={"query": QUERY, "top_k": 3}, timeout=30
            ).raise_for_status()
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
    console.print(
        Text.assemble(("✓", "green"), " the endpoint answers ", (QUERY, "bold")), soft_wrap=True
    )
    for passage in answer.json()["results"]:
        text = " ".join(passage["text"].split())[:90]
        line = (f"    {passage['score']:.3f}  ", (passage["title"], "bold"), f"  {text}")
        console.print(Text.assemble(*line), soft_wrap=True)
    console.print(Text(f"serve it yourself: tokay serve {storage}"), soft_wrap=True)


def _wait(server: "subprocess.Popen[bytes]", url: str, log: str) -> None:
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        if server.poll() is not None:
            raise TokayError(f"the endpoint stopped with exit code {server.returncode}: see {log}")
        try:
            if httpx.get(f"{url}/healthz", timeout=2).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise TokayError(f"the endpoint did not answer within {START_LIMIT_S:.0f} s: see {log}")
