"""P4 as one test: everything secret or personal goes through the whole program and is then found nowhere in clear."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flask.testing import FlaskClient

from app.access.permissions import Permission
from app.broker.connection import Connection
from app.db.schema import audit_metadata, metadata
from app.errors import DrawbridgeError
from app.secret import Secret
from app.telemetry import configure, metrics
from app.web.application import create_app
from tests.broker_world import LEASE, World, connect_account, import_line, world
from tests.installation import HUBSPOT, SALESFORCE

PERSON = "Kanari.Vogel-7Q4"
MAIL = "kanari.vogel-7q4@marker-9z8.example"
DOMAIN = "marker-9z8.example"
CLIENT_SECRETS = ("Zk1-hubspot-Marker-7Q4", "Zk2-salesforce-Marker-7Q4", "Zk3-added-Marker-7Q4")


class Canary:
    """Collects what must not be seen and where it must not be seen."""

    def __init__(self, made: World) -> None:
        self.made = made
        self.secrets: dict[str, str] = {"person": PERSON, "mail": MAIL, "domain": DOMAIN}
        self.secrets |= {f"client secret {n}": text for n, text in enumerate(CLIENT_SECRETS)}
        self.places: dict[str, bytes] = {}

    def hide(self, name: str, secret: Secret | str | None) -> None:
        """One more thing that must not be seen."""
        assert secret is not None, name
        text = secret.reveal() if isinstance(secret, Secret) else secret
        assert len(text) >= 12, f"{name} is too short to be looked for"
        self.secrets[name] = text

    def hide_tokens(self, connection: Connection) -> None:
        """The tokens this connection holds now."""
        found = self.made.one.store.tokens_of(connection.id)
        assert found is not None
        row, tokens = found
        for kind in ("access_token", "refresh_token"):
            if getattr(tokens, kind) is not None:
                self.hide(f"{row.name} {kind} {row.generation}", getattr(tokens, kind))

    def look_at(self, place: str, content: bytes | str) -> None:
        """One more place where nothing may be seen."""
        self.places[place] = content.encode() if isinstance(content, str) else content

    def found(self) -> list[str]:
        """What was seen where, in whatever spelling."""
        return [
            f"{name} as {spelling} in {place}"
            for name, secret in self.secrets.items()
            for spelling, needle in spellings(secret)
            for place, content in self.places.items()
            if needle in content
        ]


def spellings(secret: str) -> Iterator[tuple[str, bytes]]:
    """The secret in clear and in the encodings somebody might take for a disguise."""
    clear = secret.encode()
    yield "clear", clear
    yield "lower case", clear.lower()
    yield "url", quote(secret, safe="").encode()
    yield "hex", clear.hex().encode()
    yield "HEX", clear.hex().upper().encode()
    yield "utf-16", secret.encode("utf-16-le")
    yield "json", json.dumps(secret)[1:-1].encode()
    for shift in range(3):
        # The first and last characters depend on what stands beside it.
        core = base64.b64encode(b"\0" * shift + clear)[4 if shift else 0 : -4]
        yield f"base64+{shift}", core
        yield f"base64url+{shift}", core.replace(b"+", b"-").replace(b"/", b"_")


@pytest.fixture
def log_stream() -> Iterator[io.StringIO]:
    """Everything the process logs, at DEBUG, libraries included."""
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    configure("DEBUG", stream=stream)
    yield stream
    configure("INFO", stream=sys.stderr)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


@contextmanager
def marked_world(database_url: str, directory: Path) -> Iterator[World]:
    """A world whose client secrets carry the marker."""
    with world(
        database_url,
        directory,
        HUBSPOT_CLIENT_SECRET=CLIENT_SECRETS[0],
        SALESFORCE_CLIENT_SECRET=CLIENT_SECRETS[1],
        METRICS_TOKEN="metrics-token-of-length",
    ) as made:
        made.hubspot.set_secrets(HUBSPOT, [CLIENT_SECRETS[0]])
        made.salesforce.set_secrets(SALESFORCE, [CLIENT_SECRETS[1]])
        yield made


def test_nothing_secret_or_personal_is_seen_anywhere(
    database_url: str, tmp_path: Path, log_stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connect, hand out, refresh, fail, import, export, disconnect; then search files, tables, logs, metrics and answers."""
    with marked_world(database_url, tmp_path) as made:
        canary = Canary(made)
        # What is journaled stays in the file, so that it can be searched.
        monkeypatch.setattr(made.one.journal, "done", lambda attempt: None)
        lived = live_through_everything(made, canary)
        speak_http(made, canary, lived)
        crash_with_secrets(made, monkeypatch, lived)
        fail_in_every_way(made, canary, lived)
        take_leave(made, canary, lived)
        canary.look_at("metrics", metrics.expose())
        canary.look_at("log", log_stream.getvalue())
        look_at_database(made, canary, database_url)
        look_at_files(canary, tmp_path)
        journals = [name for name in canary.places if name.endswith(".journal")]
        assert any(canary.places[name] for name in journals), "the journal was searched"
        assert len(canary.secrets) > 20
        assert canary.found() == []


