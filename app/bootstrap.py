"""Wiring: from `Settings` to `Services`, without Flask and without doing anything before `start`.

Everything a web process, a worker or a command needs is made here once, in the order of the layers, and handed on as one
frozen object. Nothing in the program reaches for a global instead.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from app.access.assertions import Assertions
from app.access.audit import Trail
from app.access.authentication import Authentication
from app.access.authorization_server import AuthorizationServer
from app.access.belief import Belief
from app.access.callers import Callers
from app.access.denials import Denials
from app.access.keysets import KeySets
from app.access.policy import Access
from app.access.signing import AccessTokens, SigningKeys, SpentIds
from app.broker.admins import Admins
from app.broker.adoption import Adoption
from app.broker.apps import Apps
from app.broker.connect import Connect
from app.broker.examination import Examiner
from app.broker.installation import ActiveKek, Presence, found_installation, unlock
from app.broker.issue import Issuer
from app.broker.journal import Journal
from app.broker.notices import Courier
from app.broker.recover import Recovery
from app.broker.refresh import Process, Refresher
from app.broker.rekey import Keys
from app.broker.revoke import Revoker
from app.broker.store import Store
from app.broker.transfer import Transfer
from app.broker.upkeep import Chore, Upkeep
from app.clock import Clock
from app.crypto.envelope import Sealer
from app.crypto.keyring import Keyring
from app.db.engine import Database, open_databases
from app.db.epoch import EpochWatch
from app.errors import StartRefused
from app.http_client import HttpClient
from app.oauth2.provider import Provider
from app.providers import discover
from app.settings import Settings
from app.telemetry import Event, log, metrics

__all__ = ["VERSION", "Kind", "Services", "bootstrap", "prepare_database"]

VERSION: Final = "0.1.0"
Kind = Literal["web", "worker", "command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """All there is, ready for use; `start` and `close` bracket a process that serves."""

    settings: Settings
    kind: Kind
    clock: Clock
    process: Process
    database: Database
    audit_database: Database
    watch: EpochWatch
    epochs: Belief
    keyring: Keyring
    sealer: Sealer
    http: HttpClient
    providers: Mapping[str, Provider]
    trail: Trail
    denials: Denials
    callers: Callers
    access: Access
    authentication: Authentication
    authorization_server: AuthorizationServer
    signing_keys: SigningKeys
    spent_ids: SpentIds
    apps: Apps
    store: Store
    journal: Journal
    adoption: Adoption
    refresher: Refresher
    recovery: Recovery
    issuer: Issuer
    connect: Connect
    revoker: Revoker
    transfer: Transfer
    keys: Keys
    courier: Courier
    examiner: Examiner
    admins: Admins
    presence: Presence
    upkeep: Upkeep

    def start(self) -> None:
        """Begin to serve: watch the epochs, say that this process lives, bring in what dead ones left behind."""
        self.watch.start()
        self.apps.sync_environment()
        self.presence.enter()
        self.recovery.run()
        self.trail.adopt_orphans()
        self.upkeep.start()

    def close(self) -> None:
        """End in good order: running refreshes are waited for, what is known is written down. Idempotent.

        A step that fails is logged and the others are taken all the same; the first failure is raised at the end.
        """
        steps: dict[str, Callable[[], None]] = {
            "refresher": self.refresher.close,
            "upkeep": self.upkeep.stop,
            "adoption": self.adoption.close,
            "journal": self.journal.close,
            "denials": self.denials.flush,
            "trail": self.trail.close,
            "presence": self.presence.leave,
            "watch": self.watch.stop,
            "database": self.database.dispose,
            "audit database": self.audit_database.dispose,
        }
        failures: list[Exception] = []
        for step, take in steps.items():
            try:
                take()
            except Exception as error:  # noqa: BLE001 - of any kind: it is raised when the rest is done
                log(Event.STOP_FAILED, kind=self.kind, step=step, exc_info=error)
                failures.append(error)
        if failures:
            raise failures[0]


def prepare_database(settings: Settings, *, clock: Clock | None = None) -> bool:
    """Bring the database up to date and found the installation in it; true when the schema changed.

    Raises `DatabaseMismatch`, `KeyringFault`, `DatabaseUnavailable`.
    """
    from app.db.migrate import migrate  # alembic stays out of processes that serve

    clock = clock or Clock()
    database, audit_database = open_databases(settings, clock)
    changed = migrate(database, audit_database)
    keyring = Keyring.load(settings)
    found_installation(database, keyring, clock, public_url=settings.public_url)
    unlock(database, keyring)
    database.dispose()
    audit_database.dispose()
    return changed


def bootstrap(settings: Settings, *, kind: Kind, clock: Clock | None = None) -> Services:
    """Make all services over a migrated database.

    Raises `KeyringFault`, `DatabaseMismatch`, `DatabaseUnavailable`; nothing is left running then.
    """
    try:
        return _wired(settings, kind=kind, clock=clock or Clock())
    except StartRefused as refusal:
        log(Event.START_REFUSED, kind=kind, code=refusal.code, reason=refusal.detail)
        raise


def _wired(settings: Settings, *, kind: Kind, clock: Clock) -> Services:
    from app.db.migrate import require_current

    metrics.prepare(settings.state_dir)
    database, audit_database = open_databases(settings, clock)
    require_current(database, audit_database)
    database.sample_clock()
    keyring = Keyring.load(settings)
    keyring.tell()
    audit_key = unlock(database, keyring)
    watch = EpochWatch(database, clock)
    epochs = Belief(watch, clock, outage_grace=settings.outage_grace_seconds)
    sealer = Sealer(keyring, ActiveKek(database, epochs))
    http = HttpClient(clock, allow_loopback=settings.allow_loopback_providers)
    providers = discover()
    process = Process(id=secrets.token_hex(16), host=socket.gethostname())

    trail = Trail(
        audit_database,
        audit_key,
        clock=clock,
        state_dir=settings.state_dir,
        outage_grace=settings.outage_grace_seconds,
    )
    denials = Denials(trail, clock)
    callers = Callers(database, trail, clock, allow_loopback=settings.allow_loopback_providers)
    access = Access(callers, epochs, denials, trail)
    spent_ids = SpentIds(database, clock)
    signing_keys = SigningKeys(database, sealer, clock, epochs)
    tokens = AccessTokens(settings.public_url, signing_keys, spent_ids, clock)
    authentication = Authentication(callers, tokens, epochs=epochs, denials=denials, clock=clock)
    issuer_url = settings.public_url.rstrip("/")
    assertions = Assertions(
        callers,
        KeySets(http, clock),
        spent_ids,
        clock,
        audiences=frozenset({issuer_url, f"{issuer_url}/oauth/token"}),
    )
    authorization_server = AuthorizationServer(
        callers, authentication, assertions, tokens, denials=denials, trail=trail
    )

    store = Store(database, sealer)
    apps = Apps(database, sealer, clock, providers=providers, settings=settings, http=http, trail=trail)
    journal = Journal(settings.state_dir / "journal", process.id)
    adoption = Adoption(
        database,
        watch,
        clock,
        trail=trail,
        state_dir=settings.state_dir,
        public_url=settings.public_url,
    )
    refresher = Refresher(
        database,
        store,
        apps=apps,
        journal=journal,
        adoption=adoption,
        http=http,
        clock=clock,
        process=process,
        lease_seconds=settings.lease_seconds,
        timeout_seconds=settings.provider_timeout_seconds,
        ahead_seconds=settings.refresh_ahead_seconds,
    )
    issuer = Issuer(
        store,
        access=access,
        refresher=refresher,
        epochs=epochs,
        clock=clock,
        waiters=settings.web_threads * 3 // 4,
        assumed_life=900.0,
    )
    watch.follow(issuer.learn)
    presence = Presence(database, keyring, clock, kind=kind, version=VERSION, process_id=process.id)
    upkeep = Upkeep(
        [
            Chore("heartbeat", 10.0, presence.beat),
            Chore("clock", 10.0, database.sample_clock),
            Chore("leftovers", 1.0, refresher.save_leftovers),
            Chore("hand-outs", 0.5, issuer.count),
            Chore("audit entries", 0.5, trail.count),
            Chore("used", 5.0, lambda: store.mark_used(issuer.take_used(), now=clock.now())),
            Chore("callers", 30.0, authentication.note_used),
            Chore("denials", 1.0, denials.tick),
            Chore("audit orphans", 60.0, trail.adopt_orphans),
            Chore("audit head", 60.0, trail.log_head),
            Chore("high water", 5.0, adoption.disagreement),
        ],
        clock,
    )
    return Services(
        settings=settings,
        kind=kind,
        clock=clock,
        process=process,
        database=database,
        audit_database=audit_database,
        watch=watch,
        epochs=epochs,
        keyring=keyring,
        sealer=sealer,
        http=http,
        providers=providers,
        trail=trail,
        denials=denials,
        callers=callers,
        access=access,
        authentication=authentication,
        authorization_server=authorization_server,
        signing_keys=signing_keys,
        spent_ids=spent_ids,
        apps=apps,
        store=store,
        journal=journal,
        adoption=adoption,
        refresher=refresher,
        recovery=Recovery(database, store, journal=journal, apps=apps, refresher=refresher, clock=clock),
        issuer=issuer,
        connect=Connect(
            database, store, apps=apps, refresher=refresher, sealer=sealer, trail=trail, clock=clock
        ),
        revoker=Revoker(database, store, apps=apps, refresher=refresher, trail=trail, clock=clock),
        transfer=Transfer(database, store, apps=apps, trail=trail, clock=clock),
        keys=Keys(database, keyring, journal=journal, trail=trail, clock=clock),
        courier=Courier(database, http, clock, url=settings.notice_url, secret=settings.notice_secret),
        examiner=Examiner(
            database,
            store,
            apps=apps,
            adoption=adoption,
            keyring=keyring,
            clock=clock,
            host=process.host,
            state_dir=settings.state_dir,
        ),
        admins=Admins(database, clock),
        presence=presence,
        upkeep=upkeep,
    )
