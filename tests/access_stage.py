"""One process's view of callers, policy and trail over a real database, with a clock that can jump."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.access.assertions import Assertions
from app.access.audit import Trail
from app.access.authentication import Authentication
from app.access.authorization_server import AuthorizationServer
from app.access.belief import Belief
from app.access.callers import Added, Callers
from app.access.denials import Denials
from app.access.keysets import KeySets
from app.access.permissions import Permission
from app.access.policy import Access
from app.access.signing import AccessTokens, SigningKeys, SpentIds
from app.clock import Clock
from app.crypto.envelope import Sealer
from app.crypto.keyring import Keyring
from app.db.engine import Database
from app.db.epoch import EpochWatch
from app.db.migrate import migrate
from app.http_client import HttpClient
from app.secret import Secret

ISSUER = "https://broker.example"
AUDIT_KEY = bytes(range(32))
KEYRING = Keyring.from_text(
    Secret(json.dumps({"active": "k1", "keys": {"k1": base64.b64encode(secrets.token_bytes(32)).decode()}}))
)


class JumpingClock(Clock):
    """The real clock, moved on by hand."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead = 0.0

    def jump(self, seconds: float) -> None:
        """Let so many seconds have passed."""
        self._ahead += seconds

    def local(self) -> float:
        """Wall time, moved."""
        return super().local() + self._ahead

    def elapsed(self) -> float:
        """Steady time, moved."""
        return super().elapsed() + self._ahead


@dataclass(frozen=True, slots=True)
class Stage:
    """Everything of `app.access`, wired as one process wires it."""

    clock: JumpingClock
    main: Database
    audit: Database
    trail: Trail
    callers: Callers
    watch: EpochWatch
    denials: Denials
    access: Access
    spent: SpentIds
    keys: SigningKeys
    tokens: AccessTokens
    authentication: Authentication
    server: AuthorizationServer

    def add(self, name: str, *permissions: str, **options: object) -> Added:
        """Add a caller with permissions in words."""
        return self.callers.add(name, allow=[Permission.parse(text) for text in permissions], **options)  # type: ignore[arg-type]


def databases(url: str, state_dir: Path, clock: Clock) -> tuple[Database, Database]:
    """The main and the audit database of a URL, as the settings would give them."""
    main = Database(url, clock=clock, state_dir=state_dir)
    if main.dialect == "postgresql":
        return main, main
    return main, Database(url.replace(".db", "-audit.db"), clock=clock, state_dir=state_dir)


@contextmanager
def stage(
    url: str, state_dir: Path, *, outage_grace: float = 60.0, migrated: bool = False
) -> Iterator[Stage]:
    """Wire one process's objects over a database, migrated first unless another stage did."""
    clock = JumpingClock()
    main, audit = databases(url, state_dir, clock)
    if not migrated:
        migrate(main, audit)
    trail = Trail(audit, AUDIT_KEY, clock=clock, state_dir=state_dir, outage_grace=outage_grace)
    callers = Callers(main, trail, clock, allow_loopback=True)
    watch = EpochWatch(main, clock)
    epochs = Belief(watch, clock, outage_grace=outage_grace)
    denials = Denials(trail, clock)
    spent = SpentIds(main, clock)
    keys = SigningKeys(main, Sealer(KEYRING, lambda: "k1"), clock, epochs)
    tokens = AccessTokens(ISSUER, keys, spent, clock)
    authentication = Authentication(callers, tokens, epochs=epochs, denials=denials, clock=clock)
    keysets = KeySets(HttpClient(clock, allow_loopback=True), clock)
    audiences = frozenset({ISSUER, f"{ISSUER}/oauth/token"})
    assertions = Assertions(callers, keysets, spent, clock, audiences=audiences)
    server = AuthorizationServer(callers, authentication, assertions, tokens, denials=denials, trail=trail)
    access = Access(callers, epochs, denials, trail)
    try:
        yield Stage(
            clock,
            main,
            audit,
            trail,
            callers,
            watch,
            denials,
            access,
            spent,
            keys,
            tokens,
            authentication,
            server,
        )
    finally:
        watch.stop()
        trail.close()
        main.dispose()
        audit.dispose()


def basic(client_id: str, secret: Secret | str | None) -> str:
    """The Authorization header of a client id and secret."""
    text = secret.reveal() if isinstance(secret, Secret) else secret or ""
    return "Basic " + base64.b64encode(f"{client_id}:{text}".encode()).decode()