def live_through_everything(made: World, canary: Canary) -> dict[str, Connection]:
    """Connect, import, mint, hand out and refresh, hiding each secret on the way."""
    lived: dict[str, Connection] = {}
    for provider in ("hubspot", "salesforce"):
        account = made.vendor(provider).add_account(domain=DOMAIN, users=[{"name": MAIL}])
        name = f"{provider}-one"
        lived[provider] = connect_account(made.one, made.made, provider, name=name, account=account["id"])
        canary.hide_tokens(lived[provider])
    grants = made.hubspot.grant_many(HUBSPOT, 2)
    bad = import_line("hubspot", grants[1], living=True, surname=PERSON, name="never")
    wrong = import_line("hubspot", grants[1], living=True, expires_at=MAIL, name="never")
    lines = [import_line("hubspot", grants[0], living=True, name="imported"), bad, wrong]
    results = list(made.one.transfer.import_lines(lines))
    assert [result.outcome for result in results] == ["added", "failed", "failed"]
    canary.look_at("import problems", repr([result.problem for result in results]).replace("surname", ""))
    for number, grant in enumerate(grants):
        canary.hide(f"imported access {number}", grant.access_token)
        canary.hide(f"imported refresh {number}", grant.refresh_token)
    lived["imported"] = made.one.store.named("imported")
    lived["minted"] = mint(made, canary)
    for round_ in range(2):
        for connection in lived.values():
            token = made.issue(connection)
            canary.look_at(f"hand-out printed {round_} {connection.name}", f"{token!r} {token}")
            canary.hide_tokens(connection)
        made.jump(7300)
    made.one.apps.add(
        "hubspot", "second", client_id="second", secrets=[Secret(CLIENT_SECRETS[2])], scopes=["oauth"]
    )
    return lived


