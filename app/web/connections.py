"""Connections as the API shows and switches them; never a token in an answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import asdict
from threading import BoundedSemaphore
from typing import Any, Final

from flask import current_app, g, request

from app.access.callers import Caller
from app.access.permissions import Action
from app.broker.connection import Connection
from app.broker.doctor import Vitals
from app.broker.issue import DEFAULT_MAX_WAIT, FORCED_EVERY
from app.broker.refresh import EndingKind
from app.errors import InvalidRequest, RefreshInProgress
from app.telemetry import Event
from app.web.api import ApiBlueprint
from app.web.asking import ask_caller, require_somewhere, services
from app.web.schemas import Connections, DisconnectQuery, DoctorReport, ListQuery, NoQuery, OneConnection

__all__ = ["FORCED_PLACES", "blueprint", "force_refresh"]

FORCED_PLACES: Final = "drawbridge.forced_places"
"""The extension that bounds how many threads wait for forced refreshes: an eighth of them, because hand-outs have three
quarters for their own waiting."""

_PER_LOOK: Final = 500
_LOOKS: Final = (
    8  # database pages looked through for one answer; a caller that may see little gets short pages
)
_Row = dict[str, Any]


blueprint: Final = ApiBlueprint("connections", __name__, description="Linked accounts.")


@blueprint.first
def _who() -> None:
    """Who asks comes before what is asked: no other fault is told to somebody unknown."""
    g.caller = ask_caller()
    environ = request.environ
    if environ.get("CONTENT_LENGTH") not in (None, "", "0") or "HTTP_TRANSFER_ENCODING" in environ:
        raise InvalidRequest("This takes no body.")


@blueprint.on("GET", "/v1/connections")
@blueprint.query(ListQuery)
@blueprint.answers(200, Connections)
@blueprint.errors(400, 401, 403, 429, 503)
def list_connections(query: _Row) -> _Row:
    """List the connections the caller may see, by name."""
    caller: Caller = g.caller
    require_somewhere(caller, Action.CONNECTION_READ)
    shown, last = _readable(caller, after=query.get("after", ""), limit=query["limit"])
    names = _app_names()
    told = services().examiner.vitals(shown)
    return {"connections": [_row(one, names, told[one.id]) for one in shown], "next": last}


@blueprint.on("GET", "/v1/connections/<name:name>")
@blueprint.query(NoQuery)
@blueprint.answers(200, OneConnection)
@blueprint.errors(400, 401, 403, 404, 429, 503)
def show_connection(query: _Row, name: str) -> _Row:
    """Show one connection."""
    _allowed(Action.CONNECTION_READ, name)
    return _shown(services().store.named(name), _app_names())


@blueprint.on("GET", "/v1/connections/<name:name>/doctor")
@blueprint.query(NoQuery)
@blueprint.answers(200, DoctorReport)
@blueprint.errors(400, 401, 403, 404, 429, 503)
def examine_connection(query: _Row, name: str) -> _Row:
    """Say what is the matter with a connection: whose fault it is, what stands behind it, who mends it and how."""
    _allowed(Action.CONNECTION_READ, name)
    connection = services().store.named(name)
    found = services().examiner.examine(connection)
    return asdict(found) | {"name": connection.name, "state": connection.state, "healthy": found.healthy}


@blueprint.on("POST", "/v1/connections/<name:name>/refresh")
@blueprint.query(NoQuery)
@blueprint.answers(200, OneConnection)
@blueprint.errors(400, 401, 403, 404, 409, 429, 503)
def refresh_connection(query: _Row, name: str) -> _Row:
    """Refresh now, at most once in 30 seconds for each connection."""
    caller = _allowed(Action.CONNECTION_MANAGE, name)
    force_refresh(services().store.named(name), actor=caller.actor)
    return _shown(services().store.named(name), _app_names())


@blueprint.on("POST", "/v1/connections/<name:name>/disable")
@blueprint.query(NoQuery)
@blueprint.answers(200, OneConnection)
@blueprint.errors(400, 401, 403, 404, 409, 429, 503)
def disable_connection(query: _Row, name: str) -> _Row:
    """Hand out nothing and refresh nothing until it is enabled again."""
    return _switched(name, services().revoker.disable)


@blueprint.on("POST", "/v1/connections/<name:name>/enable")
@blueprint.query(NoQuery)
@blueprint.answers(200, OneConnection)
@blueprint.errors(400, 401, 403, 404, 409, 429, 503)
def enable_connection(query: _Row, name: str) -> _Row:
    """Undo disable."""
    return _switched(name, services().revoker.enable)


@blueprint.on("DELETE", "/v1/connections/<name:name>")
@blueprint.query(DisconnectQuery)
@blueprint.answers(202, OneConnection)
@blueprint.errors(400, 401, 403, 404, 429, 503)
def disconnect(query: _Row, name: str) -> _Row:
    """Stop handing out at once; the grant is given back at the provider and destroyed in the background."""
    caller = _allowed(Action.CONNECTION_MANAGE, name)
    gone = services().revoker.disconnect(name, uninstall=query["uninstall"], actor=caller.actor)
    return _shown(gone, _app_names())


def force_refresh(connection: Connection, *, actor: str) -> None:
    """Have it refreshed whatever its token's life, on record as wanted by `actor`.

    Raises what a caller is told when that is not possible now.
    """
    ours = services()
    with _place():
        if not ours.store.claim_forced(connection.id, every=FORCED_EVERY):
            raise RefreshInProgress(
                f"A refresh was forced less than {FORCED_EVERY:.0f} seconds ago.", retry_after=FORCED_EVERY
            )
        try:
            ending = ours.refresher.ask(connection).result(DEFAULT_MAX_WAIT)
        except FutureTimeout:
            raise RefreshInProgress from None
    detail = {"generation": connection.generation}
    ours.access.record(
        actor, Event.REFRESH_ENDED, target=connection.name, outcome=ending.kind.value, detail=detail
    )
    if ending.error is not None:
        raise copy.copy(ending.error)
    if ending.kind is EndingKind.BUSY:
        raise RefreshInProgress


@contextmanager
def _place() -> Iterator[None]:
    places: BoundedSemaphore = current_app.extensions[FORCED_PLACES]
    if not places.acquire(blocking=False):
        raise RefreshInProgress("Too many forced refreshes are under way.")
    try:
        yield
    finally:
        places.release()


def _allowed(action: Action, name: str) -> Caller:
    caller: Caller = g.caller
    services().access.require(caller, action, name)
    return caller


def _switched(name: str, switch: Callable[..., Connection]) -> _Row:
    caller = _allowed(Action.CONNECTION_MANAGE, name)
    return _shown(switch(name, actor=caller.actor), _app_names())


def _readable(caller: Caller, *, after: str, limit: int) -> tuple[list[Connection], str | None]:
    """The next connections the caller may see, and where to go on; looks at a bounded number of rows."""
    ours = services()
    found: list[Connection] = []
    for _ in range(_LOOKS):
        rows = ours.store.page(after=after, limit=_PER_LOOK)
        for row in rows:
            if ours.access.allows(caller, Action.CONNECTION_READ, row.name):
                if len(found) == limit:
                    return found, found[-1].name
                found.append(row)
            after = row.name
        if len(rows) < _PER_LOOK:
            return found, None
    return found, after


def _app_names() -> dict[str, str]:
    return {app.id: app.reference for app in services().apps.list()}


_SHOWN: Final = (
    "name",
    "provider",
    "account_id",
    "user_id",
    "grant_type",
    "state",
    "generation",
    "expires_at",
    "scopes_wanted",
    "scopes_granted",
    "instance_url",
    "connected_at",
    "last_refresh_at",
    "last_used_at",
    "last_error",
    "last_error_at",
    "retry_at",
)


def _shown(connection: Connection, app_names: Mapping[str, str]) -> _Row:
    return _row(connection, app_names, services().examiner.vitals([connection])[connection.id])


def _row(connection: Connection, app_names: Mapping[str, str], told: Vitals) -> _Row:
    row: _Row = {name: getattr(connection, name) for name in _SHOWN}
    return row | {"app": app_names.get(connection.app_id)} | asdict(told)
