"""Bringing connections in from elsewhere, and handing one over to another installation.

Import takes one JSON object per line. Export seals a connection to a public key the operator names and marks it as moved:
two installations that refresh the same grant revoke each other's tokens, so this one never refreshes it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate
from sqlalchemy.exc import IntegrityError

from app.access.audit import Entry, Trail
from app.broker.apps import AppRow, Apps
from app.broker.connection import AdminState, Connection, ConnectionId, Health, Rotation, Tokens
from app.broker.refresh import tell_recovered
from app.broker.store import Store, check_name, new_id
from app.clock import Clock
from app.crypto.sealed_box import seal_to
from app.db.engine import Database
from app.errors import Conflict, DatabaseUnavailable, DrawbridgeError, InvalidRequest
from app.secret import Secret
from app.telemetry import Event, log

__all__ = ["ExportUnclear", "Imported", "Transfer"]


class ExportUnclear(DatabaseUnavailable):
    """The mark was sent and not confirmed: what was delivered is the only copy, or must not be used."""

    hint = "`drawbridge connection show NAME` tells with exported_at whether it is marked."


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of one line: `outcome` is added, replaced or failed; `problem` says why."""

    line: int
    outcome: str
    name: str | None = None
    problem: str | None = None


class _Line(Schema):
    """One imported connection; unknown fields are refused, so that a misspelt one is noticed."""

    class Meta:
        unknown = RAISE

    provider = fields.String(required=True)
    app = fields.String(load_default=None)
    account_id = fields.String(required=True, validate=validate.Length(1, 255))
    user_id = fields.String(load_default=None, allow_none=True, validate=validate.Length(max=255))
    access_token = fields.String(load_default=None, allow_none=True, validate=validate.Length(min=1))
    refresh_token = fields.String(load_default=None, allow_none=True, validate=validate.Length(min=1))
    expires_at = fields.Raw(load_default=None, allow_none=True)
    scopes = fields.List(fields.String(), load_default=None, allow_none=True)
    instance_url = fields.Url(
        load_default=None, allow_none=True, require_tld=False, schemes={"https", "http"}
    )
    name = fields.String(load_default=None, allow_none=True)


