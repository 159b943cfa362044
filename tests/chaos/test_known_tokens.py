"""What a process still knows when the database goes away just after something has changed."""

import json
import time
from pathlib import Path

from app.bootstrap import Services
from tests.contract.audit_outage import bring_back, take_away
from tests.installation import HUBSPOT, Installation, add_caller, installation


def bring(host: Services, made: Installation, name: str) -> None:
    """Import a connection with a living token."""
    grant = made.emulator.control.hubspot.grant(HUBSPOT)
    line = {
        "provider": "hubspot",
        "name": name,
        "account_id": grant.account,
        "access_token": grant.access_token,
        "refresh_token": grant.refresh_token,
        "expires_at": grant.expires_at,
    }
    (result,) = host.transfer.import_lines([json.dumps(line)])
    assert result.problem is None


def wait_until_noticed(host: Services, epoch: int) -> None:
    """Wait until the host's watch has seen a later epoch, without asking the host for anything."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        last = host.watch.last
        if last is not None and last.connections > epoch:
            return
        time.sleep(0.01)
    raise AssertionError("the change was not noticed")


def test_a_change_elsewhere_just_before_an_outage_does_not_make_a_process_forget_its_tokens(
    database_url: str, tmp_path: Path
) -> None:
    """Another connection changes, nobody asks, the database goes away: the tokens that did not change are handed out."""
    with installation(database_url, tmp_path) as made:
        elsewhere, host = made.host("command"), made.host("web")
        bring(elsewhere, made, "one")
        caller = add_caller(elsewhere).caller
        time.sleep(1.0)  # within a second the host has noticed caller and connection
        before = host.issuer.issue(caller, "one")
        epoch = host.epochs.look().connections
        bring(elsewhere, made, "two")
        wait_until_noticed(host, epoch)
        take_away(host.database)
        try:
            again = host.issuer.issue(caller, "one")
        finally:
            bring_back(host.database)
    assert again is before
