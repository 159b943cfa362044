"""A connection's states and what moves it from one to the next: pure, no clock, no database.

Two columns, two writers. An admin moves `admin_state`; the outcome of a refresh moves `health`.

    admin_state                     enabled ◄──────► disabled
                                       │                │
                                       └─► disconnecting ◄┘ ──► (row gone)        install: disconnecting ─► enabled

    health
                      ┌──────────────── granted, installed (from anywhere) ───────────────┐
                      ▼                                                                    │
        ┌──────── healthy ───────────────────────────────┐                                 │
        │            │                                    │                                │
        │ not sent,  │ refused for the first time         │ unknown, and the refresh       │
        │ unavailable│ on this generation                 │ token may rotate               │
        │ …          ▼                                    ▼                                │
        ├──► retrying ◄──► doubtful                   uncertain ── waits until the access token is dead,
        │                     │                           │        then presents the refresh token once more
        │                     │ refused again, a lease     │ refused
        │                     │ apart, and not with a crowd│ (`lost_answer`)
        │                     ▼                           ▼
        │                  needs_reconnect ◄──────────────┘ ───────────────────────────────┘
        └── stays retrying

A `needs_reconnect` connection still hands out while its access token lives (P2); nothing of ours refreshes it any more.
An outage, a rate limit or a refused client registration never leads to `needs_reconnect` (P9).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NewType

from app.oauth2.outcomes import Granted, Misconfigured, NotSent, Outcome, Refused, Unavailable, Unknown
from app.secret import Secret

__all__ = [
    "LOST_ANSWER",
    "AdminState",
    "AppTrouble",
    "Connection",
    "ConnectionId",
    "Crowd",
    "Health",
    "Rhythm",
    "Rotation",
    "Settled",
    "Tokens",
    "may_refresh",
    "settle",
]

ConnectionId = NewType("ConnectionId", str)

# Back-off after the nth failure in a row: 1, 2, 4 … seconds, at most this many.
_LONGEST_BACKOFF: Final = 60.0
# A crowd: so many connections, and such a share of the app's, refused within ten minutes point at the provider.
_CROWD_COUNT: Final = 3
_CROWD_SHARE: Final = 0.20
_CROWD_PATIENCE: Final = timedelta(hours=1)
# Salesforce lets a refresh token die after 30 idle days (set by the app's "idle refresh token" policy); 20 leaves room.
_KEEP_ALIVE: Final = timedelta(days=20)
# Found out by ourselves, so nothing is gained by asking twice.
_CERTAIN: Final = frozenset({"no_refresh_token", "account_changed"})
# Why a connection is lost whose newest refresh token was in an answer that never came.
LOST_ANSWER: Final = "lost_answer"
_ASKED_LATELY: Final = timedelta(hours=24)


class AdminState(StrEnum):
    """What an admin wants of the connection."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    DISCONNECTING = "disconnecting"


class Health(StrEnum):
    """What the last refreshes say of the connection."""

    HEALTHY = "healthy"
    RETRYING = "retrying"
    DOUBTFUL = "doubtful"
    UNCERTAIN = "uncertain"
    NEEDS_RECONNECT = "needs_reconnect"


class Rotation(StrEnum):
    """Whether the provider replaces the refresh token at each refresh."""

    UNKNOWN = "unknown"
    SEEN = "seen"
    NOT_SEEN = "not_seen"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is sealed in a connection's row; `private_key` (PEM) only for the JWT bearer grant."""

    access_token: Secret | None = None
    refresh_token: Secret | None = None
    subject: str | None = None
    private_key: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One row without its tokens; `generation` counts every change of the stored tokens and fences every write."""

    id: ConnectionId
    name: str
    provider: str
    app_id: str
    grant_type: str
    account_id: str
    user_id: str
    identity: str
    admin_state: AdminState = AdminState.ENABLED
    health: Health = Health.HEALTHY
    generation: int = 0
    obtained_at: datetime | None = None
    expires_at: datetime | None = None
    life_seconds: float | None = None
    life_known: bool = False
    rotation: Rotation = Rotation.UNKNOWN
    scopes_wanted: tuple[str, ...] = ()
    scopes_granted: tuple[str, ...] = ()
    instance_url: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    lease_until: datetime | None = None
    open_attempt: str | None = None
    last_try: bool = False
    refused_generation: int | None = None
    refused_at: datetime | None = None
    refused_code: str | None = None
    failures: int = 0
    retry_at: datetime | None = None
    refresh_at: datetime | None = None
    forced_at: datetime | None = None
    last_refresh_at: datetime | None = None
    last_used_at: datetime | None = None
    last_error: str | None = None
    last_error_at: datetime | None = None
    revoke_since: datetime | None = None
    exported_at: datetime | None = None
    created_at: datetime | None = None
    connected_at: datetime | None = None

    @property
    def state(self) -> str:
        """The one word an admin sees: the admin state unless it is enabled, else the health."""
        return self.health.value if self.admin_state is AdminState.ENABLED else self.admin_state.value

    @property
    def may_rotate(self) -> bool:
        """Whether presenting the stored refresh token twice could cost the family: unknown counts as yes."""
        return self.grant_type == "authorization_code" and self.rotation is not Rotation.NOT_SEEN

    def alive(self, now: datetime) -> bool:
        """Whether the stored access token still lives."""
        return self.expires_at is not None and self.expires_at > now


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """The durations a transition needs: `lease` and the refresh window `ahead` in seconds; `assumed_life` of a token
    whose provider names none; `jitter` in [0, 1) spreads the refreshes of connections that were made together."""

    lease: float
    ahead: float
    assumed_life: float
    jitter: float = 0.0

    def window(self, life: float) -> float:
        """How many seconds before expiry a token counts as stale: min(ahead, life/3)."""
        return min(self.ahead, life / 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """How many of an app's connections were refused within ten minutes, and since when that holds verdicts back."""

    refused: int = 1
    total: int = 1
    held_since: datetime | None = None
    spent: bool = False  # a hold ended because one of them was refreshed: verdicts count again

    @property
    def crowded(self) -> bool:
        """Whether they are so many that it is hardly the fault of each."""
        return self.refused >= _CROWD_COUNT and self.refused >= _CROWD_SHARE * self.total

    def holds(self, now: datetime) -> bool:
        """Whether so many were refused together that the provider is the likelier culprit."""
        if self.spent:
            return False
        if self.held_since is not None:
            return now - self.held_since < _CROWD_PATIENCE
        return self.crowded


