"""Files are replaced whole or not at all; the cache folder follows the environment."""

import os
from pathlib import Path

import pytest

from fastmp import files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "name.json"
    files.atomic_write(path, b"one")
    files.atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    path = tmp_path / "name.json"
    files.atomic_write(path, b"one")

    def fail(*_):
        assert path.read_bytes() == b"one"
        raise error

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(error)):
        files.atomic_write(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("own", "user", "expected"),
    [
        ("/own", "/user", "/own"),
        (None, "/user", "/user/fastmp"),
        ("", "", str(Path.home() / ".cache" / "fastmp")),
    ],
)
def test_where_the_cache_is(monkeypatch, own, user, expected):
    for name, value in (("FASTMP_CACHE", own), ("XDG_CACHE_HOME", user)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert files.cache_dir() == Path(expected)
