"""Modules of the operating system as the broker finds them on a simulated machine: `os` and `fcntl`."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

from app.broker.journal import Entry
from tests.simulation.schedule import Died

if TYPE_CHECKING:
    from tests.simulation.host import Process
    from tests.simulation.world import World

__all__ = ["Disk", "Locks"]


class Disk:
    """The module `os` for whoever writes to the disk of a place."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def getpid(self) -> int:
        """Each process has its own."""
        process = self._world.here()
        return 1000 * process.number + process.life

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        """Open a file; it closes with the process."""
        process = self._at("disk.open")
        descriptor = os.open(path, flags, mode)
        process.descriptors[descriptor] = str(path)
        return descriptor

    def rename(self, source: Any, target: Any) -> None:
        """Give a file its name."""
        process = self._at("disk.rename")
        os.rename(source, target)  # noqa: PTH104 - that is the module stood in for
        for descriptor, path in process.descriptors.items():
            if path == str(source):
                process.descriptors[descriptor] = str(target)

    def write(self, descriptor: int, data: bytes) -> int:
        """Write, if there is room."""
        process = self._at("disk.write")
        if process.place.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if (entry := self._appended()) is not None:
            self._world.checks.written(entry, process)
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """Make the disk keep what was written."""
        process = self._at("disk.fsync")
        path = process.descriptors.get(descriptor)
        if path is not None:
            process.place.synced[path] = os.fstat(descriptor).st_size
            if path.endswith(".journal") and (entry := self._appended()) is not None:
                self._world.checks.journaled(entry)
        self._world.scheduler.point("disk.synced")

    def ftruncate(self, descriptor: int, size: int) -> None:
        """Cut a file."""
        process = self._at("disk.cut")
        os.ftruncate(descriptor, size)
        process.place.synced[process.descriptors[descriptor]] = size

    def close(self, descriptor: int) -> None:
        """Close; a dead process has nothing open."""
        process = self._world.here()
        if not process.dead and process.descriptors.pop(descriptor, None) is not None:
            os.close(descriptor)

    def _appended(self) -> Entry | None:
        task = self._world.scheduler.current
        assert task is not None
        entry: Entry | None = task.facts.get("appends")
        return entry

    def _at(self, kind: str) -> Process:
        process = self._world.here()
        if process.dead:
            raise Died
        self._world.scheduler.point(kind)
        return process


class Locks:
    """The module `fcntl`: the locks are real, and end with the descriptors of a process."""

    LOCK_EX, LOCK_NB, LOCK_UN = fcntl.LOCK_EX, fcntl.LOCK_NB, fcntl.LOCK_UN

    def __init__(self, world: World) -> None:
        self._world = world

    def flock(self, descriptor: int, operation: int) -> None:
        """Lock a file if nobody else does."""
        if self._world.here().dead:
            raise Died
        fcntl.flock(descriptor, operation)
