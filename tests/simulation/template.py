"""An installation to copy: a migrated database with four connections, made once per process of the simulation."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from app.bootstrap import prepare_database
from app.broker.apps import Apps
from app.broker.connection import Connection, ConnectionId, Rotation, Tokens
from app.broker.installation import ActiveKek, add_kek
from app.broker.store import Store
from app.clock import Clock
from app.crypto.envelope import Sealer
from app.crypto.keyring import Keyring
from app.db.engine import Database
from app.db.epoch import EpochWatch
from app.oauth2.provider import Provider
from app.providers import discover
from app.secret import Secret
from app.settings import Settings, load
from app.telemetry import logs

__all__ = ["EPOCH", "KINDS", "LEASE", "TIMEOUT", "Template", "make_template"]

EPOCH: Final = 1_800_000_000.0
LEASE: Final = 16.0
TIMEOUT: Final = 5.0
# name: (provider, does its refresh token rotate, is it minted anew each time)
KINDS: Final = {
    "rotating": ("salesforce", True, False),
    "second": ("salesforce", True, False),
    "steady": ("hubspot", False, False),
    "minted": ("salesforce", False, True),
}
_KEYRING: Final = (
    '{"active":"k1","keys":{"k1":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",'
    '"k2":"ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="}}'
)


@dataclass(frozen=True, slots=True)
class Template:
    """What every schedule begins with."""

    file: Path
    settings: Settings
    keyring: Keyring
    providers: dict[str, Provider]
    kinds: dict[str, tuple[str, bool, bool]]
    tokens: dict[str, tuple[str, str]]
    public_key: bytes  # of another installation


def make_template(directory: Path) -> Template:
    """Make the installation's database in this directory."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    file = directory / "template.db"
    settings = load(_environment(file, directory), config_file=None)
    with patch.object(logs._stream, "threshold", 100):
        prepare_database(settings)
    keyring = Keyring.load(settings)
    providers = {name: _settled(provider, settings) for name, provider in discover().items()}
    clock = Clock()
    database = Database(settings.database_url, clock=clock, state_dir=directory)
    sealer = Sealer(keyring, ActiveKek(database, EpochWatch(database, clock)))
    http: Any = SimpleNamespace(allow=lambda *_: None)
    trail: Any = SimpleNamespace(record=lambda entry: None)
    apps = Apps(database, sealer, clock, providers=providers, settings=settings, http=http, trail=trail)
    apps.sync_environment()
    store = Store(database, sealer)
    tokens: dict[str, tuple[str, str]] = {}
    with database.write() as transaction:
        add_kek(transaction, keyring, "k2", now=datetime.fromtimestamp(EPOCH, UTC))
    for number, name in enumerate(KINDS, 1):
        tokens[name] = (f"A0-{name}", "" if KINDS[name][2] else f"R0-{name}")
        _insert(database, store, apps, name=name, number=number, tokens=tokens[name])
    database.dispose()
    with sqlite3.connect(file, isolation_level=None) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.close()
    public_key = X25519PrivateKey.generate().public_key()
    pem = public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return Template(file, settings, keyring, providers, dict(KINDS), tokens, pem)


def _settled(provider: Provider, settings: Settings) -> Provider:
    """The provider with its app read from the settings once: reading them is a tenth of starting a process."""
    app = provider.from_settings(settings)
    provider.from_settings = lambda _: app  # type: ignore[method-assign,assignment]
    return provider


def _environment(file: Path, directory: Path) -> dict[str, str]:
    values = {
        "DATABASE_URL": f"sqlite:///{file}",
        "STATE_DIR": str(directory / "state"),
        "KEYRING": _KEYRING,
        "PUBLIC_URL": "https://broker.example",
        "HUBSPOT_CLIENT_ID": "hubspot-client",
        "HUBSPOT_CLIENT_SECRET": "hubspot-secret",
        "HUBSPOT_SCOPES": "oauth",
        "SALESFORCE_CLIENT_ID": "salesforce-client",
        "SALESFORCE_CLIENT_SECRET": "salesforce-secret",
        "SALESFORCE_LOGIN_URL": "https://sim.my.salesforce.com",
        "SALESFORCE_SCOPES": "api refresh_token",
    }
    return {f"DRAWBRIDGE_{name}": text for name, text in values.items()}


def _insert(
    database: Database, store: Store, apps: Apps, *, name: str, number: int, tokens: tuple[str, str]
) -> None:
    from tests.simulation.provider import Account

    provider, rotating, minted = KINDS[name]
    account = Account(provider, name, number, rotating, minted)
    app = apps.find(provider)
    now = datetime.fromtimestamp(EPOCH, UTC)
    identity = f"{account.org}:{account.user}" if account.user else account.org
    row = Connection(
        id=ConnectionId(f"{number:032x}"),
        name=name,
        provider=provider,
        app_id=app.id,
        grant_type="client_credentials" if minted else "authorization_code",
        account_id=account.org,
        user_id=account.user,
        identity=identity,
        generation=1,
        rotation=Rotation.SEEN if rotating else Rotation.NOT_SEEN,
        scopes_wanted=app.scopes,
        scopes_granted=app.scopes,
        created_at=now,
        connected_at=now,
    )
    sealed = store.seal(
        Tokens(access_token=Secret(tokens[0]), refresh_token=Secret(tokens[1]) if tokens[1] else None),
        row.id,
        generation=1,
    )
    with database.write() as transaction:
        store.insert(transaction, row, sealed)