class AppTrouble(StrEnum):
    """What an outcome says of the app and its provider rather than of the connection."""

    NONE = "none"
    DOWN = "down"
    MISCONFIGURED = "misconfigured"
    CROWD = "crowd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The connection after an outcome, the tokens to seal with it (only after a grant), and what others must learn."""

    connection: Connection
    tokens: Tokens | None = None
    trouble: AppTrouble = AppTrouble.NONE
    lost: bool = False  # became needs_reconnect just now
    rotated: bool = False


def may_refresh(connection: Connection, now: datetime) -> bool:
    """Whether the refresh token may be presented now, as far as the row can tell.

    An attempt that was begun and not closed may have reached the provider. Where the token may rotate, presenting it
    again could revoke the family with the living access token, so it waits until that is dead (P1).
    """
    if connection.admin_state is not AdminState.ENABLED or connection.exported_at is not None:
        return False
    if connection.health is Health.NEEDS_RECONNECT:
        return False
    if connection.lease_until is not None and connection.lease_until > now:
        return False
    unclear = connection.open_attempt is not None or connection.health is Health.UNCERTAIN
    return not (unclear and connection.may_rotate and connection.alive(now))


def settle(
    connection: Connection, outcome: Outcome, *, now: datetime, rhythm: Rhythm, tokens: Tokens, crowd: Crowd
) -> Settled:
    """What a refresh's outcome makes of the connection; `tokens` are those the refresh was made with."""
    freed = replace(connection, lease_until=None, open_attempt=None)
    match outcome:
        case Granted():
            return _granted(freed, outcome, now=now, rhythm=rhythm, tokens=tokens)
        case Refused(code=code):
            return _refused(freed, code, now=now, rhythm=rhythm, crowd=crowd)
        case NotSent(code=code):
            return Settled(connection=_failed(freed, f"not_sent:{code}", now=now), trouble=AppTrouble.DOWN)
        case Unavailable():
            return _unavailable(freed, outcome, now=now, rhythm=rhythm, crowd=crowd)
        case Misconfigured(code=code):
            trouble = AppTrouble.MISCONFIGURED if outcome.whole_app else AppTrouble.NONE
            return Settled(connection=_failed(freed, f"misconfigured:{code}", now=now), trouble=trouble)
        case Unknown(code=code):
            return _unknown(freed, code, now=now, rhythm=rhythm)


def _granted(
    connection: Connection, granted: Granted, *, now: datetime, rhythm: Rhythm, tokens: Tokens
) -> Settled:
    new = granted.refresh_token
    rotated = new is not None and tokens.refresh_token is not None and new != tokens.refresh_token
    life = granted.expires_in or connection.life_seconds or rhythm.assumed_life
    expires_at = granted.sent_at + timedelta(seconds=life)
    fresh = replace(
        connection,
        health=Health.HEALTHY,
        generation=connection.generation + 1,
        obtained_at=granted.sent_at,
        expires_at=expires_at,
        life_seconds=life,
        life_known=granted.expires_in is not None or connection.life_known,
        rotation=_rotation(connection, rotated=rotated),
        scopes_granted=granted.scopes if granted.scopes is not None else connection.scopes_granted,
        last_try=False,
        refused_generation=None,
        refused_at=None,
        refused_code=None,
        failures=0,
        retry_at=None,
        last_refresh_at=now,
        last_error=None,
        last_error_at=None,
    )
    kept = replace(tokens, access_token=granted.access_token, refresh_token=new or tokens.refresh_token)
    return Settled(
        connection=replace(fresh, refresh_at=next_look(fresh, now=now, rhythm=rhythm)),
        tokens=kept,
        rotated=rotated,
    )