def mint(made: World, canary: Canary) -> Connection:
    """A connection with a private key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    for number, line in enumerate(pem.splitlines()[1:-1]):
        if len(line) > 40:
            canary.hide(f"private key line {number}", line)
    shown = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    made.salesforce.change_app(SALESFORCE, jwt_public_key=shown.decode())
    made.salesforce.add_account(domain=DOMAIN, users=[{"name": f"robot.{MAIL}"}])
    connection = made.one.connect.add_minted(
        made.one.apps.find("salesforce"),
        name="minted",
        grant_type="jwt_bearer",
        subject=f"robot.{MAIL}",
        private_key=Secret(pem),
    )
    canary.hide_tokens(connection)
    return connection


def speak_http(made: World, canary: Canary, lived: dict[str, Connection]) -> None:
    """Ask for everything a caller, a stranger and an admin can ask for; only the token answers may hold a token."""
    client: FlaskClient = create_app(made.one).test_client()
    added = made.one.callers.add("canary-caller", allow=[])
    assert added.client_secret is not None
    canary.hide("caller secret", added.client_secret)
    for action in ("token:issue", "connection:read", "connection:manage"):
        permit(made, added.caller.name, f"{action}@*")
    basic = f"{added.caller.client_id}:{added.client_secret.reveal()}"
    mine = {"Authorization": f"Basic {base64.b64encode(basic.encode()).decode()}"}
    tokens_seen = 0
    for connection in lived.values():
        answer = client.get(f"/v1/connections/{connection.name}/token", headers=mine)
        assert answer.status_code == 200, answer.get_data(as_text=True)
        tokens_seen += 1
        canary.hide_tokens(connection)
        canary.look_at(f"headers of a token answer {connection.name}", str(answer.headers))
    assert tokens_seen == len(lived)
    bearer = canary.secrets["hubspot-one access_token 1"]
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/v1/connections", {"headers": mine}),
        ("GET", "/v1/connections/hubspot-one", {"headers": mine}),
        ("GET", "/v1/connections/nobody/token", {"headers": mine}),
        ("GET", "/v1/connections/hubspot-one/token?min_ttl=99999", {"headers": mine}),
        (
            "POST",
            "/v1/connections/hubspot-one/token",
            {"headers": mine, "data": f'{{"rejected":"{bearer}"}}'},
        ),
        (
            "POST",
            "/v1/connections/hubspot-one/token",
            {"headers": mine, "json": {"rejected": bearer, "x": MAIL}},
        ),
        ("GET", "/v1/connections/hubspot-one/token", {"headers": {"Authorization": f"Bearer {bearer}"}}),
        ("GET", "/v1/connections/hubspot-one/token", {"headers": {"Authorization": f"Basic {bearer}"}}),
        ("GET", f"/v1/connections/{quote(bearer)}/token", {"headers": mine}),
        ("GET", f"/connect/hubspot/callback?code={quote(bearer)}&state={quote(bearer)}", {}),
        ("POST", "/oauth/token", {"data": {"grant_type": "client_credentials", "client_secret": bearer}}),
        ("POST", "/oauth/introspect", {"headers": mine, "data": {"token": bearer}}),
        ("GET", "/health", {"headers": mine}),
        ("GET", "/livez", {}),
        ("GET", "/readyz", {}),
        ("GET", "/metrics", {"headers": {"Authorization": "Bearer metrics-token-of-length"}}),
        ("GET", "/openapi.json", {}),
        ("GET", "/admin", {}),
    ]
    stranger = made.one.callers.add("canary-stranger", allow=[])
    assert stranger.client_secret is not None
    canary.hide("stranger's secret", stranger.client_secret)
    theirs = base64.b64encode(
        f"{stranger.caller.client_id}:{stranger.client_secret.reveal()}".encode()
    ).decode()
    # A token put where a name belongs: a denial is on record with its target.
    misplaced = (
        "GET",
        f"/v1/connections/{quote(bearer)}/token",
        {"headers": {"Authorization": f"Basic {theirs}"}},
    )
    for number, (method, path, more) in enumerate([*requests, misplaced]):
        answer = client.open(path, method=method, **more)
        body = answer.get_data()
        if quote(bearer) in path:
            # `instance` is the path that was asked for (RFC 9457 §3.1.5): who sent it gets it back.
            body = body.replace(quote(path.partition("?")[0]).encode(), b"")
        if path.startswith("/v1") and answer.status_code == 200 and b'"access_token"' in body:
            body = b""
        canary.look_at(f"answer {number} {answer.status_code}", body + str(answer.headers).encode())
    login, _ = made.one.admins.make_login()
    canary.hide("login link", login)
    assert client.post("/admin/login", data={"token": login.reveal()}).status_code == 303
    for path in ("/admin", "/connect/hubspot", "/connect/salesforce", "/admin/login"):
        canary.look_at(f"page {path}", client.get(path).get_data())


def permit(made: World, caller: str, permission: str) -> None:
    """Give a caller a permission and let every process notice."""
    made.one.callers.allow(caller, Permission.parse(permission))
    made.jump(0.8)


def crash_with_secrets(made: World, monkeypatch: pytest.MonkeyPatch, lived: dict[str, Connection]) -> None:
    """A bug in a provider file: an exception whose message holds a token, with tokens in its frames."""
    tokens = made.one.store.tokens_of(lived["hubspot"].id)
    assert tokens is not None

    def broken(app: object, grant: Any, **_: object) -> object:
        clear = grant.refresh_token.reveal()
        raise RuntimeError(f"cannot parse {clear} of {MAIL} with {app!r}")

    with monkeypatch.context() as patched:
        patched.setattr(made.one.apps.provider("hubspot"), "refresh", broken)
        made.refresh(lived["hubspot"])
    made.jump(61)


def fail_in_every_way(made: World, canary: Canary, lived: dict[str, Connection]) -> None:
    """Errors the vendor words with names and tokens in them; what callers and logs are told is ours."""
    spoken = f"Sorry {PERSON} <{MAIL}>, {canary.secrets['hubspot-one refresh_token 1']} is bad"
    faults: list[tuple[str, dict[str, Any]]] = [
        ("status", {"status": 400, "body": json.dumps({"error": "invalid_grant", "message": spoken})}),
        ("status", {"status": 400, "body": json.dumps({"error": spoken, "status": spoken})}),
        ("status", {"status": 503, "body": spoken}),
        ("status", {"status": 429, "body": spoken, "headers": {"X-Who": MAIL}}),
        ("truncated", {}),
        ("redirect", {"location": f"/elsewhere?token={quote(spoken)}"}),
        ("hang", {}),
    ]
    for number, (fault, options) in enumerate(faults):
        made.jump(3700)
        made.hubspot.misbehave(fault, count=1, **options)
        try:
            made.issue(lived["hubspot"])
        except DrawbridgeError as error:
            canary.look_at(f"error {number}", f"{error!r} {error.detail} {error.hint} {error.__cause__!r}")
        canary.hide_tokens(lived["hubspot"])
    made.revoke_upstream(lived["imported"])
    for _ in range(2):
        made.jump(3700 + LEASE)
        made.refresh(lived["imported"])
    assert made.now(lived["imported"]).state == "needs_reconnect"


def take_leave(made: World, canary: Canary, lived: dict[str, Connection]) -> None:
    """Export one, disconnect another, while a third stays."""
    key = X25519PrivateKey.generate().public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    made.jump(61)
    made.one.transfer.export(
        lived["salesforce"].name, public_key_pem=pem, deliver=lambda sealed: canary.look_at("export", sealed)
    )
    made.one.revoker.disconnect(lived["imported"].name)
    assert made.one.revoker.carry_out(lived["imported"].id)


def look_at_database(made: World, canary: Canary, database_url: str) -> None:
    """Every row of every table, as a dump would hold it."""
    for database, tables in (
        (made.one.database, metadata.sorted_tables),
        (made.one.audit_database, audit_metadata.sorted_tables),
    ):
        for table in tables:
            with database.read() as transaction:
                rows = transaction.execute(sa.select(*(sa.type_coerce(c, c.type) for c in table.c))).all()
            canary.look_at(f"table {table.name}", b"\n".join(as_bytes(row) for row in rows))
    if database_url.startswith("postgresql"):
        with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:
            for table in (*metadata.sorted_tables, *audit_metadata.sorted_tables):
                with connection.cursor().copy(f'COPY public."{table.name}" TO STDOUT') as copy:
                    canary.look_at(f"dump {table.name}", b"".join(bytes(part) for part in copy))


def as_bytes(row: Any) -> bytes:
    """A row with its binary columns as they are."""
    return b"|".join(bytes(v) if isinstance(v, bytes | memoryview) else str(v).encode() for v in row)


def look_at_files(canary: Canary, directory: Path) -> None:
    """Every file the program made: database, -wal, audit, journal, spool, marks, metrics."""
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.name != "keyring.json":
            canary.look_at(f"file {file.relative_to(directory)}", file.read_bytes())


def test_the_search_finds_what_is_there() -> None:
    """The canary test can fail: each spelling is found in the middle of other bytes."""
    secret = "AbC-secret/with+signs=~1234567"
    clear = secret.encode()
    hidden = {
        "clear": clear,
        "url": quote(secret, safe="").encode(),
        "hex": clear.hex().encode(),
        "base64 0": base64.b64encode(b"xyz" + clear + b"t"),
        "base64 1": base64.b64encode(b"x" + clear + b"tail"),
        "base64 2": base64.urlsafe_b64encode(b"xy" + clear + b"tail"),
        "json": json.dumps({"a": secret}).encode(),
    }
    for place, content in hidden.items():
        assert any(needle in b"before" + content + b"after" for _, needle in spellings(secret)), place
    assert not any(needle in b"something else entirely" for _, needle in spellings(secret))
