"""Holds a request to its total deadline by shutting its socket, whatever step it is stuck in.

A socket's own time-out starts again with every byte, so a peer that drips one byte a second holds a request
for ever. The deadline is counted on a clock that goes on while the machine is suspended; since no waiting
primitive does, the watching thread looks at that clock several times a second as long as there is something
to watch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from types import TracebackType
from typing import Final, Self

from app.clock import Clock

__all__ = ["Watch", "Watchdog"]

_LOOK: Final = 0.1
"""Seconds between looks: how late a deadline may be noticed. Ten looks a second cost nothing that shows."""

_IDLE: Final = 10.0
"""Seconds after which a thread that has nothing to watch ends."""


class Watch:
    """One request under watch; use it as a context manager."""

    __slots__ = ("_clock", "_deadline", "_dog", "_handle", "_lock", "fired")

    def __init__(self, dog: Watchdog, clock: Clock, seconds: float) -> None:
        self._dog = dog
        self._clock = clock
        self._deadline = clock.elapsed() + seconds
        self._lock = threading.Lock()
        self._handle: socket.socket | None = None
        self.fired = False

    def remaining(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self._deadline - self._clock.elapsed())

    def hold(self, sock: socket.socket) -> None:
        """Shut the connection of this socket when the deadline passes, or now if it has.

        A handle of its own, so that the number cannot belong to another connection by then, and so that it
        goes on meaning this one when TLS moves the descriptor to a new object. It replaces the one held
        before.
        """
        with self._lock:
            self._let_go()
            self._handle = sock.dup()
            if self.fired:
                _shut(self._handle)

    def release(self) -> None:
        """Let go of the connection; it stays open as long as this holds it."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def look(self) -> bool:
        """Shut the socket if the deadline has passed; true when it has."""
        if self.remaining() > 0:
            return False
        with self._lock:
            self.fired = True
            if self._handle is not None:
                _shut(self._handle)
        return True

    def __enter__(self) -> Self:
        self._dog.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._dog.end(self)


class Watchdog:
    """The thread that looks at all watches of this process; it starts when needed and ends when idle."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._reset()

    def watch(self, seconds: float) -> Watch:
        """A watch whose deadline is so many seconds from now."""
        return Watch(self, self._clock, seconds)

    def begin(self, watch: Watch) -> None:
        """Look at this watch from now on."""
        if self._process != os.getpid():
            self._reset()  # threads do not survive a fork, and the lock may have been held by one
        with self._changed:
            self._watches.add(watch)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="http-watchdog", daemon=True)
                self._thread.start()
            self._changed.notify()

    def end(self, watch: Watch) -> None:
        """Stop looking at it."""
        with self._changed:
            self._watches.discard(watch)

    def _reset(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._watches: set[Watch] = set()
        self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._watches and not self._changed.wait(_IDLE) and not self._watches:
                    self._thread = None
                    return
                watches = list(self._watches)
            gone = {watch for watch in watches if watch.look()}
            with self._changed:
                self._watches -= gone
                if self._watches:
                    soonest = min(watch.remaining() for watch in self._watches)
                    self._changed.wait(min(_LOOK, soonest + 0.001))


def _shut(handle: socket.socket) -> None:
    """Both directions of the connection end; a blocked read or write in another thread returns at once.

    Never through an SSLSocket, which would drop its TLS layer first: a reader that came back once more
    would be given ciphertext as if it were the answer.
    """
    with contextlib.suppress(OSError):  # not connected any more: what was wanted
        handle.shutdown(socket.SHUT_RDWR)