def _rotation(connection: Connection, *, rotated: bool) -> Rotation:
    if rotated:
        return Rotation.SEEN
    # Once seen it stays seen: taking a rotating provider for one that is not would spend a token twice.
    return Rotation.NOT_SEEN if connection.rotation is Rotation.UNKNOWN else connection.rotation


def next_look(connection: Connection, *, now: datetime, rhythm: Rhythm) -> datetime | None:
    """When the worker should look at a healthy connection again.

    Somewhat before the window opens, spread by the jitter; a connection nobody asked for in 24 h is only kept alive.
    """
    if connection.expires_at is None or connection.life_seconds is None:
        return now
    asked = connection.last_used_at or connection.connected_at or connection.created_at
    if asked is not None and now - asked > _ASKED_LATELY:
        if connection.grant_type != "authorization_code":
            return None
        return now + _KEEP_ALIVE * (1 - 0.1 * rhythm.jitter)
    window = rhythm.window(connection.life_seconds)
    return connection.expires_at - timedelta(seconds=window * (1 + 0.5 * rhythm.jitter))


def _failed(
    connection: Connection, error: str, *, now: datetime, at_least: float | None = None
) -> Connection:
    failures = connection.failures + 1
    wait = max(min(2.0 ** min(failures - 1, 10), _LONGEST_BACKOFF), at_least or 0.0)
    retry_at = now + timedelta(seconds=wait)
    health = (
        connection.health if connection.health in (Health.DOUBTFUL, Health.UNCERTAIN) else Health.RETRYING
    )
    return replace(
        connection,
        health=health,
        failures=failures,
        retry_at=retry_at,
        refresh_at=retry_at,
        last_error=error,
        last_error_at=now,
    )


def _unavailable(
    connection: Connection, outcome: Unavailable, *, now: datetime, rhythm: Rhythm, crowd: Crowd
) -> Settled:
    error = f"{'rate_limited' if outcome.rate_limited else 'unavailable'}:{outcome.code}"
    if outcome.then is not None and connection.last_error == error:
        # This answer excuses itself once; every other outcome overwrites `last_error`, a grant clears it.
        return _refused(connection, outcome.then.code, now=now, rhythm=rhythm, crowd=crowd)
    held = _failed(connection, error, now=now, at_least=outcome.retry_after)
    # "Already being processed" and its like concern one grant, not the provider.
    of_the_app = outcome.whole_app and outcome.then is None
    return Settled(connection=held, trouble=AppTrouble.DOWN if of_the_app else AppTrouble.NONE)


def _unknown(connection: Connection, code: str, *, now: datetime, rhythm: Rhythm) -> Settled:
    after = _failed(connection, f"unknown:{code}", now=now)
    if not connection.may_rotate:
        return Settled(connection=after, trouble=AppTrouble.DOWN)
    # The answer may have held the only good refresh token. The access token is kept in use for as long as it lives. Even a
    # dead one is waited out for a lease: the provider may still be at work on the request we gave up on, and the last try
    # must not meet it there.
    worked_off = now + timedelta(seconds=rhythm.lease)
    wait = max(filter(None, (after.retry_at, connection.expires_at, worked_off)))
    after = replace(after, health=Health.UNCERTAIN, last_try=True, retry_at=wait, refresh_at=wait)
    return Settled(connection=after, trouble=AppTrouble.DOWN)


def _refused(connection: Connection, code: str, *, now: datetime, rhythm: Rhythm, crowd: Crowd) -> Settled:
    if code in _CERTAIN:
        return Settled(connection=_lost(connection, f"refused:{code}", now=now), lost=True)
    again = timedelta(seconds=rhythm.lease)
    seen = connection.refused_generation == connection.generation and connection.refused_at is not None
    if (
        connection.last_try and not seen
    ):  # refused before, the grant was dead already when the answer was lost
        return Settled(connection=_lost(connection, LOST_ANSWER, now=now), lost=True)
    first = connection.refused_at if seen else now
    doubtful = replace(
        connection,
        health=Health.DOUBTFUL,
        refused_generation=connection.generation,
        refused_at=first,
        refused_code=code,
        failures=connection.failures + 1,
        retry_at=now + again,
        refresh_at=now + again,
        last_error=f"refused:{code}",
        last_error_at=now,
    )
    if not seen or first is None or now - first < again:
        return Settled(connection=doubtful)
    if crowd.holds(now):
        return Settled(connection=doubtful, trouble=AppTrouble.CROWD)
    return Settled(connection=_lost(doubtful, f"refused:{code}", now=now), lost=True)


def _lost(connection: Connection, error: str, *, now: datetime) -> Connection:
    return replace(
        connection,
        health=Health.NEEDS_RECONNECT,
        last_try=False,
        retry_at=None,
        refresh_at=None,
        last_error=error,
        last_error_at=now,
    )
