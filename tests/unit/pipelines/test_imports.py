"""What a command does not need is not imported: `tokay --help` answers at once."""

import subprocess
import sys

import pytest

HEAVY = {
    *("torch", "ray", "vllm", "transformers", "sentence_transformers", "faiss", "mteb", "datasets"),
    *("sklearn", "scipy", "pandas", "boto3", "fastapi", "openai", "matplotlib"),
}


COMMAND = "import contextlib, sys; sys.argv = ['tokay', {!r}]; from pipelines.cli import main\n"
COMMAND += "with contextlib.suppress(SystemExit): main()"


@pytest.mark.parametrize(
    "code",
    [
        COMMAND.format("--help"),
        COMMAND.format("keys"),
        # The recipe's configurations stand beside the code that they configure.
        "from pipelines.recipe.read import load_recipe; load_recipe('laptop')",
    ],
    ids=["help", "keys", "recipe"],
)
def test_nothing_heavy_is_imported_for(code: str) -> None:
    code += f"\nimport sys; print(*sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stderr.strip(), bool(ended.stdout)) == ("", "main()" in code)
