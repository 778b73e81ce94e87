import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto import mock_aws

from actors.embedded import resolve_model
from cluster.errors import StorageError, UserError
from cluster.storage import open_storage


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("TOKAY_CACHE", str(tmp_path / "cache"))
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="models")
        for name in ("config.json", "1_Pooling/config.json"):
            open_storage("s3://models/one").write_bytes(name, name.encode())
        yield "s3://models/one"


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_model_of_s3_is_kept_where_nobody_else_writes(model: str, tmp_path: Path):
    old = os.umask(0)
    try:
        folder = Path(resolve_model(model))
    finally:
        os.umask(old)
    assert (folder / "1_Pooling/config.json").read_text() == "1_Pooling/config.json"
    assert folder.parent == tmp_path / "cache/models"
    assert mode(tmp_path / "cache") == mode(folder.parent) == 0o700
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert resolve_model(model) == str(folder)
    open_storage(model).write_bytes("config.json", b"another")
    assert resolve_model(model) != str(folder)


@pytest.mark.parametrize("name", ["cache", "cache/models"])
def test_cache_that_anybody_may_write_into_is_refused(name: str, model: str, tmp_path: Path):
    (tmp_path / "cache/models").mkdir(parents=True)
    (tmp_path / name).chmod(0o777)
    with pytest.raises(UserError, match=r"cache of models .* TOKAY_CACHE"):
        resolve_model(model)


def test_cache_that_another_user_made_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    resolve_model(model)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(Path, "stat", stat_of(owner=54321))
    resolve_model(model)  # nobody but its owner could have put it there
    tmp_path.chmod(0o1777)  # as /tmp
    with pytest.raises(UserError, match="another user's"):
        resolve_model(model)


def stat_of(owner: int) -> Callable[..., os.stat_result]:
    real = Path.stat

    def call(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = real(path, follow_symlinks=follow_symlinks)
        return os.stat_result((*found[:4], owner, *found[5:10]))

    return call


def test_cache_that_cannot_be_written_is_told(model: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no space left"):
        resolve_model(model)


def test_model_on_s3_writes_nothing_outside_its_cache(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKAY_CACHE", str(tmp_path / "cache"))
    storage = open_storage(f"{bucket}/model")
    for key in ("model/config.json", "model/../../../../bashrc"):
        storage.client.put_object(Bucket=storage.bucket, Key=key, Body=b"evil")  # type: ignore
    with pytest.raises(StorageError, match=r"names '\.\./\.\./\.\./\.\./bashrc'"):
        resolve_model(f"{bucket}/model")
    assert not list(tmp_path.rglob("bashrc"))
