"""The supervisor keeps its children running, passes on the end, and knows when to give up."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.cli.supervisor import Supervisor
from app.clock import Clock

NOBODY = "127.0.0.1:1"


class Fast(Clock):
    """A clock that goes thirty times as fast, so that back-offs take no time to test."""

    def elapsed(self) -> float:
        """Thirty seconds a second."""
        return time.monotonic() * 30

    def sleep(self, seconds: float) -> None:
        """A thirtieth of the time."""
        time.sleep(seconds / 30)


def python(code: str) -> list[str]:
    """A child that runs this."""
    return [sys.executable, "-c", code]


def supervisor(commands: Mapping[str, Sequence[str]], *, patience: float = 600.0) -> Supervisor:
    """A supervisor of these commands."""
    return Supervisor(commands, clock=Fast(), environment=dict(os.environ), patience=patience)


@contextmanager
def stopped_when(file: Path, lines: int) -> Iterator[None]:
    """Send this process SIGTERM as soon as the file has so many lines."""

    def watch() -> None:
        give_up = time.monotonic() + 30
        while time.monotonic() < give_up and (
            not file.exists() or len(file.read_text().splitlines()) < lines
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_child_that_ends_is_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One that crashes twice runs a third time; told to stop, all end and the exit code is 0."""
    file = tmp_path / "starts"
    crashing = python(
        f"import sys, time; f = open({str(file)!r}, 'a+'); f.seek(0); n = len(f.readlines());"
        "f.write('x\\n'); f.close(); sys.exit(3) if n < 2 else time.sleep(60)"
    )
    other = python("import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)")
    crashing[2] = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0));" + crashing[2]
    before = signal.getsignal(signal.SIGTERM)
    with stopped_when(file, 3):
        code = supervisor({"crashing": crashing, "other": other}).run(bind=NOBODY, ready=lambda: None)
    assert code == 0
    assert capfd.readouterr().err.count("exit code 3") == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_child_that_cannot_be_kept_ends_everything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """After five crashes in a row the others are told to finish and the exit code is 1."""
    finished = tmp_path / "finished"
    other = python(
        "import signal, sys, time;"
        f"signal.signal(15, lambda *_: (open({str(finished)!r}, 'w').close(), sys.exit(0)));"
        "time.sleep(60)"
    )
    crashing = python("import time; time.sleep(0.2); raise SystemExit(1)")
    code = supervisor({"other": other, "crashing": crashing}).run(bind=NOBODY, ready=lambda: None)
    assert code == 1
    assert finished.exists()
    assert "giving up" in capfd.readouterr().err


def test_a_child_that_does_not_finish_is_killed_in_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that ignores SIGTERM is killed when its time is up, which is a failure."""
    file = tmp_path / "started"
    stubborn = python(
        f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(file)!r}, 'w').write('x\\n'); time.sleep(60)"
    )
    with stopped_when(file, 1):
        code = supervisor({"stubborn": stubborn}, patience=15.0).run(bind=NOBODY, ready=lambda: None)
    assert code == 1
    assert "is killed" in capfd.readouterr().err


def test_it_says_once_that_the_server_answers(tmp_path: Path) -> None:
    """`ready` is called when /livez answers with 200, and not again."""
    told: list[int] = []
    file = tmp_path / "told"

    def ready() -> None:
        told.append(1)
        file.write_text("x\n")

    class Alive(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Alive)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    child = python("import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)")
    with stopped_when(file, 1):
        supervisor({"child": child}).run(bind=f"127.0.0.1:{server.server_port}", ready=ready)
    server.shutdown()
    server.server_close()
    assert told == [1]


def test_what_comes_first_must_succeed() -> None:
    """A preparation that fails ends the program with its exit code."""
    with pytest.raises(SystemExit) as ended:
        supervisor({}).prepare(python("raise SystemExit(7)"))
    assert ended.value.code == 7


def test_a_server_on_a_unix_socket_is_found_too(tmp_path: Path) -> None:
    """With BIND=unix:/path the same question goes through the socket file."""
    path = tmp_path / "s"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    file = tmp_path / "told"
    child = python("import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)")
    with stopped_when(file, 1):
        code = supervisor({"child": child}).run(
            bind=f"unix:{path}", ready=lambda: file.write_text("x\n") and None
        )
    thread.join()
    listener.close()
    assert code == 0
