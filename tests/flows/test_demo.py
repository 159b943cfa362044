"""The demo, whole: what a newcomer sees first has to work."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).parents[2]


def environment(temporary: Path) -> dict[str, str]:
    """The environment of somebody who also has settings of his own, which are none of the demo's business."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(temporary),
        "DRAWBRIDGE_LOG_LEVEL": "not-a-level",
    }


def test_the_demo_walks_its_tour_and_ends_with_0(tmp_path: Path) -> None:
    """From two emulated vendors to a sound audit trail over real processes; nothing of it is left behind."""
    done = subprocess.run(
        [sys.executable, "-m", "app", "demo", "--exit", "--json"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    assert told["steps"][-1]["step"] == "The audit trail is sound"
    assert len(told["steps"]) == 13
    assert list(tmp_path.iterdir()) == []


def test_the_demo_stays_up_until_it_is_ended(tmp_path: Path) -> None:
    """Without --exit its console can be opened after the tour; SIGTERM ends it with 0, and all its processes with it."""
    command = [sys.executable, "-m", "app", "demo", "--json"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        deadline = threading.Timer(300, process.kill)
        deadline.start()
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        page = requests.get(told["login_url"], timeout=20)
        assert page.status_code == 200
        assert "<form" in page.text
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        deadline.cancel()
    with pytest.raises(requests.ConnectionError):
        requests.get(told["url"], timeout=20)
    assert list(tmp_path.iterdir()) == []
