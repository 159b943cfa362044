"""Answers that must not be lost between reading them and committing them.

A provider that rotates has already voided the old refresh token when its answer arrives. So the sealed answer is appended
to a local file and fsynced before the database is asked, and destroyed after the commit. One file per process start, locked
for as long as the process lives; a starting process replays the files nobody holds.

File format, one line per record, compatible forever:  `crc32(8 hex) SPACE json LF`
    {"kind":"answer","attempt":…,"connection":…,"generation":…,"sealed":base64,"kek":…,"facts":{…}}
    {"kind":"done","attempt":…}
`sealed` is the very record the row will hold, bound to the row and its next generation; `facts` are the plain columns that
go with it. A torn last line (a crash while appending) fails its checksum and is ignored: its answer was never acted on.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from app.crypto.envelope import Sealed
from app.errors import Overloaded
from app.telemetry import Event, log, metrics

__all__ = ["FACT_NAMES", "FACT_STAMPS", "INSTALL", "Entry", "Journal"]

INSTALL: Final = "install-"  # how the attempt of a connect begins
_SUFFIX: Final = ".journal"
_UNNAMED: Final = (
    ".unnamed"  # for the moment between making and locking it; empty, so one left behind is nobody's loss
)
# What `Entry.facts` holds: columns in microseconds since 1970, plain columns, and what is needed when the row is gone.
FACT_STAMPS: Final = ("obtained_at", "expires_at", "refresh_at", "last_refresh_at")
FACT_NAMES: Final = ("life_seconds", "life_known", "rotation", "scopes_granted", "instance_url")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One answer on its way into the database: `facts` are column values as JSON (times in microseconds)."""

    attempt: str
    connection: str
    generation: int
    sealed: Sealed
    facts: dict[str, Any]

    @property
    def installs(self) -> bool:
        """Whether it came of a connect, which an admin was told of, and not of a refresh."""
        return self.attempt.startswith(INSTALL)


class Journal:
    """This process's journal; `append` returns only when the entry would survive a crash of the machine."""

    def __init__(self, directory: Path, process_id: str) -> None:
        self._directory = directory
        self._path = directory / f"{process_id}{_SUFFIX}"
        self._lock = threading.Lock()
        self._pending: set[str] = set()
        self._descriptor: int | None = None
        self._closed = False

    @property
    def name(self) -> str:
        """The file's name, recorded with each attempt so that people know where an answer may lie."""
        return self._path.name

    def append(self, entry: Entry) -> None:
        """Write the entry through to the disk. Raises `Overloaded` when the disk refuses; then nothing was promised."""
        with self._lock:
            if self._closed:  # what is pending lies in the file, for whoever starts next
                raise Overloaded("The journal is closed.")
            try:
                descriptor = self._open()
                _append(descriptor, _answer(entry))
            except OSError as fault:
                metrics.journal_entries.labels("refused").inc()
                raise Overloaded(f"The journal cannot be written: {fault.strerror}.") from None
            self._pending.add(entry.attempt)
        metrics.journal_entries.labels("written").inc()

    def done(self, attempt: str) -> None:
        """Forget the entry: it is committed, or was found to be of no use.

        When no other entry is pending the file is emptied, which destroys the sealed tokens in it. A crash before that
        costs nothing: the replay is fenced on the generation.
        """
        with self._lock:
            self._forget(attempt)

    def _forget(self, attempt: str) -> None:
        self._pending.discard(attempt)
        if self._descriptor is None:
            return
        try:
            if self._pending:
                _append(self._descriptor, _line({"kind": "done", "attempt": attempt}), durable=False)
            else:
                os.ftruncate(self._descriptor, 0)
        except OSError as fault:
            # The answer is committed all the same; the mark only spares a replay that finds nothing to do.
            log(Event.JOURNAL_FAILED, attempt=attempt, code=f"done_{fault.errno}")

    def leave(self, attempt: str) -> None:
        """Move the entry to a file of its own that no process holds, for whoever adopts such files next.

        When the disk refuses, it stays in this file until the process ends, and is adopted then.
        """
        with self._lock:
            path = self._path.with_name(f"{self._path.stem}-{attempt}{_SUFFIX}")
            try:
                entry = next((one for one in _entries(self._path) if one.attempt == attempt), None)
                if entry is None or self._descriptor is None:
                    return
                descriptor = _create(path)
                try:
                    _append(descriptor, _answer(entry))
                finally:
                    os.close(descriptor)
                self._forget(attempt)
            except OSError as fault:
                log(Event.JOURNAL_FAILED, attempt=attempt, code=f"leave_{fault.errno}")

    def pending_keks(self) -> set[str]:
        """The KEKs named by entries of this host that are still to be committed, in any process's file."""
        return {entry.sealed.kek_id for path in self._files() for entry in _entries(path)}

    def adopt_orphans(self, settle: Callable[[Entry], None]) -> int:
        """Hand every pending entry of files whose process is gone to `settle`, then destroy the file; how many."""
        settled = 0
        for path in self._files():
            with _held(path) as held:
                if not held:
                    continue
                found = list(_entries(path))
                for entry in found:
                    settle(entry)
                    settled += 1
                _tell_torn(path)
                path.unlink(missing_ok=True)
                log(Event.JOURNAL_ADOPTED, file=path.name, entries=len(found))
        return settled

    def close(self) -> None:
        """Give the file back; removes it when nothing is pending."""
        with self._lock:
            self._closed = True
            if self._descriptor is None:
                return
            if not self._pending:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = _create(self._path)
        return self._descriptor

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob(f"*{_SUFFIX}")) if self._directory.is_dir() else []


