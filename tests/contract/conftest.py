"""One emulator for all contract tests; each test starts with an empty world and a registered app."""

from collections.abc import Iterator

import pytest

from emulator import Emulator, running
from tests.contract.emulated import CALLBACK, HUBSPOT_APP, SALESFORCE_APP, SECRET, Force, Hub


@pytest.fixture(scope="session")
def running_emulator() -> Iterator[Emulator]:
    """Run both vendors in this process for the whole session."""
    with running(config={}) as emulator:
        yield emulator


@pytest.fixture
def emulator(running_emulator: Emulator) -> Emulator:
    """Give the emulator with an empty world, no faults and the real time."""
    running_emulator.control.reset("all")
    return running_emulator


@pytest.fixture
def hub(emulator: Emulator) -> Hub:
    """Give a HubSpot with one app and two accounts, of which the second cannot have the leads scope."""
    control = emulator.control.hubspot
    control.register_app(
        HUBSPOT_APP,
        secrets=[SECRET],
        redirect_uris=[CALLBACK],
        scopes=["oauth", "contacts"],
        optional_scopes=["companies", "leads"],
    )
    control.add_account(id="101", domain="acme.example", users=[{"id": "11", "name": "ada@acme.example"}])
    control.add_account(
        id="102",
        domain="globex.example",
        users=[{"id": "21", "name": "bob@globex.example"}, {"id": "22", "name": "eve@globex.example"}],
        scopes=["oauth", "contacts", "companies"],
    )
    return Hub(emulator)


@pytest.fixture
def force(emulator: Emulator) -> Force:
    """Give a Salesforce with one app and one org with two users."""
    control = emulator.control.salesforce
    control.register_app(
        SALESFORCE_APP, secrets=[SECRET], redirect_uris=[CALLBACK], scopes=["api", "refresh_token", "openid"]
    )
    users = [{"name": "ada@acme.example"}, {"name": "bob@acme.example"}]
    control.add_account(id="00Dxx0000001gPF", domain="acme.example", users=users)
    return Force(emulator)
