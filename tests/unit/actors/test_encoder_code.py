"""No code of somebody's model runs unless it is trusted, whoever reads the folder."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.encoder import Encoder
from actors.parity import check_parity
from cluster.errors import UserError
from pipelines.training.layers import add_projection


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    encoder = Encoder.load(str(tiny_model("bert", tmp_path / "plain")), device="cpu")
    add_projection(encoder, 16)
    encoder.save(tmp_path / "model", model_card="")
    return tmp_path / "model"


def change(path: Path, keys: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def write_code(folder: Path, marker: Path) -> None:
    """Puts a model and a tokenizer of its own beside the weights; importing it leaves a marker."""
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n"
        "from transformers import BertConfig, BertModel, BertTokenizer\n"
        "class OwnConfig(BertConfig):\n    model_type = 'bert'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(BertTokenizer):\n    pass\n"
    )


MAPS = {
    "config.json": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.OwnTokenizer", None]},
}


@pytest.mark.parametrize("file", MAPS)
@pytest.mark.parametrize("kind", ["bert", "no-such-model"])
def test_code_of_a_model_is_not_run_unless_it_is_trusted(
    file: str, kind: str, folder: Path, tmp_path: Path
):
    marker = tmp_path / "marker"
    write_code(folder, marker)
    change(folder / file, {"auto_map": MAPS[file]})
    if file == "config.json":
        change(folder / file, {"model_type": kind})
    for load in (Encoder.load, check_parity):
        with pytest.raises(UserError, match=rf"{file}: auto_map .* trust_remote_code"):
            load(str(folder))
    assert not marker.exists()
    if kind == "bert":
        Encoder.load(str(folder), trust_remote_code=True).encode(["wing"])
        assert marker.exists()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("how", ["module", "activation"])
def test_class_that_a_folder_names_is_not_imported(
    how: str, trust: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    marker = tmp_path / "marker"
    write_code(folder, marker)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    if how == "module":
        modules = json.loads((folder / "modules.json").read_text())
        modules[3]["type"] = "own.OwnModel"
        (folder / "modules.json").write_text(json.dumps(modules))
    else:
        change(folder / "2_Dense/config.json", {"activation_function": "own.OwnModel"})
    for load in (Encoder.load, check_parity):
        with pytest.raises(UserError, match=r"own\.OwnModel"):
            load(str(folder), trust_remote_code=trust)  # type: ignore[operator]
    assert not marker.exists()
    assert "own" not in sys.modules


def test_folder_of_the_hub_is_fetched_without_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from actors.encoder_files import local_folder

    asked: list[list[str]] = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    local_folder("somebody/model")
    local_folder("somebody/model", trust_remote_code=True)
    assert ["*.py" in patterns for patterns in asked] == [False, True]
    assert not any("bin" in pattern for patterns in asked for pattern in patterns)
