"""The OAuth clients registered at the providers, their sealed secrets, and the circuit breaker each of them has.

The environment defines the app called `default` of a provider; its secrets stay in the environment and only its row, which
connections point at, is kept here. All other apps are added by the operator and keep their secrets sealed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection as Transaction
from sqlalchemy.exc import IntegrityError

from app.access.audit import Entry, Trail
from app.broker.connection import AppTrouble
from app.broker.store import new_id
from app.clock import Clock
from app.crypto.envelope import Place, Sealer
from app.db.engine import Database
from app.db.epoch import bump
from app.db.schema import apps, connections
from app.db.types import db_now
from app.errors import Conflict, InvalidRequest, NotFound, ProviderMisconfigured, Unopenable
from app.http_client import HttpClient
from app.oauth2.provider import App, Provider, redirect_uri
from app.secret import Secret
from app.settings import Settings
from app.telemetry import Event, log, metrics

__all__ = ["PATIENCE", "AppRow", "Apps", "Breaker"]

# The breaker opens after so many failures in a row over the whole app, for 1, 2, 4 … seconds, at most this many. Short: when
# the provider is back, connections whose token has died meanwhile must not wait for us.
PATIENCE: Final = 5
_LONGEST: Final = 20.0
_MISCONFIGURED_PAUSE: Final = 60.0
_DEFAULT: Final = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppRow:
    """A registered client without its secrets."""

    id: str
    provider: str
    name: str
    source: str
    client_id: str
    scopes: tuple[str, ...]
    optional_scopes: tuple[str, ...]
    options: Mapping[str, Any]
    created_at: datetime
    version: int
    failures: int
    open_until: datetime | None
    open_reason: str | None

    @property
    def reference(self) -> str:
        """How an admin names it: `provider/name`."""
        return f"{self.provider}/{self.name}"


@dataclass(frozen=True, slots=True)
class Breaker:
    """Why an app's refreshes pause, and until when."""

    until: datetime
    reason: str


