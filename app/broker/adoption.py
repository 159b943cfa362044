"""Whether this database is the one these tokens belong to, or a copy that must not spend them.

Two installations with the same refresh tokens revoke each other's. A copied database is known by its `PUBLIC_URL`, a
restored backup by a counter that went backwards: STATE_DIR keeps the highest `connections` epoch this host has seen. While
they disagree nothing is refreshed; living tokens are still handed out. `adopt` is the operator's word that no other
installation uses this data any more. Nothing else ends it: a restored database whose counter has grown past the mark again,
because admins went on working, is as stale as before, so the mark notes that it was restored until an adoption is newer.

Decision: the mark is written at most once a second and on closing, not at every refresh; the price is that a machine that
crashes and gets a backup restored within that second is not noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from app.access.audit import Entry, Trail
from app.clock import Clock
from app.db.engine import Database
from app.db.epoch import EpochWatch, bump
from app.db.schema import epochs, installation
from app.errors import DatabaseMismatch, DatabaseUnavailable, RefreshHeld
from app.telemetry import Event, log

__all__ = ["Adoption", "Disagreement"]

_FILE: Final = "high-water.json"
_EVERY: Final = 1.0  # seconds between two writes of the mark
# In the mark: the adoption the database told of when it was found to have gone back.
_RESTORED: Final = "restored"
_OLDER: Final = "The database is older than this host remembers: a restored backup?"


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Why refreshing is held: `code` is copied, restored or foreign_state_dir; `says` one sentence."""

    code: str
    says: str


