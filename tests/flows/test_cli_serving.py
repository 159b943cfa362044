"""`up`: web and worker under one supervisor."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.waiting import until

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def up(folder: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`up` in a folder of its own; what it said when it was ready. Ended by SIGTERM if it still runs."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("DRAWBRIDGE_")}
    environment |= {"PYTHONPATH": str(ROOT), "DRAWBRIDGE_WEB_WORKERS": "1"}
    environment |= {
        "DRAWBRIDGE_STATE_DIR": str(folder / "state"),
        "DRAWBRIDGE_DATABASE_URL": f"sqlite:///{folder}/d.db",
    }
    environment |= {f"DRAWBRIDGE_{name}": text for name, text in settings.items()}
    command = [sys.executable, "-P", "-m", "app", "up", "--json"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    deadline = threading.Timer(120, process.kill)
    deadline.start()
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield process, json.loads(line) if line else {}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        process.stdout.close()
        deadline.cancel()


def children(pid: int) -> dict[str, int]:
    """The processes directly below, by what they run."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {}
    for child in listed:
        with contextlib.suppress(FileNotFoundError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            if len(words) > 1:  # one that ended and was not waited for yet has none
                found["web" if "gunicorn" in words else words[-2]] = int(child)
    return found


def status(url: str) -> int:
    """What a GET answers."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - loopback
        return int(answer.status)


def test_up_serves_keeps_its_children_and_ends_in_order(tmp_path: Path) -> None:
    """It answers, a killed worker comes back, a file named relative to the caller is found, SIGTERM is exit code 0."""
    (tmp_path / "secret.txt").write_text("hubspot-secret\n")
    settings = {"HUBSPOT_CLIENT_ID": "abcdef", "HUBSPOT_CLIENT_SECRET_FILE": "secret.txt"}
    with up(tmp_path, BIND=f"127.0.0.1:{free_port()}", **settings) as (process, said):
        assert said, (tmp_path / "log").read_text()
        assert status(f"{said['url']}/livez") == 200
        assert status(f"{said['url']}/readyz") == 200
        until(lambda: set(children(process.pid)) == {"web", "worker"})
        first = children(process.pid)["worker"]
        os.kill(first, signal.SIGKILL)
        until(lambda: children(process.pid).get("worker", first) != first)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, (tmp_path / "log").read_text()


def test_up_does_not_start_on_a_fault(tmp_path: Path) -> None:
    """With a fault in the settings it says so and ends with 1 before anything runs."""
    with up(tmp_path, BIND="127.0.0.1:1", ENVIRONMENT="production") as (process, said):
        assert said == {}
        assert process.wait() == 1
    assert "DRAWBRIDGE_KEYRING" in (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_children_do_not_outlive_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    """After kill -9 of the parent, web and worker end by themselves."""
    with up(tmp_path, BIND=f"127.0.0.1:{free_port()}") as (process, said):
        assert said, (tmp_path / "log").read_text()
        below = children(process.pid)
        assert set(below) == {"web", "worker"}
        process.kill()
        process.wait()
        until(lambda: not any(is_running(pid) for pid in below.values()))


def is_running(pid: int) -> bool:
    """Whether the process is there and more than a name."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
