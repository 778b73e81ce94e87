import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.session import _keep_token_private, _private_temporary_folder


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder; pytest's own is too long for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_rays_folder_lies_in_one_that_nobody_else_can_enter(temporary: Path) -> None:
    mask = os.umask(0)
    try:
        folder = Path(_private_temporary_folder())
    finally:
        os.umask(mask)
    assert folder == temporary / f"tokay-{os.getuid()}" / "ray"
    assert mode(folder.parent) == 0o700
    assert _private_temporary_folder() == str(folder)  # the second time too


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o750)


def link_to_elsewhere(folder: Path) -> None:
    (folder.parent / "private").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "private")


def of_somebody_else(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    if os.getuid():
        pytest.skip("needs root, to give a folder away")
    os.chown(folder, 12345, 12345)


@pytest.mark.parametrize("there", [open_to_all, link_to_elsewhere, of_somebody_else, Path.touch])
def test_folder_that_others_may_have_prepared_is_refused(
    there: Callable[[Path], None], temporary: Path
) -> None:
    there(temporary / f"tokay-{os.getuid()}")
    with pytest.raises(UserError, match=r"is not a folder of yours alone .* set TMPDIR"):
        _private_temporary_folder()


def test_folder_too_deep_for_sockets_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 40)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(os, "getuid", lambda: 4_294_967_294)
    with pytest.raises(UserError, match=r"^/tmp/tokay-4294967294 "):  # not this user's
        _private_temporary_folder()
    Path("/tmp/tokay-4294967294").rmdir()


def test_token_is_readable_by_its_owner_alone(home: Path) -> None:
    _keep_token_private()
    token = home / ".ray" / "auth_token"
    assert mode(token) == 0o600 and mode(token.parent) == 0o700
    written = token.read_text()
    assert len(bytes.fromhex(written)) == 32
    token.chmod(0o644)  # as Ray leaves it
    _keep_token_private()
    assert mode(token) == 0o600 and token.read_text() == written
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize("name", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_token_that_lies_elsewhere_is_left_there(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "disabled")
    _keep_token_private()
    assert not list(home.iterdir())


def test_home_that_cannot_be_written_is_one_line(home: Path) -> None:
    (home / ".ray").touch()
    with pytest.raises(UserError, match=r"cannot write Ray's token to .*auth_token.*File exists"):
        _keep_token_private()