class Adoption:
    """Compares database and STATE_DIR, and keeps the mark."""

    def __init__(
        self,
        database: Database,
        watch: EpochWatch,
        clock: Clock,
        *,
        trail: Trail,
        state_dir: Path,
        public_url: str,
    ) -> None:
        self._database = database
        self._watch = watch
        self._clock = clock
        self._trail = trail
        self._path = state_dir / _FILE
        self._public_url = public_url
        self._lock = threading.Lock()
        self._mark: dict[str, int | str] | None = None
        self._written: dict[str, int | str] | None = None  # as the file has it, or was last meant to
        self._written_at = 0.0
        self._installation: tuple[str, str] | None = None

    def require(self) -> None:
        """Pass when refreshing is allowed; raises `RefreshHeld` with the reason."""
        reason = self.disagreement()
        if reason is not None:
            raise RefreshHeld(reason.says)

    def disagreement(self) -> Disagreement | None:
        """Why refreshing is held, or None. Moves the mark up when all is well."""
        identifier, public_url = self._read_installation()
        seen = self._watch.look().connections
        with self._lock:
            mark = self._read_mark()
            if mark is not None and seen < int(mark["connections"]):
                seen = self._count()  # the watch may be a moment behind a mark made by `adopt`
            if mark is not None and mark["installation"] != identifier:
                self._mark = None  # read again next time: `adopt` is run by another process
                return Disagreement(
                    "foreign_state_dir", "STATE_DIR belongs to another installation's database."
                )
            if public_url != self._public_url:
                return Disagreement(
                    "copied", "The database was made for another PUBLIC_URL; it may be a copy."
                )
            if mark is not None and self._restored(mark, seen):
                return Disagreement("restored", _OLDER)
            self._keep(identifier, seen)
        return None

    def require_not_behind(self, count: int) -> None:
        """Pass unless the counter, as the transaction that takes a lease reads it, is behind what this host saw.

        `require` judges by a reading that may be a moment old; raises `RefreshHeld`.
        """
        with self._lock:
            mark = self._read_mark()
            if mark is not None and count < int(mark["connections"]):
                raise RefreshHeld(_OLDER)

    def saw(self, count: int) -> None:
        """Move the mark up to what this process has committed itself; the watch would notice it a moment later."""
        with self._lock:
            mark = self._read_mark()
            if mark is not None and _RESTORED not in mark and count > int(mark["connections"]):
                self._keep(str(mark["installation"]), count)

    def _restored(self, mark: dict[str, int | str], seen: int) -> bool:
        """Whether the database went back behind the mark, or did once and was not adopted since."""
        noted = mark.get(_RESTORED)
        if noted is None and seen >= int(mark["connections"]):
            return False
        adopted = self._adopted_at()
        if noted is not None and adopted > int(noted) and seen >= int(mark["connections"]):
            return False
        if noted is None or adopted > int(noted):
            self._write(mark | {_RESTORED: adopted})
        self._mark = None  # read again next time: `adopt` is run by another process
        return True

    def adopt(self, *, actor: str = "admin:cli") -> Disagreement | None:
        """Take the database as ours from now on; returns what had been in the way.

        The counter is lifted above the mark, so that every host that shares the database sees it move forward again.
        """
        reason = self.disagreement()
        with self._lock:
            mark = self._read_mark()
            floor = int(mark["connections"]) if mark is not None else 0
        with self._database.write() as transaction:
            transaction.execute(
                sa.update(epochs)
                .where(epochs.c.name == "connections", epochs.c.value < floor)
                .values(value=floor)
            )
            value = bump(transaction, "connections")
            transaction.execute(
                sa.update(installation).values(public_url=self._public_url, adopted_at=self._clock.now())
            )
            self._trail.record(
                Entry(actor, Event.INSTALLATION_ADOPTED, detail={"reason": reason.code if reason else "none"})
            )
        with self._lock:
            self._installation = None
        identifier, _ = self._read_installation()
        with self._lock:
            self._write({"installation": identifier, "connections": value})
        log(Event.INSTALLATION_ADOPTED, reason=reason.code if reason else "none")
        return reason

    def close(self) -> None:
        """Write the mark, counted anew: the watch may be a moment behind the last refresh of this process."""
        with contextlib.suppress(DatabaseUnavailable):
            if self.disagreement() is None:
                identifier, _ = self._read_installation()
                count = self._count()
                with self._lock:
                    self._mark = {"installation": identifier, "connections": count}
        with self._lock:
            if self._mark is not None:
                self._write(self._mark)

    def _read_installation(self) -> tuple[str, str]:
        # Read once when all is well: an installation's id never changes, its URL only by `adopt`, which ends a disagreement.
        if self._installation is None or self._installation[1] != self._public_url:
            with self._database.read() as transaction:
                row = transaction.execute(
                    sa.select(installation.c.id, installation.c.public_url)
                ).one_or_none()
            if row is None:
                raise DatabaseMismatch("The database holds no installation; run: drawbridge migrate.")
            self._installation = (row.id, row.public_url)
        return self._installation

    def _count(self) -> int:
        with self._database.read() as transaction:
            value = transaction.execute(
                sa.select(epochs.c.value).where(epochs.c.name == "connections")
            ).scalar_one()
        return int(value)

    def _adopted_at(self) -> int:
        """When the database says it was adopted last, in microseconds; 0 when it never was."""
        with self._database.read() as transaction:
            adopted = transaction.execute(sa.select(installation.c.adopted_at)).scalar_one()
        return 0 if adopted is None else int(adopted.timestamp() * 1_000_000)

    def _keep(self, identifier: str, seen: int) -> None:
        mark: dict[str, int | str] = {"installation": identifier, "connections": seen}
        if mark == self._written:
            return
        self._mark = mark
        if self._clock.elapsed() - self._written_at >= _EVERY:
            self._write(mark)

    def _read_mark(self) -> dict[str, int | str] | None:
        if self._mark is None:
            with contextlib.suppress(FileNotFoundError):
                self._mark = self._written = json.loads(self._path.read_text())
        return self._mark

    def _write(self, mark: dict[str, int | str]) -> None:
        self._mark = mark
        self._written_at = self._clock.elapsed()
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with temporary.open("w") as file:
                json.dump(mark, file)
                file.flush()
                os.fsync(file.fileno())
            # Looked at only now: the disk may have taken its time.
            if self._is_behind(mark):
                temporary.unlink()
            else:
                temporary.replace(self._path)
        except OSError as fault:
            log(Event.MARK_UNWRITABLE, error=fault.strerror or "unknown")
        else:
            self._written = mark

    def _is_behind(self, mark: dict[str, int | str]) -> bool:
        """Several processes of a host share the file: a slower one must never take the mark back."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            other: dict[str, int | str] = json.loads(self._path.read_text())
            if other["installation"] == mark["installation"]:
                return int(other["connections"]) > int(mark["connections"])
        return False
