"""The apps that settings define."""

import base64
import json
from dataclasses import replace

import pytest

from app.errors import ConfigurationFault
from app.oauth2.provider import Provider
from app.providers.hubspot import HubSpot
from app.providers.salesforce import Salesforce
from app.secret import Secret
from app.settings import Settings, load

KEYRING = json.dumps({"active": "k1", "keys": {"k1": base64.b64encode(bytes(32)).decode()}})


def settings(**changed: str) -> Settings:
    """Load settings from an environment with the given names."""
    environ = {"DRAWBRIDGE_KEYRING": KEYRING, "DRAWBRIDGE_PUBLIC_URL": "https://bridge.example"}
    return load(environ | {f"DRAWBRIDGE_{name}": value for name, value in changed.items()}, config_file=None)


@pytest.mark.parametrize("provider", [HubSpot(), Salesforce(), Provider()])
def test_without_a_client_id_there_is_no_app(provider: Provider) -> None:
    """A provider nobody configured has no default app."""
    assert provider.from_settings(settings()) is None


def test_hubspot_app_from_settings() -> None:
    """Client id, secrets newest first, scopes and dates come from the environment."""
    hubspot = HubSpot()
    app = hubspot.from_settings(
        settings(
            HUBSPOT_CLIENT_ID="hs-client",
            HUBSPOT_CLIENT_SECRET="new,old",
            HUBSPOT_APP_ID="4711",
            HUBSPOT_OAUTH_VERSION="2026-09",
            HUBSPOT_PKCE="false",
        )
    )
    assert app is not None
    assert (app.provider, app.name, app.client_id) == ("hubspot", "default", "hs-client")
    assert app.secrets == (Secret("new"), Secret("old"))
    assert app.redirect_uri == "https://bridge.example/connect/hubspot/callback"
    assert hubspot.option(app, "app_id") == "4711"
    assert hubspot.endpoint(app, "token") == "https://api.hubapi.com/oauth/2026-09/token"
    assert not hubspot.uses_pkce(app)


def test_salesforce_app_from_settings() -> None:
    """The login URL moves every endpoint."""
    salesforce = Salesforce()
    app = salesforce.from_settings(
        settings(
            SALESFORCE_CLIENT_ID="sf-client",
            SALESFORCE_CLIENT_SECRET="s",
            SALESFORCE_LOGIN_URL="https://acme.my.salesforce.com",
        )
    )
    assert app is not None
    assert salesforce.endpoint(app, "token") == "https://acme.my.salesforce.com/services/oauth2/token"
    assert salesforce.hosts(app) == ("https://acme.my.salesforce.com",)
    assert app.redirect_uri == "https://bridge.example/connect/salesforce/callback"


def test_login_url_elsewhere_stops_the_start() -> None:
    """A login URL outside Salesforce's domains is a configuration fault with a sentence."""
    wrong = replace(
        settings(SALESFORCE_CLIENT_ID="sf-client", SALESFORCE_CLIENT_SECRET="s"),
        salesforce_login_url="https://login.evil.example",
    )
    with pytest.raises(ConfigurationFault, match="login_url"):
        Salesforce().from_settings(wrong)
