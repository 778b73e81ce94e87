import socket
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from actors.embedded import embedded_model
from cluster.artifacts import Manifest, list_files
from cluster.errors import UserError
from cluster.storage import open_storage
from serving.app import ServeOptions
from serving.command import check_port, find_model

SERVE_YAML = Path(__file__).parents[3] / "serving" / "serve.yaml"


def finish(folder: Path, step: str) -> None:
    storage = open_storage(folder)
    manifest = Manifest(step=step, fingerprint="f", config={}, inputs={}, files=list_files(storage))
    storage.write_bytes("manifest.json", manifest.to_json())


def test_run_folder_gives_its_export_and_index(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    (run / "export/model").mkdir(parents=True)
    (run / "export/model/config.json").write_text("{}")
    with pytest.raises(UserError, match="no finished export"):
        find_model(str(run))
    finish(run / "export", "export")
    served = find_model(str(run))
    assert (served.model, served.name) == (str(run / "export/model"), "demo")
    assert served.index is None
    (run / "index").mkdir()
    finish(run / "index", "index")
    assert find_model(f"{run}/").index == str(run / "index")
    assert find_model(str(run / "export/model")).name == "demo"


def test_model_folder_and_embedded_model_are_found() -> None:
    folder = embedded_model("embedded:all-MiniLM-L6-v2")
    assert find_model("embedded:all-MiniLM-L6-v2").name == "all-MiniLM-L6-v2"
    assert find_model(str(folder)).model == str(folder)


def test_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_model(str(tmp_path / "nothing"))


def test_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* is in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen"):
        check_port("192.0.2.1", port)


def unknown_keys(given: Any, schema: Any, where: str = "") -> list[str]:
    """Names the keys that a schema lacks; Ray's own validation takes any."""
    if isinstance(given, list):
        inner = get_args(schema)[0]
        return [key for row in given for key in unknown_keys(row, inner, where)]
    for option in (schema, *get_args(schema)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            fields = option.model_fields
            found = [f"{where}{key}" for key in given if key not in fields]
            for key in set(given) & set(fields):
                if key != "args":
                    found += unknown_keys(given[key], fields[key].annotation, f"{where}{key}.")
            return found
    return []


def test_serve_yaml_has_only_keys_that_ray_knows() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(SERVE_YAML.read_text())
    ServeDeploySchema.model_validate(config)
    assert unknown_keys(config, ServeDeploySchema) == []
    # The comparison itself sees a misspelt key at every depth.
    config["http_options"]["prot"] = 1
    config["applications"][0]["rout_prefix"] = "/"
    expected = ["applications.rout_prefix", "http_options.prot"]
    assert sorted(unknown_keys(config, ServeDeploySchema)) == expected


def test_serve_yaml_builds_the_application() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from serving import app

    (application,) = yaml.safe_load(SERVE_YAML.read_text())["applications"]
    assert application["import_path"] == "serving.app:build"
    options = ServeOptions.model_validate(application["args"])
    built = call_user_app_builder_with_args_if_necessary(app.build, application["args"])
    deployment = built._bound_deployment
    assert deployment.num_replicas == options.replicas == 2
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    with pytest.raises(ValidationError, match="batch_token"):
        ServeOptions.model_validate({**application["args"], "batch_token": 1})
