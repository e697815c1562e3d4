"""Files that other processes and later runs rely on: written whole or not at all, and the cache."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


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


def cache_dir() -> Path:
    """``$FASTMP_CACHE``, else ``fastmp`` in the user's cache folder; it need not exist."""
    own = os.environ.get("FASTMP_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "fastmp"
