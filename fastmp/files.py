"""Files that other processes and later runs rely on: written whole or not at all; locks, cache."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = "lock"  # the file in a locked folder, with the number and the host of the process


class FolderInUse(RuntimeError):
    """Another process holds the folder; the message names it."""


def atomic_write(path: Path, payload: bytes) -> None:
    """Replace the file at ``path`` by one with this content, whole, at any kill or power failure.

    A kill may leave a file ``*.partial`` beside it.

    Raises:
        OSError: the disk refused; ``path`` is as it was.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as out:
            out.write(payload)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(folder: Path) -> None:
    """Bring the renames in ``folder`` to the disk, before anything relies on them."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_held: set[Path] = set()  # by this process


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an existing ``folder`` for this process during the block; blocks may be nested.

    The lock is the system's and ends with the process, however that ends: a file ``lock`` that a
    killed process left is no lock. Forked workers do not share it. Where the system or the file
    system has no locks, on Windows for one, nothing is held.

    Raises:
        FolderInUse: another process holds it.
        OSError: no file can be created in the folder.
    """
    path = folder.resolve() / LOCK
    if path in _held or os.name != "posix":
        yield
        return
    handle = _open_locked(path)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)  # before the lock goes: the next process makes a new file
        os.close(handle)


def _open_locked(path: Path) -> int:
    """The handle of the lock file, which holds the lock until it is closed."""
    import fcntl  # does not exist on Windows

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(handle, 500).decode(errors="replace") or "another process"
            os.close(handle)
            raise FolderInUse(
                f"{path.parent} is in use by {holder}; wait until it has ended, or choose another "
                "folder"
            ) from None
        except OSError:  # a file system without locks
            return handle
        if os.fstat(handle).st_nlink:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {os.uname().nodename}".encode())
            return handle
        os.close(handle)  # its holder removed the file and ended between the two calls


def cache_dir() -> Path:
    """``$FASTMP_CACHE``, else ``fastmp`` in the user's cache folder; it need not exist."""
    own = os.environ.get("FASTMP_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "fastmp"


def recall(name: str, key: str) -> Any:
    """The answer that ``remember`` kept; None if there is none or the file is damaged."""
    return _answers(name).get(key)


def remember(name: str, key: str, answer: Any) -> bool:
    """Keep an answer, any JSON, in the file ``name`` of the cache folder; False if it cannot be."""
    path = cache_dir() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(_answers(name) | {key: answer}, indent=1).encode())
    except OSError:
        return False
    return True


def _answers(name: str) -> dict[str, Any]:
    try:
        content = json.loads((cache_dir() / name).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
