"""A whole installation for tests: the real services over a real database, and the emulated providers beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from app.access.callers import Added
from app.access.permissions import Permission
from app.bootstrap import Kind, Services, bootstrap, prepare_database
from app.broker.connection import Connection
from app.clock import Clock
from app.secret import Secret
from app.settings import Settings, load
from emulator import Emulator, running

PUBLIC_URL: Final = "http://localhost:8000"
HUBSPOT: Final = "hubspot-client"
SALESFORCE: Final = "salesforce-client"
_HUBSPOT_SCOPES: Final = ["oauth", "crm.objects.contacts.read"]
_HUBSPOT_OPTIONAL: Final = ["crm.objects.leads.read", "crm.objects.leads.write", "sales-email-read"]


@dataclass(slots=True)
class Installation:
    """One database and one pair of emulated providers; `host()` opens as many hosts on them as a test wants."""

    database_url: str
    directory: Path
    emulator: Emulator
    environ: dict[str, str] = field(default_factory=dict)
    _opened: ExitStack = field(default_factory=ExitStack)
    _hosts: int = 0

    def settings(self, *, host: str = "host1", **overrides: str) -> Settings:
        """The settings of one host; `overrides` by the names of the environment without the prefix."""
        return load(self.environment(host=host, **overrides), config_file=None)

    def environment(self, *, host: str = "host1", **overrides: str) -> dict[str, str]:
        """The same as environment variables, for processes."""
        hubspot, salesforce = self.emulator.hubspot.url, self.emulator.salesforce.url
        values = {
            "DATABASE_URL": self.database_url,
            "STATE_DIR": str(self.directory / host),
            "KEYRING_FILE": str(self.keyring_file()),
            "PUBLIC_URL": PUBLIC_URL,
            "ALLOW_LOOPBACK_PROVIDERS": "true",
            "HUBSPOT_CLIENT_ID": HUBSPOT,
            "HUBSPOT_CLIENT_SECRET": "hubspot-secret",
            "HUBSPOT_SCOPES": " ".join(_HUBSPOT_SCOPES),
            "HUBSPOT_API_URL": hubspot,
            "HUBSPOT_AUTHORIZE_URL": f"{hubspot}/oauth/authorize",
            "SALESFORCE_CLIENT_ID": SALESFORCE,
            "SALESFORCE_CLIENT_SECRET": "salesforce-secret",
            "SALESFORCE_LOGIN_URL": salesforce,
            "SALESFORCE_SCOPES": "api refresh_token",
        }
        return {f"DRAWBRIDGE_{name}": text for name, text in (values | self.environ | overrides).items()}

    def keyring_file(self) -> Path:
        """One keyring for all hosts, as an operator would give it to each."""
        file = self.directory / "keyring.json"
        if not file.exists():
            key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
            file.write_text(f'{{"active":"k1","keys":{{"k1":"{key}"}}}}')
            file.chmod(0o600)
        return file

    def host(self, kind: Kind = "web", *, clock: Clock | None = None, **overrides: str) -> Services:
        """Start one more host, with a STATE_DIR of its own; closed when the test ends."""
        self._hosts += 1
        settings = self.settings(host=f"host{self._hosts}", **overrides)
        prepare_database(settings, clock=clock)
        services = bootstrap(settings, kind=kind, clock=clock)
        self._opened.callback(services.close)
        services.start()
        return services

    def close(self) -> None:
        """Close all hosts."""
        self._opened.close()


@contextmanager
def installation(
    database_url: str,
    directory: Path,
    *,
    hubspot_app: Mapping[str, object] | None = None,
    salesforce_app: Mapping[str, object] | None = None,
    **environ: str,
) -> Iterator[Installation]:
    """An installation whose default apps are registered at fresh emulated providers; fields of the apps may be given."""
    with running() as emulator:
        emulator.control.hubspot.register_app(
            HUBSPOT,
            **{
                "secrets": ["hubspot-secret"],
                "redirect_uris": [f"{PUBLIC_URL}/connect/hubspot/callback"],
                "scopes": _HUBSPOT_SCOPES,
                "optional_scopes": _HUBSPOT_OPTIONAL,
                **(hubspot_app or {}),
            },
        )
        emulator.control.salesforce.register_app(
            SALESFORCE,
            **{
                "secrets": ["salesforce-secret"],
                "redirect_uris": [f"{PUBLIC_URL}/connect/salesforce/callback"],
                "scopes": ["api", "refresh_token"],
                "rotation": True,
                **(salesforce_app or {}),
            },
        )
        made = Installation(database_url, directory, emulator, environ)
        try:
            yield made
        finally:
            made.close()


def connect(host: Services, made: Installation, provider: str, *, name: str | None = None) -> Connection:
    """Connect an account through the real redirects: begin, consent, callback."""
    app = host.apps.find(provider)
    existing = host.store.by_name(name) if name else None
    start = host.connect.start(
        app, started_by="admin:cli", name=None if existing else name, connection=existing
    )
    consent = made.emulator.control.vendor(provider).consent(start.url)
    code = consent.answer("code")
    assert code is not None, consent.body
    done = host.connect.finish(
        provider, state=consent.answer("state"), code=Secret(code), error=None, browser=start.browser
    )
    return done.connection


def add_caller(host: Services, *permissions: str, name: str = "reader") -> Added:
    """A caller with these permissions, `token:issue@*` when none are given."""
    allow = [Permission.parse(text) for text in permissions or ("token:issue@*",)]
    return host.callers.add(name, allow=allow)
