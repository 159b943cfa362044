"""Binds the three ports, serves them from threads, and takes all down again, hanging requests too."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flask import Flask
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from emulator import control_web, hubspot_web, salesforce_web
from emulator.clock import ShiftedClock
from emulator.control import Control
from emulator.hubspot import HubSpot
from emulator.minting import Minter
from emulator.model import SetUpError
from emulator.salesforce import Salesforce
from emulator.world import DEMO, set_up


class QuietHandler(WSGIRequestHandler):
    """Writes no access log: request lines may carry codes and tokens."""

    # One request per connection: what a client does after a broken answer then never depends on a reused
    # socket.
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002  # the parent's signature
        return None


class Port(ThreadedWSGIServer):
    """A threaded server whose queue holds a burst of clients that connect at once."""

    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, host: str, port: int, *, app: Flask) -> None:
        super().__init__(host, port, app, handler=QuietHandler)
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving, if it ever began, and close the listening socket."""
        if self._thread.ident is not None:
            self.shutdown()
            self._thread.join()
        self.server_close()


class Emulator:
    """Both vendors and their control port, running.

    `hubspot.url`, `salesforce.url` and `control_url` say where; `control` is a client of the last.
    """

    def __init__(self, *, host: str, ports: Mapping[str, int], seed: int | None) -> None:
        self.clock = ShiftedClock()
        minter, fault_ids = Minter(seed), itertools.count(1)
        self.hubspot = HubSpot(self.clock, minter, fault_ids=fault_ids)
        self.salesforce = Salesforce(self.clock, minter, fault_ids=fault_ids)
        control = control_web.build(self.hubspot, self.salesforce, clock=self.clock)
        self._ports = [
            Port(host, ports.get("hubspot", 0), app=hubspot_web.build(self.hubspot)),
            Port(host, ports.get("salesforce", 0), app=salesforce_web.build(self.salesforce)),
            Port(host, ports.get("control", 0), app=control),
        ]
        self.hubspot.url, self.salesforce.url, self.control_url = (port.url for port in self._ports)
        self.control = Control(self.control_url)

    def addresses(self) -> dict[str, str]:
        """Return the three addresses by name."""
        return {"hubspot": self.hubspot.url, "salesforce": self.salesforce.url, "control": self.control_url}

    def configure(self, config: Mapping[str, Any]) -> None:
        """Apply a configuration; SetUpError names what does not fit."""
        unknown = sorted(set(config) - {"hubspot", "salesforce"})
        if unknown:
            raise SetUpError(f"unknown vendors {unknown}")
        set_up(self.hubspot, config.get("hubspot", {}))
        set_up(self.salesforce, config.get("salesforce", {}))

    def start(self) -> None:
        """Serve all three ports from threads of this process."""
        for port in self._ports:
            port.start()

    def stop(self) -> None:
        """Let go whoever hangs and close the ports."""
        self.hubspot.faults.lift()
        self.salesforce.faults.lift()
        for port in self._ports:
            port.stop()


@contextmanager
def running(
    *,
    host: str = "127.0.0.1",
    hubspot_port: int = 0,
    salesforce_port: int = 0,
    control_port: int = 0,
    seed: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[Emulator]:
    """Run the emulator inside this process; port 0 takes a free one, no config means the demo world."""
    ports = {"hubspot": hubspot_port, "salesforce": salesforce_port, "control": control_port}
    emulator = Emulator(host=host, ports=ports, seed=seed)
    try:
        emulator.configure(DEMO if config is None else config)
        emulator.start()
        yield emulator
    finally:
        emulator.stop()
