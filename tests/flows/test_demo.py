"""The demo, whole: what a newcomer sees first has to work."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_walks_its_tour_and_ends_with_0(tmp_path: Path) -> None:
    """From two emulated vendors to a sound audit trail over real processes; nothing of it is left behind."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path),
        "DRAWBRIDGE_LOG_LEVEL": "not-a-level",
    }
    done = subprocess.run(
        [sys.executable, "-m", "app", "demo", "--exit", "--json"],
        cwd=tmp_path,
        env=environment,
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
