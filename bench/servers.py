"""What the benches share: the bare route under the product's gunicorn settings, requests, memory, databases."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.postgres import temporary_server
from tests.processes import CONFIG, Server, serve

__all__ = ["bare_route", "database", "memory_of_workers", "token_request"]


def bare_route(environ: Mapping[str, str], *, log: Path, port: int) -> AbstractContextManager[Server]:
    """The bare Flask route under the product's own gunicorn configuration."""
    here = {**environ, "DRAWBRIDGE_BIND": f"127.0.0.1:{port}"}
    return serve("bench.bare:create_app()", here, options=["--config", str(CONFIG)], log=log, port=port)


def token_request(path: str, client_id: str, secret: str) -> bytes:
    """A GET with Basic credentials on a connection that is kept open."""
    credentials = base64.b64encode(f"{client_id}:{secret}".encode()).decode()
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", f"Authorization: Basic {credentials}"]
    return ("\r\n".join([*lines, "Connection: keep-alive", "", ""])).encode()


def _memory_of(pid: int) -> tuple[float, float]:
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
    return [_memory_of(int(child)) for child in children]


@contextmanager
def database(kind: str, directory: Path) -> Iterator[str]:
    """The URL of an empty database: a file, or one on a PostgreSQL server of our own with durable commits."""
    if kind == "sqlite":
        yield f"sqlite:///{directory / 'drawbridge.db'}"
        return
    with temporary_server() as server:
        yield server.create_database()
