"""A process that records as fast as it can and prints each target that was acknowledged, until it is killed."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from app.access.audit import Entry, Trail
from app.clock import Clock
from tests.access_stage import AUDIT_KEY, databases
from tests.contract.audit_outage import take_away


def main(url: str, state: str, mode: str) -> None:
    """Record from eight threads; in mode `away` the database disappears after the first row."""
    clock = Clock()
    _, database = databases(url, Path(state), clock)
    trail = Trail(database, AUDIT_KEY, clock=clock, state_dir=Path(state))
    trail.record(Entry("worker", "test:burst:begun", "begun"))
    if mode == "away":
        take_away(database)

    def write(name: int) -> None:
        for count in range(1_000_000):
            target = f"{name}.{count}"
            trail.record(Entry("caller:burst", "broker:token:issued", target, "done", {"generation": count}))
            os.write(1, f"{target}\n".encode())

    for name in range(8):
        threading.Thread(target=write, args=(name,), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:4])
