"""A process that writes to the audit trail as fast as it can and says what was acknowledged, until it is killed."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from app.access.audit import Entry, Trail
from app.clock import Clock
from tests.access_stage import AUDIT_KEY, databases


def main(url: str, state: str, away: str) -> None:
    """Record from eight threads; each line on stdout is the target of one acknowledged row."""
    clock = Clock()
    _, database = databases(url, Path(state), clock)
    trail = Trail(database, AUDIT_KEY, clock=clock, state_dir=Path(state))
    if away == "away":
        trail.record(Entry("worker", "test:burst:begun"))
        database.url = None  # type: ignore[assignment]
        _take_away(Path(state))

    def write(name: int) -> None:
        for count in range(1_000_000):
            target = f"{name}.{count}"
            trail.record(Entry("caller:burst", "broker:token:issued", target, "done", {"generation": count}))
            os.write(1, f"{target}\n".encode())

    for name in range(8):
        threading.Thread(target=write, args=(name,), daemon=True).start()
    threading.Event().wait()


def _take_away(state: Path) -> None:
    """Lock the audit database for good, from a connection of its own: every commit fails from now on."""
    raise NotImplementedError(state)


if __name__ == "__main__":
    main(*sys.argv[1:4])
