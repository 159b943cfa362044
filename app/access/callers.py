"""The register of callers: who may ask at all.

Every change is one transaction that bumps the epoch "access" first and is on record before it is committed;
a change that cannot be recorded does not happen. Taking something away therefore acts on every process
within a second.
"""

from __future__ import annotations

import hmac
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final, NewType
from urllib.parse import urlsplit

from sqlalchemy import delete, insert, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from app.access.audit import Entry, Trail
from app.access.credentials import looks_like_client_id, new_client_id, new_secret
from app.access.keysets import read_public_keys
from app.access.permissions import Action, Permission
from app.clock import Clock
from app.db.engine import Database
from app.db.epoch import bump
from app.db.schema import callers, permissions
from app.errors import Conflict, NotFound, Unauthenticated, Unprocessable
from app.secret import Secret
from app.telemetry import Event

__all__ = ["Added", "Caller", "CallerId", "Callers", "Registration"]

CallerId = NewType("CallerId", str)
Network = IPv4Network | IPv6Network

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FASTEST: Final = 100_000.0
_NOBODY: Final = "0" * 64  # compared with when there is no such caller, so that this takes as long


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A caller that has proved to be the one; `scopes` narrows a token made for less than all its
    permissions.
    """

    id: CallerId
    name: str
    client_id: str
    enabled: bool
    rate: float | None
    allow_ips: tuple[Network, ...]
    permissions: tuple[Permission, ...]
    version: int
    scopes: frozenset[Action] | None = None

    @property
    def actor(self) -> str:
        """How the audit trail calls it."""
        return f"caller:{self.name}"

    def may(self, action: Action, target: str) -> bool:
        """Whether its permissions, and the scopes of the token it came with, allow this."""
        if self.scopes is not None and action not in self.scopes:
            return False
        return any(permission.covers(action, target) for permission in self.permissions)

    def may_come_from(self, address: str | None) -> bool:
        """Whether its allow-list, if it has one, holds this address; an IPv4 address mapped into IPv6
        counts as IPv4.
        """
        if not self.allow_ips:
            return True
        try:
            found = ip_address(address or "")
        except ValueError:
            return False
        mapped = getattr(found, "ipv4_mapped", None)
        return any((mapped or found) in network for network in self.allow_ips)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A caller as an admin sees it; never a secret."""

    caller: Caller
    way: str  # secret, jwks or jwks_uri
    jwks: Mapping[str, Any] | None
    jwks_uri: str | None
    created_at: datetime
    last_used_at: datetime | None


@dataclass(frozen=True, slots=True)
class Added:
    """A new caller, or one with a new secret; the secret is shown this once and is None for callers that
    sign.
    """

    caller: Caller
    client_secret: Secret | None