class Apps:
    """Registered clients: kept, opened for use, and paused together when their provider fails."""

    def __init__(
        self,
        database: Database,
        sealer: Sealer,
        clock: Clock,
        *,
        providers: Mapping[str, Provider],
        settings: Settings,
        http: HttpClient,
        trail: Trail,
    ) -> None:
        self._database = database
        self._sealer = sealer
        self._clock = clock
        self._providers = providers
        self._settings = settings
        self._http = http
        self._trail = trail
        self._from_environment = {
            name: app for name, provider in providers.items() if (app := provider.from_settings(settings))
        }

    def sync_environment(self) -> None:
        """Give every app the environment defines its row; safe when many processes start at once."""
        for provider, app in self._from_environment.items():
            row = self._by_name(provider, _DEFAULT)
            values = {
                "client_id": app.client_id,
                "scopes": list(app.scopes),
                "optional_scopes": list(app.optional_scopes),
                "options": dict(app.options),
            }
            if row is None:
                self._insert_default(provider, values)
            elif row.source == "environment" and any(
                _plain(getattr(row, key)) != value for key, value in values.items()
            ):
                self._update(row.id, **values)

    def provider(self, name: str) -> Provider:
        """The provider of this name; raises `NotFound`."""
        found = self._providers.get(name)
        if found is None:
            known = ", ".join(sorted(self._providers))
            raise NotFound(f"There is no provider {name!r}; known are: {known}.")
        return found

    @property
    def providers(self) -> Mapping[str, Provider]:
        """All providers by name."""
        return self._providers

    def list(self) -> list[AppRow]:
        """All apps, by provider and name."""
        with self._database.read() as transaction:
            rows = transaction.execute(_SELECT.order_by(apps.c.provider, apps.c.name)).all()
        return [_row(row._mapping) for row in rows]

    def find(self, reference: str) -> AppRow:
        """The app an admin means by `provider/name`, or by `provider` alone (its default app), or by a unique name.

        Raises `NotFound`, or `InvalidRequest` when the name is not unique.
        """
        provider, _, name = reference.partition("/")
        if provider in self._providers:
            row = self._by_name(provider, name or _DEFAULT)
            if row is None:
                raise NotFound(
                    f"There is no app {name or _DEFAULT!r} at {provider}; see: drawbridge app list."
                )
            return row
        named = [row for row in self.list() if row.name == reference]
        if not named:
            raise NotFound(f"There is no app {reference!r}; see: drawbridge app list.")
        if len(named) > 1:
            raise InvalidRequest(f"Several apps are named {reference!r}; write provider/name.")
        return named[0]

    def row(self, app_id: str) -> AppRow:
        """The app with this id; raises `NotFound`."""
        with self._database.read() as transaction:
            row = transaction.execute(_BY_ID, {"wanted": app_id}).one_or_none()
        if row is None:
            raise NotFound("The app of this connection no longer exists.")
        return _row(row._mapping)

    def open(self, app_id: str) -> App:
        """The app ready for use, its secrets opened. Raises `NotFound`, `ProviderMisconfigured` or `Unopenable`."""
        with self._database.read() as transaction:
            row = transaction.execute(_WITH_SECRETS, {"wanted": app_id}).one_or_none()
        if row is None:
            raise NotFound("The app of this connection no longer exists.")
        plain = _row(row._mapping)
        app = App(
            id=plain.id,
            provider=plain.provider,
            name=plain.name,
            client_id=plain.client_id,
            secrets=self._secrets(plain, row.secrets),
            scopes=plain.scopes,
            optional_scopes=plain.optional_scopes,
            options=plain.options,
            redirect_uri=self.redirect_uri(plain.provider),
        )
        self._http.allow(*self.provider(plain.provider).hosts(app))
        return app

    def redirect_uri(self, provider: str) -> str:
        """The callback URL to register at the provider."""
        return redirect_uri(self._settings.public_url, provider)

    def add(
        self,
        provider: str,
        name: str,
        *,
        client_id: str,
        secrets: Sequence[Secret],
        scopes: Sequence[str],
        optional_scopes: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        actor: str = "admin:cli",
    ) -> AppRow:
        """Register a client. Raises `InvalidRequest` for options the provider does not understand, `Conflict` if taken."""
        understood = self.provider(provider).load_options(options or {})
        identifier = new_id()
        sealed = self._seal(identifier, 1, secrets)
        values = {
            "id": identifier,
            "provider": provider,
            "name": name,
            "source": "database",
            "client_id": client_id,
            "secrets": sealed.blob,
            "kek_id": sealed.kek_id,
            "scopes": list(scopes),
            "optional_scopes": list(optional_scopes),
            "options": understood,
            "created_at": self._clock.now(),
            "version": 1,
        }
        try:
            with self._database.write() as transaction:
                bump(transaction, "access")
                transaction.execute(sa.insert(apps).values(**values))
                self._trail.record(Entry(actor, Event.APP_ADDED, f"{provider}/{name}"))
        except IntegrityError:
            raise Conflict(f"There is already an app {provider}/{name}.") from None
        return self.row(identifier)

    def rotate(self, app: AppRow, *, secrets: Sequence[Secret], actor: str = "admin:cli") -> AppRow:
        """Replace the client secrets, newest first; the first one refused at the provider is followed by the next."""
        if app.source == "environment":
            raise InvalidRequest(
                f"{app.reference} comes from the environment; change DRAWBRIDGE_{app.provider.upper()}_CLIENT_SECRET there."
            )
        sealed = self._seal(app.id, app.version + 1, secrets)
        with self._database.write() as transaction:
            bump(transaction, "access")
            changed = transaction.execute(
                sa.update(apps)
                .where(apps.c.id == app.id, apps.c.version == app.version)
                .values(
                    secrets=sealed.blob,
                    kek_id=sealed.kek_id,
                    version=app.version + 1,
                    # Not 0: the grant that comes next then closes what was found of the app, once that is quiet.
                    failures=sa.case((apps.c.failures > 0, 1), else_=0),
                    open_until=None,
                    open_reason=None,
                )
            )
            if changed.rowcount != 1:
                raise Conflict(f"{app.reference} was changed by somebody else just now; try again.")
            self._trail.record(Entry(actor, Event.APP_ROTATED, app.reference))
        if app.open_reason is not None:
            log(Event.BREAKER_CLOSED, app=app.reference, provider=app.provider)
        return self.row(app.id)

    def remove(self, app: AppRow, *, actor: str = "admin:cli") -> None:
        """Forget the app; raises `Conflict` while connections go through it."""
        with self._database.write() as transaction:
            bump(transaction, "access")
            used = transaction.execute(
                sa.select(sa.func.count()).select_from(connections).where(connections.c.app_id == app.id)
            ).scalar_one()
            if used:
                raise Conflict(f"{used} connection(s) go through {app.reference}; disconnect them first.")
            if app.source == "environment" and app.provider in self._from_environment:
                raise Conflict(f"{app.reference} comes from the environment; remove it there.")
            transaction.execute(sa.delete(apps).where(apps.c.id == app.id))
            self._trail.record(Entry(actor, Event.APP_REMOVED, app.reference))

    # The circuit breaker, shared by all processes through the row

    def breaker(self, app_id: str) -> Breaker | None:
        """The open breaker of this app, or None when refreshes may go out."""
        with self._database.read() as transaction:
            row = transaction.execute(_BREAKER, {"wanted": app_id}).one_or_none()
        return None if row is None else Breaker(row.open_until, row.open_reason or AppTrouble.DOWN.value)

    def went_well(self, transaction: Transaction, app_id: str) -> bool:
        """Close the breaker after a grant; true when there was something to close."""
        closed = transaction.execute(_WENT_WELL, {"app_id": app_id}).one_or_none()
        if closed is not None and closed.open_reason is not None:
            transaction.execute(sa.update(apps).where(apps.c.id == app_id).values(open_reason=None))
            log(Event.BREAKER_CLOSED, app=f"{closed.provider}/{closed.name}", provider=closed.provider)
        return closed is not None

    def went_wrong(self, transaction: Transaction, app_id: str, trouble: AppTrouble, *, now: datetime) -> int:
        """Count a failure that concerns the whole app and open the breaker if it is time; how many in a row."""
        counted = transaction.execute(
            sa.update(apps)
            .where(apps.c.id == app_id)
            .values(failures=apps.c.failures + 1)
            .returning(apps.c.failures, apps.c.open_until, apps.c.provider, apps.c.name)
        ).one_or_none()
        failures = int(counted.failures) if counted is not None else 0
        pause = _pause(failures, trouble)
        if pause:
            transaction.execute(
                sa.update(apps)
                .where(apps.c.id == app_id)
                .values(open_until=now + timedelta(seconds=pause), open_reason=trouble.value)
            )
        if pause and counted is not None and counted.open_until is None:  # once, and not at each longer pause
            metrics.breakers_opened.labels(counted.provider).inc()
            log(
                Event.BREAKER_OPENED,
                app=f"{counted.provider}/{counted.name}",
                provider=counted.provider,
                reason=trouble.value,
                failures=failures,
                seconds=pause,
            )
        return failures

    # Inside

    def _by_name(self, provider: str, name: str) -> AppRow | None:
        query = _SELECT.where(apps.c.provider == provider, apps.c.name == name)
        with self._database.read() as transaction:
            row = transaction.execute(query).one_or_none()
        return None if row is None else _row(row._mapping)

    def _insert_default(self, provider: str, values: dict[str, Any]) -> None:
        try:
            with self._database.write() as transaction:
                transaction.execute(
                    sa.insert(apps).values(
                        id=new_id(),
                        provider=provider,
                        name=_DEFAULT,
                        source="environment",
                        created_at=self._clock.now(),
                        version=1,
                        **values,
                    )
                )
        except IntegrityError:
            return  # another process that started at the same moment made the same row

    def _update(self, app_id: str, **values: Any) -> None:
        with self._database.write() as transaction:
            bump(transaction, "access")
            transaction.execute(
                sa.update(apps).where(apps.c.id == app_id).values(version=apps.c.version + 1, **values)
            )

    def _secrets(self, row: AppRow, sealed: bytes | None) -> tuple[Secret, ...]:
        if row.source == "environment":
            app = self._from_environment.get(row.provider)
            if app is None:
                raise ProviderMisconfigured(
                    f"The environment no longer defines the client of {row.reference}."
                )
            return tuple(app.secrets)
        if sealed is None:
            return ()
        clear = json.loads(self._sealer.open(sealed, _place(row.id, row.version)))
        if not isinstance(clear, list):
            raise Unopenable
        return tuple(Secret(text) for text in clear)

    def _seal(self, app_id: str, version: int, secrets: Sequence[Secret]) -> Any:
        clear = json.dumps([secret.reveal() for secret in secrets]).encode()
        return self._sealer.seal(clear, _place(app_id, version))


