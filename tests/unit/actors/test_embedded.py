from pathlib import Path

import pytest

from actors.embedded import resolve_model
from cluster.errors import StorageError
from cluster.storage import open_storage


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