class Callers:
    """The register; safe for threads.

    `allow_loopback` lets a JWKS URI be plain http on this machine. Names and permissions raise
    `Unprocessable` when malformed, `NotFound` when unknown, `Conflict` when taken; every change raises
    `AuditUnavailable` and `DatabaseUnavailable` and has then not happened.
    """

    def __init__(
        self, database: Database, trail: Trail, clock: Clock, *, allow_loopback: bool = False
    ) -> None:
        self._database = database
        self._trail = trail
        self._clock = clock
        self._allow_loopback = allow_loopback

    # ---------------------------------------------------------------------------------------- changing

    def add(
        self,
        name: str,
        *,
        allow: Sequence[Permission] = (),
        jwks: Mapping[str, Any] | None = None,
        jwks_uri: str | None = None,
        allow_ips: Sequence[str] = (),
        rate: float | None = None,
        actor: str = "admin:cli",
    ) -> Added:
        """Register a caller; with keys it signs, without it gets a secret."""
        secret = self._secret_unless_signing(jwks, jwks_uri)
        row = {
            "id": secrets.token_hex(16),
            "name": _good_name(name),
            "client_id": new_client_id(),
            "secret_hash": None if secret is None else secret.sha256(),
            "jwks": jwks,
            "jwks_uri": jwks_uri,
            "allow_ips": [str(network) for network in _networks(allow_ips)],
            "rate": _good_rate(rate),
            "enabled": True,
            "version": 1,
            "created_at": self._clock.now(),
        }
        given = sorted(set(allow))
        detail = {"permissions": [str(permission) for permission in given]}
        try:
            with self._database.write() as connection:
                bump(connection, "access")
                connection.execute(insert(callers).values(row))
                for permission in given:
                    self._give(connection, CallerId(str(row["id"])), permission)
                self._trail.record(Entry(actor, Event.CALLER_ADDED, name, detail=detail))
        except IntegrityError:
            raise Conflict(f"There is already a caller named {name}.") from None
        return Added(self.show(name).caller, secret)

    def rotate(self, name: str, *, jwks: Mapping[str, Any] | None = None, actor: str = "admin:cli") -> Added:
        """Replace the secret, or the stored keys of a caller that signs; what was valid before is not any
        more.
        """
        registration = self.show(name)
        secret = None
        if registration.way == "secret" and jwks is None:
            secret = new_secret()
        elif registration.way == "jwks" and jwks is not None:
            read_public_keys(jwks)
        else:
            raise Unprocessable(_ROTATE[registration.way])
        values = {"jwks": jwks} if secret is None else {"secret_hash": secret.sha256()}
        self._change(name, values, Event.CALLER_ROTATED, actor)
        return Added(self.show(name).caller, secret)

    def disable(self, name: str, *, actor: str = "admin:cli") -> Caller:
        """Refuse the caller from now on, tokens made before included; doing it twice does no harm."""
        self._change(name, {"enabled": False}, Event.CALLER_DISABLED, actor)
        return self.show(name).caller

    def enable(self, name: str, *, actor: str = "admin:cli") -> Caller:
        """Accept the caller again; tokens made before stay dead."""
        self._change(name, {"enabled": True}, Event.CALLER_ENABLED, actor)
        return self.show(name).caller

    def remove(self, name: str, *, actor: str = "admin:cli") -> None:
        """Delete the caller and its permissions."""
        with self._database.write() as connection:
            bump(connection, "access")
            id_ = _find_id(connection, name)
            connection.execute(delete(permissions).where(permissions.c.caller_id == id_))
            connection.execute(delete(callers).where(callers.c.id == id_))
            self._trail.record(Entry(actor, Event.CALLER_REMOVED, name))

    def allow(self, name: str, permission: Permission, *, actor: str = "admin:cli") -> Caller:
        """Give a permission; giving it twice does no harm."""
        with self._database.write() as connection:
            bump(connection, "access")
            id_ = _find_id(connection, name)
            if not connection.execute(select(permissions.c.action).where(*_is(id_, permission))).first():
                self._give(connection, id_, permission)
            self._trail.record(
                Entry(actor, Event.PERMISSION_GIVEN, name, detail={"permission": str(permission)})
            )
        return self.show(name).caller

    def deny(self, name: str, permission: Permission, *, actor: str = "admin:cli") -> Caller:
        """Take a permission away, exactly as it was given; `NotFound` names those it has."""
        with self._database.write() as connection:
            bump(connection, "access")
            id_ = _find_id(connection, name)
            if connection.execute(delete(permissions).where(*_is(id_, permission))).rowcount == 0:
                held = ", ".join(map(str, _permissions(connection, [id_]).get(id_, ()))) or "none"
                raise NotFound(f"{name} does not have {permission}; it has: {held}.")
            self._trail.record(
                Entry(actor, Event.PERMISSION_TAKEN, name, detail={"permission": str(permission)})
            )
        return self.show(name).caller

    def note_used(self, used: Mapping[CallerId, datetime]) -> None:
        """Remember when callers last asked; touches nothing that is believed, so no epoch moves."""
        if not used:
            return
        with self._database.write() as connection:
            for id_, moment in sorted(used.items()):
                connection.execute(update(callers).where(callers.c.id == id_).values(last_used_at=moment))

    # ----------------------------------------------------------------------------------------- reading

    def list(self) -> tuple[Registration, ...]:
        """Every caller by name."""
        return self._registrations()

    def show(self, name: str) -> Registration:
        """One caller by name."""
        found = self._registrations(callers.c.name == name)
        if not found:
            raise NotFound(_unknown(name))
        return found[0]

    def by_id(self, id_: CallerId) -> Caller | None:
        """One caller as it is in the database now."""
        found = self._registrations(callers.c.id == id_)
        return found[0].caller if found else None

    def by_client_id(self, client_id: str) -> Registration | None:
        """One caller by its public id."""
        if not looks_like_client_id(client_id):
            return None
        found = self._registrations(callers.c.client_id == client_id)
        return found[0] if found else None

    def by_secret(self, client_id: str, secret: Secret) -> Caller:
        """The enabled caller with this id and secret; unknown, wrong and disabled are the same
        `Unauthenticated`.
        """
        if not looks_like_client_id(client_id):
            raise Unauthenticated
        with self._database.read() as connection:
            stored = connection.execute(
                select(callers.c.id, callers.c.secret_hash).where(callers.c.client_id == client_id)
            ).one_or_none()
        expected = _NOBODY if stored is None or stored.secret_hash is None else stored.secret_hash
        if not hmac.compare_digest(expected, secret.sha256()) or stored is None:
            raise Unauthenticated
        caller = self.by_id(CallerId(stored.id))
        if caller is None or not caller.enabled:
            raise Unauthenticated
        return caller

    # ----------------------------------------------------------------------------------------- helpers

    def _registrations(self, *conditions: Any) -> tuple[Registration, ...]:
        with self._database.read() as connection:
            rows = connection.execute(select(callers).where(*conditions).order_by(callers.c.name)).all()
            held = _permissions(connection, [CallerId(row.id) for row in rows])
        return tuple(_registration(row, held.get(row.id, ())) for row in rows)

    def _change(self, name: str, values: Mapping[str, Any], event: Event, actor: str) -> None:
        with self._database.write() as connection:
            bump(connection, "access")
            changed = connection.execute(
                update(callers).where(callers.c.name == name).values(**values, version=callers.c.version + 1)
            )
            if changed.rowcount == 0:
                raise NotFound(_unknown(name))
            self._trail.record(Entry(actor, event, name))

    def _give(self, connection: Connection, id_: CallerId, permission: Permission) -> None:
        connection.execute(
            insert(permissions).values(
                caller_id=id_,
                action=permission.action.value,
                pattern=permission.pattern,
                created_at=self._clock.now(),
            )
        )

    def _secret_unless_signing(self, jwks: Mapping[str, Any] | None, jwks_uri: str | None) -> Secret | None:
        if jwks is not None and jwks_uri is not None:
            raise Unprocessable("A caller has either a JWKS or a JWKS URI, not both.")
        if jwks is not None:
            read_public_keys(jwks)
            return None
        if jwks_uri is not None:
            self._check_uri(jwks_uri)
            return None
        return new_secret()

    def _check_uri(self, uri: str) -> None:
        try:
            parts = urlsplit(uri)
            host = parts.hostname
        except ValueError:
            raise Unprocessable("The JWKS URI is not a URL.") from None
        loopback = self._allow_loopback and host in ("127.0.0.1", "::1", "localhost")
        if not host or (parts.scheme != "https" and not (parts.scheme == "http" and loopback)):
            raise Unprocessable("The JWKS URI must be an https URL.")
        if parts.username or parts.password or parts.fragment:
            raise Unprocessable("The JWKS URI must not hold a password or a fragment.")