_COLUMNS: Final = tuple(AppRow.__dataclass_fields__)
_SELECT: Final = sa.select(*(apps.c[name] for name in _COLUMNS))
_BY_ID: Final = _SELECT.where(apps.c.id == sa.bindparam("wanted"))
_WITH_SECRETS: Final = _BY_ID.add_columns(apps.c.secrets)
_WENT_WELL: Final = (
    sa.update(apps)
    .where(apps.c.id == sa.bindparam("app_id"), apps.c.failures > 0)
    .values(failures=0, open_until=None)
    .returning(apps.c.provider, apps.c.name, apps.c.open_reason)
)
_BREAKER: Final = sa.select(apps.c.open_until, apps.c.open_reason).where(
    apps.c.id == sa.bindparam("wanted"), apps.c.open_until > db_now()
)


def _pause(failures: int, trouble: AppTrouble) -> float:
    if trouble is AppTrouble.MISCONFIGURED:
        return _MISCONFIGURED_PAUSE
    if failures < PATIENCE:
        return 0.0
    return min(2.0 ** (failures - PATIENCE), _LONGEST)


def _place(app_id: str, version: int) -> Place:
    return Place(table="apps", column="secrets", row_id=app_id, generation=version)


def _row(mapping: Mapping[Any, Any]) -> AppRow:
    values = {name: mapping[name] for name in _COLUMNS}
    values["scopes"] = tuple(values["scopes"])
    values["optional_scopes"] = tuple(values["optional_scopes"])
    return AppRow(**values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