def _create(path: Path) -> int:
    """A new file, held by us before it has a name by which anybody could adopt and remove it."""
    unnamed = path.with_suffix(_UNNAMED)
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unnamed, path)  # noqa: PTH104 - the simulation stands in for `os`
        # The name must survive a crash as well as the content.
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _answer(entry: Entry) -> bytes:
    return _line(
        {
            "kind": "answer",
            "attempt": entry.attempt,
            "connection": entry.connection,
            "generation": entry.generation,
            "sealed": base64.b64encode(entry.sealed.blob).decode(),
            "kek": entry.sealed.kek_id,
            "facts": entry.facts,
        }
    )


class _held:  # noqa: N801 - reads as the condition it is
    """Holds another process's file if nobody does; enters with whether it could."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def __enter__(self) -> bool:
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            return False
        # Another adopter may have finished and removed it between our open and our lock.
        return self._path.exists()

    def __exit__(self, *_: object) -> Literal[False]:
        if self._descriptor is not None:
            os.close(self._descriptor)
        return False


def _line(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x " % zlib.crc32(body) + body + b"\n"


def _append(descriptor: int, line: bytes, *, durable: bool = True) -> None:
    size = os.fstat(descriptor).st_size
    try:
        _write_all(descriptor, line)
        if durable:
            os.fsync(descriptor)
    except OSError:
        # Half a line must not swallow the next one.
        os.ftruncate(descriptor, size)
        raise


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _entries(path: Path) -> Iterator[Entry]:
    """The pending entries of one file, in order."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    records = [record for line in lines if (record := _record(line)) is not None]
    done = {record["attempt"] for record in records if record["kind"] == "done"}
    for record in records:
        if record["kind"] == "answer" and record["attempt"] not in done:
            yield Entry(
                attempt=record["attempt"],
                connection=record["connection"],
                generation=record["generation"],
                sealed=Sealed(blob=base64.b64decode(record["sealed"]), kek_id=record["kek"]),
                facts=record["facts"],
            )


def _tell_torn(path: Path) -> None:
    """Say how much of a dead process's file is no entry; in the file of a living one that may be one on its way."""
    torn = sum(len(line) for line in path.read_bytes().split(b"\n") if line and _record(line) is None)
    if torn:
        log(Event.JOURNAL_TORN, file=path.name, bytes=torn)


def _record(line: bytes) -> dict[str, Any] | None:
    checksum, _, body = line.partition(b" ")
    try:
        if not body or int(checksum, 16) != zlib.crc32(body):
            return None
    except (ValueError, binascii.Error):
        return None
    record = json.loads(body)
    return record if isinstance(record, dict) else None
