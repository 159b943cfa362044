"""Hosts that can be killed, frozen and asked to end: one process of the product each, with its own state folder."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from tests.processes import CONFIG, ROOT, free_port

__all__ = ["Host", "Kind"]

Kind = Literal["web", "worker"]

_START: Final = 60.0
_END: Final = 90.0
_MODULES: Final[Mapping[Kind, tuple[str, ...]]] = {
    "web": ("gunicorn", "--config", str(CONFIG), "wsgi:application"),
    "worker": ("app", "worker"),
}


@dataclass(slots=True)
class Host:
    """One host: a web or worker process in a process group of its own; times are epoch seconds.

    `outages` are the spans in which it could not answer, by our doing; `kills` are the moments it was killed at.
    """

    name: str
    kind: Kind
    environ: Mapping[str, str]
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    outages: list[list[float]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    frozen: bool = False

    def launch(self) -> None:
        """Start the process; call it from a thread that stays, for its end would end the process."""
        if self.kind == "web" and not self.port:
            self.port = free_port()
        # Product processes are not measured: half of them are killed, and measuring slows the rest.
        inherited = {
            name: text for name, text in os.environ.items() if not name.startswith(("COV", "DRAWBRIDGE_"))
        }
        bind = {"DRAWBRIDGE_BIND": f"127.0.0.1:{self.port}"} if self.port else {}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.child", *_MODULES[self.kind]],
                cwd=ROOT,
                env={**inherited, **self.environ, **bind, "CHAOS_HOST": self.name},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_serving(self) -> None:
        """Return when a web process answers; a worker says nothing, so there is nothing to wait for."""
        if self.kind == "web":
            self._wait_for_answer()
        for outage in self.outages:
            if outage[1] == float("inf"):
                outage[1] = time.time()

    def kill(self) -> None:
        """Every process of the host dies at once by SIGKILL."""
        self._mark_down()
        self._signal(signal.SIGKILL)
        # Counted from after the signal: what happened before this moment may still have been done by it.
        self.kills.append(time.time())
        self._gone()

    def freeze(self) -> None:
        """Stop every process of the host where it stands."""
        self._mark_down()
        self._signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)
        self.frozen = False
        self.outages[-1][1] = time.time()

    def ask_to_end(self) -> None:
        """SIGTERM to the main process, as an orchestrator does."""
        self._mark_down()
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait_for_end(self) -> int:
        """Its exit code; killed when it takes longer than any lease."""
        assert self.process is not None
        try:
            return self.process.wait(_END)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            return self.process.wait()

    def died(self) -> bool:
        """Whether it has ended by itself."""
        return self.process is not None and self.process.poll() is not None

    def wait_for_death(self, *, within: float) -> bool:
        """Wait for it to die by itself and count that as a kill; false when it goes on living."""
        assert self.process is not None
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        self._mark_down()
        self.kills.append(time.time())
        self.process = None
        return True

    def processes(self) -> list[int]:
        """The ids of all its processes."""
        assert self.process is not None
        group = self.process.pid
        return [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if _group_of(int(folder.name)) == group
        ]

    def close(self) -> None:
        """Be gone, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self._gone()

    def down_within(self, begin: float, end: float) -> bool:
        """Whether it was out of action at any time between the two moments."""
        return any(since <= end and until >= begin for since, until in self.outages)

    def _mark_down(self) -> None:
        self.outages.append([time.time(), float("inf")])

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            if number != signal.SIGKILL:
                raise

    def _gone(self) -> None:
        assert self.process is not None
        self.process.wait()
        self.process = None

    def _wait_for_answer(self) -> None:
        until = time.monotonic() + _START
        while time.monotonic() < until:
            if self.died():
                raise RuntimeError(f"{self.name} ended: {self.log.read_text()[-2000:]}")
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/livez")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
            else:
                return
            finally:
                connection.close()
        raise RuntimeError(f"{self.name} did not come up in {_START:.0f} s")


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0
