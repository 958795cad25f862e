"""A results folder belongs to one run at a time: a file in it says whose it is."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmattn.errors import FileError, StateError, one_line
from vlmattn.files import file_errors

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None  # type: ignore[assignment]
_locks: ModuleType | None = _fcntl

# The lock is flock's, which ends with the process however it ends; what the file says is for people. On a network file
# system flock may hold between hosts (NFS), only within one (Lustre mounted with localflock), or not at all. So a lock
# that was left behind by another host is never taken over by itself, and where there is no flock the process that the
# file names is looked for.


class Lock:
    """The lock of one process of a run on its folder; each holds its own, the first one before it looks there.

    Args:
        folder: results folder.
        rank: of the process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder, self._path = folder, folder / f"lock-{rank}.json"
        self._descriptor: int | None = None

    def take(self) -> None:
        """Hold the folder, or refuse. What a process of this host left behind that is gone is taken over.

        Raises:
            StateError: another process holds it.
            FileError: the folder cannot be written.
        """
        with file_errors("lock", self._path):
            self._take()

    def _take(self) -> None:
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise FileError(f"cannot lock {self._path}: not a regular file; delete it")
                held = _flock(descriptor)
                self._refuse(held, _read(descriptor))
                if _is_at(descriptor, self._path):  # or its last holder has removed it since it was opened
                    _write(descriptor)
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def _refuse(self, held: bool | None, holder: dict[str, Any]) -> None:
        """Raise if another process holds the lock; ``held`` as ``_flock`` says it."""
        who = "another process"
        if holder:
            who = one_line(f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}", 200)
        here = holder.get("host") == socket.gethostname()
        if held is False or (held is None and here and _is_alive(holder.get("pid"))):
            raise StateError(f"{self._folder} is in use by {who}; wait for its end, stop it, or use another --out")
        if holder and not here:
            raise StateError(
                f"{self._folder} is in use by {who}, which this host ({socket.gethostname()}) cannot see; if that"
                f" process is gone, delete {self._path}"
            )

    def release(self) -> None:
        """Let the folder go; nothing if it is not held."""
        if self._descriptor is None:
            return
        if _is_at(self._descriptor, self._path):
            self._path.unlink(missing_ok=True)  # before the lock ends, so that nobody else's is removed
        os.close(self._descriptor)
        self._descriptor = None


def refuse_if_used(folder: Path, own: int | None = None) -> None:
    """Raise if a process other than the own of that rank works in a results folder; locks of the dead are removed.

    Raises:
        StateError: one does.
        FileError: the folder cannot be written.
    """
    for path in folder.glob("lock-*.json"):
        rank = path.stem.removeprefix("lock-")
        if rank.isdecimal() and int(rank) != own:
            lock = Lock(folder, int(rank))
            lock.take()
            lock.release()


def _flock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system or the platform has none."""
    if _locks is None:
        return None
    try:
        _locks.flock(descriptor, _locks.LOCK_EX | _locks.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    """What the holder wrote; {} if it has not yet, or if it is not readable."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        found = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text.encode())


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
