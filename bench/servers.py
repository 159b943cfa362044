"""gunicorn under test: started with the same settings for the product and for the bare route."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import load
from tests.postgres import start_server

__all__ = ["Server", "database", "free_port", "memory_of_workers", "pss_of", "serve", "token_request"]

ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Server:
    """A running gunicorn."""

    host: str
    port: int
    process: subprocess.Popen[bytes]

    def run(self, request: bytes, *, sockets: int, seconds: float) -> load.Result:
        """Put load on it."""
        return load.run(self.host, self.port, request, sockets=sockets, seconds=seconds)


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serve(
    target: str, environ: Mapping[str, str], *, log: Path, port: int, config: Path | None = None
) -> Iterator[Server]:
    """gunicorn over `target` with this environment; waits until it answers and stops it in good order.

    `config` is the product's own gunicorn configuration; without one the same values are given as options.
    """
    options = ["--config", str(config)] if config else _as_configured(environ, port)
    command = [sys.executable, "-m", "gunicorn", *options, target]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environ}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(port, process, log)
        yield Server("127.0.0.1", port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _as_configured(environ: Mapping[str, str], port: int) -> list[str]:
    return [
        "--worker-class=gthread",
        f"--workers={environ['DRAWBRIDGE_WEB_WORKERS']}",
        f"--threads={environ['DRAWBRIDGE_WEB_THREADS']}",
        f"--bind=127.0.0.1:{port}",
        "--keep-alive=75",
        "--no-control-socket",
        "--log-level=warning",
    ]


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the server did not come up in 60 s")


def token_request(path: str, client_id: str, secret: str) -> bytes:
    """A GET with Basic credentials on a connection that is kept open."""
    credentials = base64.b64encode(f"{client_id}:{secret}".encode()).decode()
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", f"Authorization: Basic {credentials}"]
    return ("\r\n".join([*lines, "Connection: keep-alive", "", ""])).encode()


def pss_of(pid: int) -> tuple[float, float]:
    """Resident memory of a process in MB, and its proportional share of it (shared pages divided)."""
    rss = pss = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            rss = int(line.split()[1])
        elif line.startswith("Pss:"):
            pss = int(line.split()[1])
    return rss / 1024, pss / 1024


def memory_of_workers(server: Server) -> list[tuple[float, float]]:
    """(resident, proportional) MB of each worker process."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [pss_of(int(child)) for child in children]


@contextmanager
def database(kind: str, directory: Path) -> Iterator[str]:
    """The URL of an empty database: a file, or one on a PostgreSQL server of our own with durable commits."""
    if kind == "sqlite":
        yield f"sqlite:///{directory / 'drawbridge.db'}"
        return
    server = start_server(directory / "postgres")
    try:
        yield server.create_database()
    finally:
        server.stop()
