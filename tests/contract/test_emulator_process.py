"""The emulator as a process: its first line, its configuration, its end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from emulator import Control, running
from emulator.model import SetUpError
from tests.contract.emulated import TIMEOUT

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-W", "error", "-m", "emulator", "--host", "127.0.0.1"]
CONFIG = {
    "hubspot": {
        "settings": {"token_lifetime": 90},
        "apps": [{"client_id": "from-file", "secrets": ["s"], "scopes": ["oauth"]}],
        "accounts": [{"id": "7", "users": [{"id": "8", "name": "ada@acme.example"}]}],
        "faults": [{"kind": "status", "endpoint": "revoke", "options": {"status": 503}}],
    }
}


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the emulator and make sure that it is gone afterwards."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def addresses(process: subprocess.Popen[str]) -> dict[str, str]:
    """Read the first line that the process prints."""
    assert process.stdout is not None
    found: dict[str, str] = json.loads(process.stdout.readline())
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_ends_cleanly(number: signal.Signals) -> None:
    """One line of JSON names three ports; a signal ends it with 0 and no noise, even amid a hang."""
    with started("--json", "--hubspot-port", "0") as process:
        found = addresses(process)
        assert set(found) == {"hubspot", "salesforce", "control"}
        control = Control(found["control"])
        assert control.health()["hubspot"] == found["hubspot"]
        control.salesforce.misbehave("hang")
        with pytest.raises(requests.Timeout):
            requests.post(f"{found['salesforce']}/services/oauth2/token", data={}, timeout=0.1)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")


def test_it_takes_a_configuration(tmp_path: Path) -> None:
    """Settings, apps, accounts and faults come from a JSON file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    with started("--config", str(path)) as process:
        control = Control(addresses(process)["control"])
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(3)]
        assert "from-file" in told[1]
        minted = control.hubspot.grant("from-file", account="7")
        assert round(minted.expires_at - minted.issued_at) == 90
        assert [fault["endpoint"] for fault in control.hubspot.faults()] == ["revoke"]


@pytest.mark.parametrize(("text", "says"), [("{", "Expecting"), ('{"pipedrive": {}}', "unknown vendors")])
def test_a_bad_configuration_is_named(tmp_path: Path, text: str, says: str) -> None:
    """A file that does not fit ends the process with 2 and one line that says why."""
    path = tmp_path / "config.json"
    path.write_text(text)
    command = [*COMMAND, "--config", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"users": []}, "unknown parts"),
        ({"settings": {"colour": 1}}, "unknown fields"),
        ({"apps": [{}]}, "client_id"),
        ({"faults": [{"kind": "explode"}]}, "unknown kind"),
    ],
)
def test_each_part_of_a_configuration_is_checked(config: dict[str, Any], says: str) -> None:
    """What does not fit is named before anything is served, and no port stays open."""
    with pytest.raises(SetUpError, match=says), running(config={"hubspot": config}):
        pass


def test_a_seed_makes_tokens_repeatable() -> None:
    """Two emulators with the same seed hand out the same tokens, without a seed never."""
    seen = []
    for seed in (5, 5, None, None):
        with running(seed=seed) as emulator:
            seen.append(emulator.control.salesforce.grant("demo-salesforce-app").refresh_token)
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_the_demo_world_can_be_walked_through() -> None:
    """Without a configuration there are an app and accounts at both vendors."""
    with running() as emulator:
        control = emulator.control
        assert [account["id"] for account in control.hubspot.accounts()] == ["1111111", "2222222"]
        assert len(control.salesforce.accounts()) == 2
        assert control.vendor("hubspot").grant("demo-hubspot-app").refresh_token
        page = requests.get(
            f"{emulator.hubspot.url}/oauth/authorize",
            params={
                "client_id": "demo-hubspot-app",
                "redirect_uri": "http://localhost:8000/callback",
                "scope": "oauth crm.objects.contacts.read",
            },
            timeout=TIMEOUT,
        )
        assert 'id="approve"' in page.text
        assert 'id="deny"' in page.text


def test_the_clock_can_be_advanced_and_returns() -> None:
    """The emulator's time is the real one plus what a test added; resetting all returns it."""
    with running(config={}) as emulator:
        before = emulator.control.now()
        assert emulator.control.advance(3600) - before >= 3600
        emulator.control.reset("all")
        assert emulator.control.now() - before < 60
