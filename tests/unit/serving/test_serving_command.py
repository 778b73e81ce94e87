import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError

from actors.embedded import embedded_model
from cluster.artifacts import Manifest, list_files, write_artifact
from cluster.errors import UserError
from cluster.storage import open_storage
from serving.app import ServeOptions, TokayServer
from serving.command import check_port, find_hosts, find_model, hash_key, network_warning
from serving.protocol import RequestLimits

SERVE_YAML = Path(__file__).parents[3] / "serving" / "serve.yaml"


def finish(folder: Path, step: str) -> None:
    storage = open_storage(folder)
    manifest = Manifest(step=step, fingerprint="f", config={}, inputs={})
    write_artifact(storage, manifest, list_files(storage))


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
    # Without these, Serve lets any number of requests wait.
    assert deployment.max_ongoing_requests == 4096
    assert deployment.max_queued_requests == 1024
    with pytest.raises(ValidationError, match="batch_token"):
        ServeOptions.model_validate({**application["args"], "batch_token": 1})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_loopback_answers_to_its_own_names_and_those_allowed(host: str) -> None:
    assert find_hosts(host, []) == {host}
    assert find_hosts(host, ["Search.example.org"]) == {host, "search.example.org"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gpu-box"])
def test_network_answers_to_any_name_unless_some_are_listed(host: str) -> None:
    assert find_hosts(host, []) is None
    assert "a.example" in (find_hosts(host, ["a.example"]) or ())


def test_server_on_the_network_is_told_what_it_lacks() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        assert network_warning(host, None) is None
    keyless = network_warning("0.0.0.0", None) or ""
    assert "no TLS" in keyless
    assert "TOKAY_API_KEY" in keyless
    with_key = network_warning("10.0.0.1", "ab" * 32) or ""
    assert "no TLS" in with_key
    assert "TOKAY_API_KEY" not in with_key


@pytest.mark.parametrize("name", ["", "http://a.example", "a.example:80", "a b", "*", "[::1]"])
def test_allowed_host_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--allowed-host"):
        find_hosts("127.0.0.1", [name])


def test_api_key_is_kept_as_its_hash() -> None:
    assert hash_key(None) is None
    assert hash_key("0123456789abcdef") == (
        "9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f"
    )
    for bad in ("", "short", "0123456789abcde f", "0123456789abcdé", "0123456789abcdef\n"):
        with pytest.raises(UserError, match="openssl rand -hex 32"):
            hash_key(bad)


def test_options_reach_what_answers_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
    options = ServeOptions(
        model="embedded:all-MiniLM-L6-v2",
        name="minilm",
        max_request_bytes=2000,
        max_texts=3,
        max_characters=40,
        allow_token_ids=True,
        allowed_hosts=["a.example"],
        api_key_sha256=hash_key("0123456789abcdef"),
    )
    server = TokayServer(options)
    assert server.model.limits == RequestLimits(
        max_bytes=2000, max_texts=3, max_characters=40, token_ids=True
    )
    client = TestClient(server.__serve_build_asgi_app__(), base_url="http://a.example")
    body = {"model": "minilm", "input": [5]}
    key = {"authorization": "Bearer 0123456789abcdef"}
    assert client.post("/v1/embeddings", json=body, headers=key).is_success
    assert client.post("/v1/embeddings", json=body).status_code == 401
    assert client.post("/v1/embeddings", content=b"a" * 2001, headers=key).status_code == 413
    assert client.get("/", headers={"host": "b.example"}).status_code == 403
