"""Parts of the short profile, run side by side once for all tests here: each looks at the line of one scenario.

The whole profile is `python -m tests.chaos`; the parts are those that take least time and reach most of the suite itself.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.conftest import table_key
from tests.chaos.profiles import PACES
from tests.chaos.tally import Tally, draw

ROOT = Path(__file__).parents[2]
LONGEST = 600.0
PARTS = ("stopping", "disk", "rejected")
LINES = [
    pytest.param(scenario, kind, marks=[pytest.mark.postgres] if kind == "postgresql" else [])
    for scenario in PARTS
    for kind in PACES["short"][scenario].on
]

Tallies = dict[tuple[str, str], Tally]


def command(*arguments: str) -> subprocess.Popen[str]:
    """Start the suite as a person does; coverage is measured here, not in a hundred processes that get killed."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("COV")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def tallies(request: pytest.FixtureRequest) -> Tallies:
    """Run the scenarios that some test wants, side by side, and give what each counted."""
    wanted = {
        (str(values["scenario"]), str(values["kind"]))
        for item in request.session.items
        if isinstance(item, pytest.Function) and "scenario" in (values := parameters(item))
    }
    arguments = [word for scenario in sorted({name for name, _ in wanted}) for word in ("--only", scenario)]
    if {kind for _, kind in wanted} == {"sqlite"}:
        arguments += ["--database", "sqlite"]
    suite = command("--profile", "short", "--json", *arguments)
    said, progress = suite.communicate(timeout=LONGEST)
    found = [Tally.from_json(line) for line in said.splitlines()]
    request.config.stash[table_key] = draw(found)
    assert found, progress
    return {(tally.scenario, tally.database): tally for tally in found}


def parameters(item: pytest.Function) -> dict[str, object]:
    """What a test is called with, nothing when it has no parameters."""
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.mark.parametrize(("scenario", "kind"), LINES)
def test_every_promise_holds_whatever_goes_wrong(tallies: Tallies, scenario: str, kind: str) -> None:
    """No family revoked, no token handed out dead, none refused that lived, none lost; and something did go wrong."""
    tally = tallies[scenario, kind]
    assert tally.broken == []
    assert (tally.revoked, tally.expired, tally.refused, tally.lost) == (0, 0, 0, 0)
    assert tally.rounds == PACES["short"][scenario].rounds
    assert tally.faults > 0
    assert tally.hand_outs > 0


def test_a_broken_rule_is_noticed() -> None:
    """A product that does not record its hand-outs fails the suite, which says so and exits with 1."""
    suite = command(
        "--only", "stopping", "--database", "sqlite", "--rounds", "1", "--break", "record", "--json"
    )
    said, progress = suite.communicate(timeout=LONGEST)
    assert suite.returncode == 1, progress
    tally = Tally.from_json(said)
    assert tally.result == "BROKEN"
    assert any("rows in the trail" in sentence for sentence in tally.broken), tally.broken


def test_an_interrupted_run_shows_what_it_has() -> None:
    """Ctrl-C ends every process and prints the table."""
    suite = command("--only", "stopping", "--database", "sqlite", "--rounds", "1000")
    assert suite.stderr is not None
    told = next(line for line in suite.stderr if "connections ready" in line)
    suite.send_signal(signal.SIGINT)
    said, progress = suite.communicate(timeout=LONGEST)
    assert suite.returncode == 130, told + progress
    assert "cut short" in said
