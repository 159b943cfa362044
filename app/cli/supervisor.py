"""One parent for the processes of one machine: starts them, starts them again, and ends them in good order."""

from __future__ import annotations

import ctypes
import http.client
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import click

from app.clock import Clock

__all__ = ["Supervisor"]

_POLL: Final = 0.2  # seconds between two looks at the children
_PATIENCE: Final = 5  # crashes in a row, each within `_SETTLED` of its start, before giving up
_SETTLED: Final = 30.0  # seconds; a child that lived so long has started well
_LONGEST_BACKOFF: Final = 30.0
_SET_PARENT_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(slots=True)
class _Child:
    """One process to keep running."""

    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    crashes: int = 0


class Supervisor:
    """Keeps commands running until it is told to stop or one of them cannot be kept.

    SIGTERM and SIGINT are passed on as SIGTERM, which every child takes as "finish what you began". Children have
    sessions of their own, so that Ctrl-C reaches them only through here; where the parent dies by force, the kernel tells
    them. `patience` is the seconds they have to finish before they are killed.
    """

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        *,
        clock: Clock,
        environment: Mapping[str, str],
        patience: float,
    ) -> None:
        self._children = [_Child(name, command) for name, command in commands.items()]
        self._clock = clock
        self._environment = dict(environment)
        self._patience = patience
        self._stopping = False

    def prepare(self, command: Sequence[str]) -> None:
        """Run a command to its end first; raises SystemExit with its code when it fails."""
        done = subprocess.run(command, env=self._environment, stdout=subprocess.DEVNULL, check=False)  # noqa: S603
        if done.returncode != 0:
            raise SystemExit(done.returncode if done.returncode > 0 else 1)

    def run(self, *, bind: str, ready: Callable[[], None]) -> int:
        """Run until stopped; the exit code: 0 when asked to stop and all ended well.

        `ready` is called once, when something answers on `bind`.
        """
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._end(failed=not self._watch(bind, ready))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self, bind: str, ready: Callable[[], None]) -> bool:
        """Keep the children running until asked to stop; false when one of them cannot be kept."""
        told = False
        while not self._stopping:
            if not all(self._keep(child) for child in self._children):
                return False
            if not told and _answers(bind):
                told = True
                ready()
            self._clock.sleep(_POLL)
        return True

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _keep(self, child: _Child) -> bool:
        """See that the child runs; false when it crashed so often that there is no point in going on."""
        now = self._clock.elapsed()
        if child.process is None:
            if now >= child.start_at:
                self._start(child, now)
            return True
        code = child.process.poll()
        if code is None:
            return True
        child.process = None
        child.crashes = child.crashes + 1 if now - child.started_at < _SETTLED else 1
        if child.crashes >= _PATIENCE:
            click.echo(f"drawbridge: {child.name} ended {child.crashes} times in a row; giving up.", err=True)
            return False
        pause = min(2.0 ** (child.crashes - 1), _LONGEST_BACKOFF)
        child.start_at = now + pause
        click.echo(f"drawbridge: {child.name} ended ({_told(code)}); started again in {pause:g} s.", err=True)
        return True

    def _start(self, child: _Child, now: float) -> None:
        child.started_at = now
        child.process = subprocess.Popen(  # noqa: S603 - our own command
            child.command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
        )

    def _end(self, *, failed: bool) -> int:
        """Ask all children to finish and wait for them; how it all went as an exit code."""
        running = [child for child in self._children if child.process is not None]
        for child in running:
            assert child.process is not None
            child.process.send_signal(signal.SIGTERM)
        give_up = self._clock.elapsed() + self._patience
        return max((self._wait(child, give_up) for child in running), default=0) or int(failed)

    def _wait(self, child: _Child, give_up: float) -> int:
        assert child.process is not None
        while child.process.poll() is None:
            if self._clock.elapsed() > give_up:
                click.echo(f"drawbridge: {child.name} did not finish in time and is killed.", err=True)
                child.process.kill()
                child.process.wait()
                return 1
            self._clock.sleep(_POLL / 4)
        # One that was just starting had not learned yet to finish in order, and began nothing.
        return 0 if child.process.returncode in (0, -signal.SIGTERM) else 1


def _answers(bind: str) -> bool:
    """Whether a server says at this address that it lives."""
    if bind.startswith("unix:"):
        connection: http.client.HTTPConnection = _UnixConnection(bind.removeprefix("unix:"))
    else:
        host, _, port = bind.rpartition(":")
        host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))  # noqa: S104 - compared, not bound
        connection = http.client.HTTPConnection(host, int(port), timeout=1.0)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=1.0)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _told(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _die_with_parent() -> None:
    """In the child: have the kernel send SIGTERM when the parent dies without saying so (Linux; elsewhere nothing)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
