"""Workers over a whole installation: real services, real threads, the emulated providers, many connections at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from app.bootstrap import Services, bootstrap, prepare_database
from app.broker.connection import Connection
from app.jobs.worker import Worker
from emulator import Minted
from tests.installation import HUBSPOT, SALESFORCE, Installation
from tests.waiting import PATIENCE

CLIENTS = {"hubspot": HUBSPOT, "salesforce": SALESFORCE}


@dataclass(frozen=True)
class Running:
    """A worker at work in a thread of this process."""

    services: Services
    worker: Worker
    thread: threading.Thread

    def stop(self) -> None:
        """Ask it to end and wait until it has."""
        self.worker.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextmanager
def working(made: Installation, *, host: str = "worker1", **overrides: str) -> Iterator[Running]:
    """Run a worker on a host of its own."""
    settings = made.settings(host=host, **overrides)
    prepare_database(settings)
    services = bootstrap(settings, kind="worker")
    worker = Worker(services)
    running = Running(services, worker, threading.Thread(target=worker.run, name=host))
    running.thread.start()
    try:
        yield running
    finally:
        running.stop()


def bring_in(
    host: Services, made: Installation, provider: str, *, count: int, app: str = "default"
) -> list[Minted]:
    """Import so many fresh grants, each of an account of its own; all are due at once."""
    grants = made.emulator.control.vendor(provider).grant_many(CLIENTS[provider], count)
    lines = [
        {
            "provider": provider,
            "app": app,
            "account_id": grant.account,
            "user_id": grant.user,
            "access_token": grant.access_token,
            "refresh_token": grant.refresh_token,
            "expires_at": datetime.fromtimestamp(grant.expires_at, UTC).isoformat(),
            "instance_url": grant.instance_url if provider == "salesforce" else None,
        }
        for grant in grants
    ]
    results = list(host.transfer.import_lines(json.dumps(line) for line in lines))
    assert [result.outcome for result in results] == ["added"] * count, results
    return grants


def connections_of(host: Services) -> list[Connection]:
    """All connections as they are in the database now."""
    return host.store.page(limit=5000)
