"""Where audit rows go while the audit database cannot take them: one preallocated file per process start.

The file is the reserve for a full disk (its blocks are allocated while there is room) and the refuge for a
database that is away (it grows beyond them if the disk allows). It belongs to the process that holds its
lock (flock); a file nobody holds is an orphan of a killed process and is adopted by the next one.

    file  = batch* then anything
    batch = b"\\x00DBA" | length of payload, 4 bytes | CRC-32 of it, 4 bytes | payload     (big endian)
    payload = JSON {"writer", "host", "started", "before": n, "previous": mac hex, "rows": [[n, at, actor,
              action, target, outcome, detail text or null, mac hex], …]}

A batch counts only if it follows the one before it: same writer, `before` and `previous` equal to where
that one ended. A torn tail fails the checksum; bytes left over from an earlier use of the file fail the
link, because numbers only grow. A byte that rots in the middle fails the checksum too, and takes all that is
behind it along: `behind` finds whole batches there, and who knows what the trail has can tell which of them are
only left over.

Compatibility: files outlive an upgrade. Readers must go on understanding this form; a new form needs a new
magic.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.access.chain import Row

__all__ = ["Batch", "Spool", "orphans"]

_MAGIC: Final = b"\x00DBA"
_HEADER: Final = struct.Struct(">4sII")
_SUFFIX: Final = ".audit-spool"
_ASIDE: Final = ".damaged"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that were made durable together, and the head they follow."""

    writer: str
    host: str
    started: int
    before: int
    previous: bytes
    rows: Sequence[Row]


class Spool:
    """One locked file of batches; not thread-safe but for `batches`, which may run beside `append`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._end = 0

    @classmethod
    def create(cls, directory: Path, writer: str, *, reserve: int) -> Spool:
        """Make and lock the file of this process start and allocate `reserve` bytes; OSError when the disk
        refuses.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / f"{writer}{_SUFFIX}"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _lock(descriptor):
                break
            os.close(
                descriptor
            )  # an adopter looked into it between our two calls, took it for an orphan and removes it
        spool = cls(path, descriptor)
        try:
            if reserve:
                os.posix_fallocate(descriptor, 0, reserve)
            os.fsync(descriptor)
            _sync_directory(directory)
        except OSError:
            spool.remove()
            raise
        return spool

    @property
    def writer(self) -> str:
        """The writer it was made for."""
        return self.path.name.removesuffix(_SUFFIX)

    @property
    def empty(self) -> bool:
        """Whether no batch waits in it."""
        return self._end == 0

    @property
    def end(self) -> int:
        """The offset behind the last batch that counts."""
        return self._end

    def append(self, batch: Batch) -> None:
        """Write a batch behind the others and return when it is on the disk; OSError leaves the file as it
        was.
        """
        data = _encode(batch)
        written = 0
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], self._end + written)
        os.fdatasync(self._descriptor)
        self._end += len(data)

    def batches(self, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """Every batch that counts from `start` on, each with the offset behind it."""
        yield from _read(self._descriptor, start, self._end)

    def recover(self) -> None:
        """Find the end of what a killed process left."""
        for end, _ in _read(self._descriptor, 0, os.fstat(self._descriptor).st_size):
            self._end = end

    def clear(self) -> None:
        """Forget every batch, keep the blocks; afterwards a crash finds an empty spool."""
        os.pwrite(self._descriptor, bytes(_HEADER.size), 0)
        os.fdatasync(self._descriptor)
        self._end = 0

    def behind(self, start: int) -> Iterator[Batch]:
        """Whole batches behind the last that can be read: left over from an earlier use, or cut off by damage."""
        rest = os.pread(self._descriptor, os.fstat(self._descriptor).st_size - start, start)
        at = rest.find(_MAGIC)
        while at >= 0:
            _, length, checksum = _HEADER.unpack(rest[at : at + _HEADER.size].ljust(_HEADER.size, b"\x00"))
            payload = rest[at + _HEADER.size : at + _HEADER.size + length]
            whole = 0 < length == len(payload) and zlib.crc32(payload) == checksum
            if whole:
                yield _decode(payload)
            at = rest.find(_MAGIC, at + (_HEADER.size + length if whole else 1))

    def set_aside(self) -> Path:
        """Give the file a name that nobody adopts, for people to look at, and give up its lock."""
        aside = self.path.with_name(f"{self.path.name}{_ASIDE}")
        self.path.rename(aside)
        self.abandon()
        return aside

    def remove(self) -> None:
        """Delete the file and give up its lock."""
        self.path.unlink(missing_ok=True)
        self.abandon()

    def abandon(self) -> None:
        """Close the file and leave it where it is; whoever starts next adopts it."""
        os.close(self._descriptor)


def orphans(directory: Path) -> Iterator[Spool]:
    """Spools whose process is gone, locked and with their end found; the taker removes or abandons each."""
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):  # its owner, or another adopter, was faster
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if not _lock(descriptor):
                os.close(descriptor)
                continue
            spool = Spool(path, descriptor)
            spool.recover()
            yield spool


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # A lock on a file that has been unlinked meanwhile protects nothing.
    return os.fstat(descriptor).st_nlink > 0


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(batch: Batch) -> bytes:
    payload = json.dumps(
        {
            "writer": batch.writer,
            "host": batch.host,
            "started": batch.started,
            "before": batch.before,
            "previous": batch.previous.hex(),
            "rows": [[*row[1:8], row.mac.hex()] for row in batch.rows],
        },
        separators=(",", ":"),
    ).encode("ascii")
    return _HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload


def _read(descriptor: int, start: int, limit: int) -> Iterator[tuple[int, Batch]]:
    offset = start
    last: Batch | None = None
    while offset + _HEADER.size <= limit:
        magic, length, checksum = _HEADER.unpack(os.pread(descriptor, _HEADER.size, offset))
        if magic != _MAGIC or offset + _HEADER.size + length > limit:
            return
        payload = os.pread(descriptor, length, offset + _HEADER.size)
        if len(payload) != length or zlib.crc32(payload) != checksum:
            return
        batch = _decode(payload)
        if last is not None and not _follows(last, batch):
            return
        offset += _HEADER.size + length
        yield offset, batch
        last = batch


def _decode(payload: bytes) -> Batch:
    fields = json.loads(payload)
    writer = fields["writer"]
    return Batch(
        writer=writer,
        host=fields["host"],
        started=fields["started"],
        before=fields["before"],
        previous=bytes.fromhex(fields["previous"]),
        rows=tuple(Row._make((writer, *row[:7], bytes.fromhex(row[7]))) for row in fields["rows"]),
    )


def _follows(last: Batch, batch: Batch) -> bool:
    end = last.rows[-1]
    return (batch.writer, batch.before, batch.previous) == (end.writer, end.n, end.mac)