class Transfer:
    """Import and export."""

    def __init__(self, database: Database, store: Store, *, apps: Apps, trail: Trail, clock: Clock) -> None:
        self._database = database
        self._store = store
        self._apps = apps
        self._trail = trail
        self._clock = clock

    def import_lines(
        self, lines: Iterable[str], *, replace: bool = False, actor: str = "admin:cli"
    ) -> Iterator[Imported]:
        """Store each line as a connection, one transaction each; a bad line is reported and the rest goes on.

        A line is not stored over tokens that were refreshed here since they came: the refresh token it brings may be spent,
        and presenting it would revoke the grant. `replace` stores it all the same.

        A byte that is not UTF-8 may come as a lone surrogate (PEP 383); its line is a bad one.
        """
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, outcome = self._import(line, actor, overwrite=replace)
            except DrawbridgeError as error:
                yield Imported(line=number, outcome="failed", problem=error.detail)
            else:
                log(Event.CONNECTION_IMPORTED, connection=name, outcome=outcome)
                yield Imported(line=number, outcome=outcome, name=name)

    def _import(self, line: str, actor: str, *, overwrite: bool) -> tuple[str, str]:
        data = _parse(line)
        app = self._apps.find(f"{data['provider']}/{data['app'] or 'default'}")
        provider = self._apps.provider(app.provider)
        if data["refresh_token"] is None and data["access_token"] is None:
            raise InvalidRequest("Neither access_token nor refresh_token is given.")
        identity = provider.identity_of(self._apps.open(app.id), data["account_id"], data["user_id"] or "")
        existing = self._store.by_identity(app.id, identity)
        tokens = Tokens(
            access_token=_secret(data["access_token"]), refresh_token=_secret(data["refresh_token"])
        )
        in_use = existing is not None and not overwrite and _is_in_use(existing)
        if existing is not None and in_use:
            self._check_newer(existing, tokens)
        after = self._row(app, data, identity=identity, existing=existing)
        sealed = self._store.seal(tokens, after.id, generation=after.generation)
        try:
            with self._database.write() as transaction:
                if existing is None:
                    self._store.insert(transaction, after, sealed)
                elif not self._store.reinstall(transaction, after, sealed, at_rest=in_use):
                    raise Conflict("The connection changed while it was imported; import the line again.")
                tell_recovered(transaction, after, now=self._clock.now())
                self._trail.record(Entry(actor, Event.CONNECTION_IMPORTED, after.name))
        except IntegrityError:
            raise Conflict(f"The name {after.name!r} is taken by another account.") from None
        return after.name, "replaced" if existing else "added"

    def _check_newer(self, existing: Connection, tokens: Tokens) -> None:
        """Pass unless what is stored may be newer than what comes."""
        if existing.open_attempt is not None:
            raise Conflict(
                f"{existing.name!r} is connected, and a refresh is under way; import the line again."
            )
        if existing.health is Health.UNCERTAIN or existing.last_try:
            raise Conflict(
                f"{existing.name!r} is connected, and an answer for it was lost: the line's refresh token may be spent. "
                "If it is a newer one, import it with --replace."
            )
        since, came = existing.last_refresh_at, existing.connected_at
        if since is None or (came is not None and since < came):
            return
        found = self._store.tokens_of(existing.id)
        if found is not None and found[1].refresh_token == tokens.refresh_token:
            return
        raise Conflict(
            f"{existing.name!r} is connected and was refreshed here since: the line's refresh token may be spent already. "
            "If it is the newer one, import it with --replace."
        )

    def _row(
        self, app: AppRow, data: dict[str, Any], *, identity: str, existing: Connection | None
    ) -> Connection:
        provider = self._apps.provider(app.provider)
        now = self._clock.now()
        expires_at = _instant(data["expires_at"]) if data["access_token"] else None
        if data["access_token"] and expires_at is None:
            expires_at = (
                now  # its age is unknown: it is not handed out, the refresh token brings the first good one
            )
        default = "-".join(filter(None, (app.provider, data["account_id"], data["user_id"]))).lower()
        base = existing or Connection(
            id=ConnectionId(new_id()),
            name=check_name(data["name"] or default),
            provider=app.provider,
            app_id=app.id,
            grant_type="authorization_code",
            account_id=data["account_id"],
            user_id=data["user_id"] or "",
            identity=identity,
            rotation=Rotation(provider.rotation_at_start),
            created_at=now,
        )
        scopes = app.scopes if data["scopes"] is None else tuple(data["scopes"])
        state = AdminState.ENABLED if base.admin_state is AdminState.DISCONNECTING else base.admin_state
        return replace(
            base,
            grant_type="authorization_code",
            admin_state=state,
            revoke_since=None,
            health=Health.HEALTHY,
            generation=base.generation + 1,
            expires_at=expires_at,
            obtained_at=now if expires_at else None,
            life_seconds=base.life_seconds,
            scopes_wanted=app.scopes,
            scopes_granted=scopes,
            instance_url=data["instance_url"] or base.instance_url,
            lease_until=None,
            open_attempt=None,
            last_try=False,
            refused_generation=None,
            refused_at=None,
            refused_code=None,
            failures=0,
            retry_at=None,
            refresh_at=now if data["refresh_token"] else None,
            last_error=None,
            last_error_at=None,
            exported_at=None,
            connected_at=now,
        )

    def export(
        self,
        name: str,
        *,
        public_key_pem: bytes,
        deliver: Callable[[bytes], None],
        actor: str = "admin:cli",
    ) -> None:
        """Give `deliver` the connection with its tokens, sealed to the key; then leave the grant alone for good.

        `deliver` returns once the bytes are where they survive this process; if it raises, nothing is marked. It may take
        its time: no transaction is open. Raises `NotFound`, `Conflict` while a refresh is under way, when it was moved
        before or changed while it was delivered, and `InvalidRequest` for a key that is none or a connection without a grant
        to move: what was delivered must not be used then. After `ExportUnclear` it may be the only copy.
        """
        connection, tokens = self._movable(name)
        sealed = seal_to(public_key_pem, json.dumps(self._line_of(connection, tokens)).encode())
        deliver(sealed)
        self._mark_moved(connection, actor)
        log(Event.CONNECTION_EXPORTED, connection=name, provider=connection.provider)

    def _movable(self, name: str) -> tuple[Connection, Tokens]:
        seen = self._store.named(name)
        found = self._store.tokens_of(seen.id)
        if found is None or found[0].open_attempt is not None:
            raise Conflict("A refresh is under way; export again in a moment.")
        connection, tokens = found
        if connection.health is Health.UNCERTAIN or connection.last_try:
            raise Conflict(
                f"An answer for {name!r} was lost: its refresh token may be spent, and must not be presented while the "
                "access token lives. Export it when `connection show` says that it is healthy."
            )
        if connection.exported_at is not None:
            raise Conflict(f"{name!r} was moved already; a second copy would spend the same grant.")
        if connection.grant_type != "authorization_code":
            raise InvalidRequest(
                f"{name!r} mints its tokens with a key of yours; add it at the other installation with that key instead."
            )
        return connection, tokens

    def _line_of(self, connection: Connection, tokens: Tokens) -> dict[str, Any]:
        return {
            "provider": connection.provider,
            "app": self._apps.row(connection.app_id).name,
            "account_id": connection.account_id,
            "user_id": connection.user_id or None,
            "access_token": tokens.access_token.reveal() if tokens.access_token else None,
            "refresh_token": tokens.refresh_token.reveal() if tokens.refresh_token else None,
            "expires_at": connection.expires_at.isoformat() if connection.expires_at else None,
            "scopes": list(connection.scopes_granted),
            "instance_url": connection.instance_url,
            "name": connection.name,
        }

    def _mark_moved(self, connection: Connection, actor: str) -> None:
        marked = False
        try:
            with self._database.write() as transaction:
                if not self._store.mark_exported(transaction, connection, now=self._clock.now()):
                    raise Conflict("A refresh or another export came in between; export again.")
                self._trail.record(Entry(actor, Event.CONNECTION_EXPORTED, connection.name))
                marked = True
        except DatabaseUnavailable as error:
            if not marked:
                raise
            raise ExportUnclear(
                f"The database did not confirm that {connection.name!r} is marked as moved."
            ) from error


