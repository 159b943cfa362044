"""The promises hold in some hundred schedules, and a seed is all it takes to see one again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.plan import run_schedule
from tests.simulation.report import Sums, shown
from tests.simulation.template import Template, make_template

ROOT = Path(__file__).parents[2]
SCHEDULES = 120


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """Give the installation that every schedule begins with."""
    return make_template(tmp_path_factory.mktemp("simulation") / "template")


def test_promises_hold(template: Template, tmp_path: Path) -> None:
    """Under kills, freezes, power cuts, lost answers and admins at work every promise holds."""
    sums = Sums()
    for seed in range(1, SCHEDULES + 1):
        sums.add(run_schedule(seed, template, tmp_path / "world"))
    print(sums.text())
    assert [(one.seed, one.violation) for one in sums.broken] == []
    # The schedules are worth something: all this happened in them.
    for happened in ("hand_outs", "refresh", "reuse", "last_tries", "overtaken", "code", "restores"):
        assert sums.counts[happened] > 0, happened
    for fault in ("kill", "power", "freeze", "database cut off", "commit unknown", "disk full"):
        assert sums.faults[fault] > 0, fault


def test_a_seed_decides_everything(template: Template, tmp_path: Path) -> None:
    """The same seed makes the same steps at the same moments, in another process with other hashes too."""
    for seed in (3, 14, 15):
        here = [
            [
                shown(step)
                for step in run_schedule(seed, template, tmp_path / "world", keep_all_steps=True).trace
            ]
            for _ in range(2)
        ]
        assert here[0] == here[1]
        elsewhere = command("--seed", str(seed), "--trace", PYTHONHASHSEED=str(seed))
        assert elsewhere.stdout.splitlines()[:-1] == here[0]


def test_another_seed_decides_otherwise(template: Template, tmp_path: Path) -> None:
    """Two seeds do not make the same schedule."""
    first, second = (run_schedule(seed, template, tmp_path / "world") for seed in (3, 4))
    assert first.trace != second.trace


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A run that was stopped by a signal ends with the same sums as one that was not."""
    state = tmp_path / "state.json"
    arguments = ["--schedules", "30", "--processes", "1", "--start", "500", "--json"]
    whole = json.loads(command(*arguments).stdout)
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.simulation", *arguments, "--state", str(state)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    running.stderr.readline()  # its first word of progress: it has begun, and is far from done
    running.send_signal(signal.SIGTERM)
    running.communicate()
    assert running.returncode == 130
    assert 0 <= json.loads(state.read_text())["schedules"] < 30
    resumed = json.loads(command(*arguments, "--state", str(state)).stdout)
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the simulation as a command that must succeed."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=True,
    )