_ROTATE: Final = {
    "secret": "This caller has a secret; keys cannot be given to it. Add another caller that signs.",
    "jwks": "This caller signs with its own keys; give its new JWKS.",
    "jwks_uri": "This caller publishes its keys itself; it rotates them at its JWKS URI.",
}


def _unknown(name: str) -> str:
    return f"There is no caller named {name}." if _NAME.fullmatch(name) else "There is no such caller."


def _find_id(connection: Connection, name: str) -> CallerId:
    found = connection.scalar(select(callers.c.id).where(callers.c.name == name))
    if found is None:
        raise NotFound(_unknown(name))
    return CallerId(found)


def _is(id_: CallerId, permission: Permission) -> tuple[Any, ...]:
    columns = permissions.c
    return (
        columns.caller_id == id_,
        columns.action == permission.action.value,
        columns.pattern == permission.pattern,
    )


def _permissions(connection: Connection, ids: Sequence[CallerId]) -> dict[CallerId, tuple[Permission, ...]]:
    columns = permissions.c
    question = select(columns.caller_id, columns.action, columns.pattern).order_by(
        columns.action, columns.pattern
    )
    if len(ids) == 1:
        question = question.where(columns.caller_id == ids[0])
    held: dict[CallerId, tuple[Permission, ...]] = {}
    for row in connection.execute(question):
        if row.action in set(Action):  # one that a newer version gave is none of ours
            held[row.caller_id] = (*held.get(row.caller_id, ()), Permission(Action(row.action), row.pattern))
    return held


def _registration(row: Any, held: tuple[Permission, ...]) -> Registration:
    caller = Caller(
        id=CallerId(row.id),
        name=row.name,
        client_id=row.client_id,
        enabled=row.enabled,
        rate=row.rate,
        allow_ips=_networks(row.allow_ips),
        permissions=held,
        version=row.version,
    )
    way = "jwks" if row.jwks is not None else "jwks_uri" if row.jwks_uri is not None else "secret"
    return Registration(
        caller=caller,
        way=way,
        jwks=row.jwks,
        jwks_uri=row.jwks_uri,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
    )


def _good_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise Unprocessable(
            "A caller's name has 1 to 63 of a-z, 0-9, dot, dash, underscore; a letter or digit comes first."
        )
    return name


def _good_rate(rate: float | None) -> float | None:
    if rate is not None and not (math.isfinite(rate) and 0 < rate <= _FASTEST):
        raise Unprocessable(f"The rate is requests per second: above 0, at most {_FASTEST:.0f}.")
    return rate


def _networks(texts: Sequence[str]) -> tuple[Network, ...]:
    networks = []
    for text in texts:
        try:
            networks.append(ip_network(text))
        except ValueError:
            raise Unprocessable(
                f"{json.dumps(text)} is not an address or a network like 203.0.113.0/24 (no bits behind it)."
            ) from None
    return tuple(networks)
