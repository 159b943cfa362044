"""The product as real processes: gunicorn over wsgi.py and the worker, for tests and benches."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["CONFIG", "ROOT", "Server", "free_port", "serve", "web", "worker"]

ROOT: Final = Path(__file__).resolve().parent.parent
CONFIG: Final = ROOT / "config" / "gunicorn.conf.py"


@dataclass(frozen=True, slots=True)
class Server:
    """A running gunicorn."""

    host: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.port}"


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serve(
    target: str, environ: Mapping[str, str], *, options: Sequence[str], log: Path, port: int
) -> Iterator[Server]:
    """gunicorn over `target` with this environment; waits until it answers and stops it in good order."""
    command = [sys.executable, "-m", "gunicorn", *options, target]
    with _running(command, environ, log) as process:
        _wait_for(port, process, log)
        yield Server("127.0.0.1", port, process)


@contextmanager
def web(environ: Mapping[str, str], *, log: Path, port: int) -> Iterator[Server]:
    """The product's web process under its own gunicorn configuration."""
    here = {**environ, "DRAWBRIDGE_BIND": f"127.0.0.1:{port}"}
    with serve("wsgi:application", here, options=["--config", str(CONFIG)], log=log, port=port) as server:
        yield server


@contextmanager
def worker(environ: Mapping[str, str], *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The product's worker process; drained and stopped at the end."""
    with _running([sys.executable, "-m", "app", "worker"], environ, log) as process:
        yield process


@contextmanager
def _running(command: list[str], environ: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environ}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers anything at all: gunicorn binds before its workers can serve."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/livez")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
        else:
            return
        finally:
            connection.close()
    raise RuntimeError("the server did not come up in 60 s")