def _is_in_use(existing: Connection) -> bool:
    if existing.health is Health.NEEDS_RECONNECT or existing.exported_at is not None:
        return False
    if existing.admin_state is AdminState.DISCONNECTING:
        return False
    return existing.grant_type == "authorization_code"


def _parse(line: str) -> dict[str, Any]:
    try:
        raw = json.loads(line)
        texts = list(_texts(raw))
    except (ValueError, RecursionError):
        raise InvalidRequest("The line is not JSON.") from None
    if not isinstance(raw, dict):
        raise InvalidRequest("The line is not a JSON object.")
    if not all(map(_is_text, texts)):
        raise InvalidRequest("The line is not text in UTF-8, or has U+0000 in it.")
    try:
        data: dict[str, Any] = _Line().load(raw)
    except ValidationError as fault:
        # Messages of ours and names of fields only: a value might be a token.
        said = dict(fault.messages_dict)
        faults = "; ".join(f"{field}: {' '.join(map(str, texts))}" for field, texts in said.items())
        raise InvalidRequest(faults) from None
    return data


def _texts(value: Any) -> Iterator[str]:
    """Every name and every text in a JSON value."""
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _texts(item)
        case dict():
            for name, item in value.items():
                yield name
                yield from _texts(item)


def _is_text(text: str) -> bool:
    """Whether databases and providers take it: JSON can spell U+0000 and lone surrogates (RFC 8259 §8.2), they cannot."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)


def _instant(value: Any) -> datetime | None:
    """RFC 3339 text or seconds since 1970."""
    if value is None:
        return None
    try:
        if isinstance(value, str):
            parsed = datetime.fromisoformat(value)
            return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise InvalidRequest("expires_at is neither RFC 3339 nor seconds since 1970.")


def _secret(text: str | None) -> Secret | None:
    return None if text is None else Secret(text)
