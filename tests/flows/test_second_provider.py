"""A provider file of a dozen lines for a plain RFC 6749 server, from laying it down to the hand-out."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from pytest_httpserver import HTTPServer

import app.providers
from app.access.permissions import Permission
from app.secret import Secret
from tests.contract.provider_stages import CLIENT_ID, SECRET, PlainServer
from tests.installation import installation

PROVIDER_FILE = '''"""Acme, a plain RFC 6749 server."""

from app.oauth2.provider import Provider


class Acme(Provider):
    """Acme's authorization server."""

    name = "acme"
    title = "Acme"
    authorize_endpoint = "https://acme.example/authorize"
    token_endpoint = "https://acme.example/token"
'''


@pytest.fixture
def acme_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lay the file down where providers are looked for, and forget it afterwards."""
    directory = tmp_path / "providers"
    directory.mkdir()
    file = directory / "acme.py"
    file.write_text(PROVIDER_FILE)
    monkeypatch.setattr(app.providers, "__path__", [*app.providers.__path__, str(directory)])
    yield file
    sys.modules.pop("app.providers.acme", None)


def test_a_dozen_lines_make_a_provider(
    acme_file: Path, database_url: str, tmp_path: Path, httpserver: HTTPServer
) -> None:
    """The file is found, its app is added, an account connects, its token is handed out, refreshed and revoked."""
    assert len(PROVIDER_FILE.splitlines()) <= 14
    server = PlainServer(rotates=True)
    server.serve(httpserver)
    with installation(database_url, tmp_path) as made:
        host = made.host()
        where = {
            f"{name}_endpoint": httpserver.url_for(f"/{name}") for name in ("authorize", "token", "revoke")
        }
        where["introspect_endpoint"] = httpserver.url_for("/introspect")
        acme = host.apps.add(
            "acme",
            "plain",
            client_id=CLIENT_ID,
            secrets=[Secret(SECRET)],
            scopes=["read", "write"],
            options=where,
        )
        start = host.connect.start(acme, name="acme-one", started_by="admin:cli")
        answer = requests.get(start.url, params={"account": "acct-1"}, allow_redirects=False, timeout=10)
        query = dict(part.split("=", 1) for part in answer.headers["Location"].partition("?")[2].split("&"))
        done = host.connect.finish(
            "acme", state=query["state"], code=Secret(query["code"]), error=None, browser=start.browser
        )
        assert (done.connection.name, done.connection.account_id) == ("acme-one", "acct-1")

        caller = host.callers.add("reader", allow=[Permission.parse("token:issue@acme-*")]).caller
        first = host.issuer.issue(caller, "acme-one")
        second = host.issuer.issue(caller, "acme-one", rejected=first.digest)
        assert second.generation == first.generation + 1
        assert second.digest != first.digest
        assert host.store.named("acme-one").rotation.value == "seen"

        host.revoker.disconnect("acme-one")
        assert host.revoker.carry_out(done.connection.id)
        assert server.refreshing == {}
