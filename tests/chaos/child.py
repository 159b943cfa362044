"""Runs one process of the product unchanged, under a host name of its own, with a fault inside it if one is asked for.

    python -m tests.chaos.child MODULE [ARGUMENT...]

    CHAOS_HOST      what this process calls its host: attempts in the database then say who held a lease
    CHAOS_DIE       before_fsync or after_fsync: die by SIGKILL around the journal's write of a provider's answer for
                    the connection whose id stands in the file CHAOS_ARMED (it is removed, so one process dies once)
    CHAOS_SAMPLES   a file that gets one line for every measured window: name and seconds
    CHAOS_BREAK     a rule of the product to break, so that the suite can be seen to notice; the names stand in BREAKS
    CHAOS_RESERVE   bytes of the audit reserve, so that it can be used up in seconds

The product knows nothing of this: what must happen inside it is put around its functions from here.
"""

from __future__ import annotations

import ctypes
import http.client
import importlib
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def main() -> None:
    """Put in place what the environment asks for and become the module."""
    _die_with_parent()
    if name := os.environ.get("CHAOS_HOST"):
        socket.gethostname = lambda: name
    if rule := os.environ.get("CHAOS_BREAK"):
        BREAKS[rule]()
    if moment := os.environ.get("CHAOS_DIE"):
        _die_at(moment, Path(os.environ["CHAOS_ARMED"]))
    if samples := os.environ.get("CHAOS_SAMPLES"):
        _measure_windows(Samples(Path(samples)))
    if reserve := os.environ.get("CHAOS_RESERVE"):
        _cut_reserve(int(reserve))
    module, sys.argv = sys.argv[1], sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _die_with_parent() -> None:
    """Whatever happens to the suite, nothing that it started stays (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_at(moment: str, armed: Path) -> None:
    from app.broker.journal import Journal

    append = Journal.append

    def deadly(self: Journal, entry: Any) -> None:
        if moment == "before_fsync":
            _die_if(armed, entry.connection)
        append(self, entry)
        if moment == "after_fsync":
            _die_if(armed, entry.connection)

    Journal.append = deadly  # type: ignore[method-assign]


def _die_if(armed: Path, connection: str) -> None:
    try:
        if armed.read_text() != connection:
            return
        armed.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Samples:
    """Durations in a file that several processes append to."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._own = threading.local()

    def begin(self, name: str) -> None:
        """Start the clock of a window in this thread."""
        setattr(self._own, name, time.perf_counter())

    def end(self, name: str) -> None:
        """Write down how long the window was, if it was open in this thread."""
        began = self._own.__dict__.pop(name, None)
        if began is None:
            return
        line = f"{name} {time.perf_counter() - began:.9f}\n".encode()
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, line)
        os.close(descriptor)


def _measure_windows(samples: Samples) -> None:
    """The two windows of P1: the answer's head is read → the journal's fsync is done; last clock check → body written."""
    from app.broker.journal import Journal
    from app.broker.refresh import Refresher

    begin, append, wire, send = (
        http.client.HTTPResponse.begin,
        Journal.append,
        Refresher.wire,
        socket.socket.send,
    )

    def read_head(self: http.client.HTTPResponse) -> None:
        begin(self)
        samples.begin("unsaved")

    def appended(self: Journal, entry: Any) -> None:
        append(self, entry)
        samples.end("unsaved")

    def checked(self: Refresher, before_body: Callable[[], None] | None = None) -> Any:
        if before_body is None:
            return wire(self)

        def check() -> None:
            # From before the clock is read, so that the window is never measured too short.
            samples.begin("unsent")
            before_body()

        return wire(self, check)

    def sent(self: socket.socket, *arguments: Any) -> int:
        written = send(self, *arguments)
        samples.end("unsent")
        return written

    http.client.HTTPResponse.begin = read_head  # type: ignore[method-assign]
    Journal.append = appended  # type: ignore[method-assign]
    Refresher.wire = checked  # type: ignore[method-assign]
    socket.socket.send = sent  # type: ignore[method-assign,assignment]


def _cut_reserve(size: int) -> None:
    from app.access.audit import Trail

    defaults = Trail.__init__.__kwdefaults__
    assert defaults is not None
    assert "reserve" in defaults
    defaults["reserve"] = size


def _overtake() -> None:
    """An attempt left open is overtaken as soon as its lease is past."""
    refresh: Any = importlib.import_module("app.broker.refresh")
    refresh.may_refresh = lambda seen, now: seen.lease_until is None or seen.lease_until <= now


def _hand_out_the_dead() -> None:
    """A token's life is not looked at."""
    from app.broker.issue import HandOut

    HandOut.left = lambda self, now: 60.0  # type: ignore[method-assign]


def _forget_the_journal() -> None:
    """An answer goes straight to the database."""
    from app.broker.journal import Journal

    Journal.append = lambda self, entry: None  # type: ignore[method-assign]


def _leave_no_record() -> None:
    """Hand-outs are not recorded."""
    from app.access.policy import Access

    Access.record_all = lambda self, entries: None  # type: ignore[method-assign]


def _wait_for_the_provider() -> None:
    """A token that lives is not handed out while it is stale: callers wait for the refresh."""
    from app.broker import issue

    needed = issue._needed
    issue._needed = lambda token, min_ttl: max(needed(token, min_ttl), token.life / 2)


BREAKS: Final[Mapping[str, Callable[[], None]]] = {
    "overtake": _overtake,
    "dead": _hand_out_the_dead,
    "journal": _forget_the_journal,
    "record": _leave_no_record,
    "wait": _wait_for_the_provider,
}


if __name__ == "__main__":
    main()
