"""What is the matter with a connection: whose fault it is, what stands behind it, who mends it and how.

Pure: what is known goes in as `Facts` (`examination` collects them), a `Diagnosis` comes out, for every state and error
there is. The order of questions is the order in which things stop a refresh:

    taken away here? ─► held here (copied database, keys)? ─► refused or lost? ─► the app's trouble? ─► its own last error?
      ─► anything of ours that will bite soon? ─► healthy

One answer of a provider often has several causes. They are ranked by evidence we hold; one that the evidence rules out is
not named, one that it supports comes first, and between equals the vendor's own order decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from app.broker.connection import LOST_ANSWER, AdminState, Connection, ConnectionId, Crowd, Health, Rotation
from app.broker.findings import FindingKind
from app.oauth2.causes import FAULTS, Cause, Fault, Remedy
from app.oauth2.provider import Provider

__all__ = [
    "CONDITIONS",
    "AppFacts",
    "Condition",
    "Diagnosis",
    "Facts",
    "HouseFacts",
    "Possibility",
    "Reason",
    "Try",
    "Vitals",
    "approvals_of",
    "diagnose",
    "diagnose_finding",
    "vitals",
]

_RULED_OUT: Final = -3
_BUSY_TOO_OFTEN: Final = 3
_OVERDUE: Final = timedelta(minutes=2)
_DAY: Final = 86_400.0
_OPERATOR: Final = "the operator of this installation"
# Findings that stop every connection of the app; the others concern those that failed alone.
_STOPS_ALL: Final = frozenset({FindingKind.APP_MISCONFIGURED, FindingKind.PROVIDER_DOWN})


class Condition(StrEnum):
    """What may be the matter on our side, whatever the provider says."""

    HEALTHY = "healthy"
    REFRESHING = "refreshing"
    UNTRIED = "untried"
    DISABLED = "disabled"
    DISCONNECTING = "disconnecting"
    EXPORTED = "exported"
    ADOPTION_NEEDED = "adoption_needed"
    KEYRING_LACKS_KEY = "keyring_lacks_key"
    CLIENT_UNDEFINED = "client_undefined"
    DISK_FULL = "disk_full"
    HOLDER_DIED = "holder_died"
    NO_WORKER = "no_worker"
    REVOKE_GAVE_UP = "revoke_gave_up"


Reason = Cause | Condition

CONDITIONS: Final[Mapping[Condition, tuple[Fault, Remedy]]] = MappingProxyType(
    {
        Condition.HEALTHY: (Fault.NONE, Remedy("All is well.", "nobody", "Nothing needs doing.")),
        Condition.REFRESHING: (
            Fault.NONE,
            Remedy("It is being refreshed right now.", "nobody", "Nothing needs doing."),
        ),
        Condition.UNTRIED: (
            Fault.NONE,
            Remedy(
                "Nothing is known against it; it was not refreshed here yet.",
                "nobody",
                "`drawbridge connection refresh` tries it at once.",
            ),
        ),
        Condition.DISABLED: (
            Fault.OWN,
            Remedy(
                "An admin has switched the connection off here.",
                "you, in Drawbridge",
                "If it is wanted again: `drawbridge connection enable`.",
            ),
        ),
        Condition.DISCONNECTING: (
            Fault.OWN,
            Remedy(
                "It is being disconnected; the grant is given back at the provider, tried for a day.",
                "nobody: it ends by itself",
                "Keep a worker running; to keep the account, connect it again.",
            ),
        ),
        Condition.EXPORTED: (
            Fault.OWN,
            Remedy(
                "It was moved to another installation and is never refreshed here again.",
                "you, in Drawbridge",
                "Use it there; here it can be disconnected, or the account connected anew.",
            ),
        ),
        Condition.ADOPTION_NEEDED: (
            Fault.OWN,
            Remedy(
                "The database looks like a copy or a restored backup, so nothing is refreshed from it.",
                _OPERATOR,
                "If no other installation uses this data any more: `drawbridge adopt`.",
            ),
        ),
        Condition.KEYRING_LACKS_KEY: (
            Fault.OWN,
            Remedy(
                "A keyring lacks the key that opens this connection's tokens, or the one new ones are sealed with.",
                _OPERATOR,
                "Give every host named below the whole keyring; nothing is lost while the key exists somewhere.",
            ),
        ),
        Condition.CLIENT_UNDEFINED: (
            Fault.APP,
            Remedy(
                "The settings no longer define the OAuth client this connection goes through.",
                "you, in Drawbridge's app settings",
                "Set the …_CLIENT_ID and …_CLIENT_SECRET of its provider again on every host.",
            ),
        ),
        Condition.DISK_FULL: (
            Fault.OWN,
            Remedy(
                "Nothing can be written in STATE_DIR: answers of providers cannot be journaled there.",
                _OPERATOR,
                "Make room on that disk, or correct the rights of the directory, before a refresh token rotates.",
            ),
        ),
        Condition.HOLDER_DIED: (
            Fault.OWN,
            Remedy(
                "A process of ours ended in the middle of a refresh; if the answer had come, it lies in its journal.",
                _OPERATOR,
                "Start Drawbridge on the host named below with the same STATE_DIR: it brings the answer in. If that "
                "journal is gone and the connection needs to be reconnected, connect the account again.",
            ),
        ),
        Condition.NO_WORKER: (
            Fault.OWN,
            Remedy(
                "No worker is alive, so nothing is refreshed ahead of time.",
                _OPERATOR,
                "Start one: `drawbridge worker`, or `drawbridge up`.",
            ),
        ),
        Condition.REVOKE_GAVE_UP: (
            Fault.OUTAGE,
            Remedy(
                "A disconnected account's grant could not be given back; its tokens are destroyed here.",
                "{admin}",
                "Remove the app by hand in the account at {title}.",
            ),
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One attempt on the connection's tokens as it is on record; `ended` is None while none has been noted."""

    began: datetime
    ended: datetime | None
    generation: int
    host: str
    process: str
    journal: str
    outcome: str | None
    code: str | None

    @property
    def place(self) -> str:
        """Where it was made and where its answer may lie."""
        return f"host {self.host}, process {self.process}, journal {self.journal}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppFacts:
    """What is known of the app: an open finding on all of it, and how its other connections fare.

    `alike` counts those, this one included, that failed in the same way within ten minutes, of `total` enabled ones.
    """

    defined: bool = True
    finding: FindingKind | None = None
    finding_error: str | None = None
    alike: int = 1
    total: int = 1
    granted_since: bool = False  # another of them was refreshed since this one failed

    @property
    def crowded(self) -> bool:
        """Whether so many fail alike that it is hardly the fault of each."""
        return Crowd(refused=self.alike, total=self.total).crowded


@dataclass(frozen=True, slots=True, kw_only=True)
class HouseFacts:
    """What is known of this installation. Hosts are named as the processes call them.

    `elsewhere_failed` and `elsewhere_answered` count the requests to *other* providers of the last ten minutes;
    `reached_from` names hosts that had an answer of this app's provider meanwhile.
    """

    held: str | None = None  # why nothing may be refreshed, one sentence
    keyless: tuple[str, ...] = ()  # hosts whose keyring lacks what this connection needs
    disk: str | None = None  # what STATE_DIR of this host answered when it was written to
    skewed: tuple[tuple[str, float], ...] = ()  # host and seconds beside the database's clock
    worker: bool = True
    elsewhere_failed: int = 0
    elsewhere_answered: int = 0
    reached_from: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All there is to judge by; `tries` are the newest first, `approvals` None where none are counted."""

    connection: Connection
    vendor: Provider
    now: datetime
    tries: tuple[Try, ...] = ()
    approvals: int | None = None
    app: AppFacts = field(default_factory=AppFacts)
    house: HouseFacts = field(default_factory=HouseFacts)

    @property
    def unanswered(self) -> Try | None:
        """The newest attempt on the present tokens that may have been carried out and was never answered."""
        return next((each for each in self.tries if self._unanswered(each)), None)

    def _unanswered(self, each: Try) -> bool:
        if each.generation != self.connection.generation:
            return False
        return each.outcome == "unknown" or (each.ended is None and not self.under_way)

    @property
    def under_way(self) -> bool:
        """Whether somebody holds the lease right now."""
        lease = self.connection.lease_until
        return self.connection.open_attempt is not None and lease is not None and lease > self.now

    @property
    def failed_at(self) -> datetime:
        """When it was first refused on these tokens, else when it last failed."""
        return self.connection.refused_at or self.connection.last_error_at or self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Possibility:
    """One thing that may be the matter, and what speaks for it."""

    fault: Fault
    cause: str
    sentence: str
    who: str
    how: str
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis(Possibility):
    """The likeliest of them, `code` being what it was judged by; `others` are the rest, the likeliest first."""

    code: str
    others: tuple[Possibility, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return self.fault is Fault.NONE


def diagnose(facts: Facts) -> Diagnosis:
    """What is the matter, whatever the facts are; never raises."""
    for question in (_taken_away, _held_here, _ended, _of_the_app, _failing, _about_to_fail):
        found = question(facts)
        if found is not None:
            return found
    return _well(facts)


def diagnose_finding(
    vendor: Provider, kind: FindingKind | None, error: str, *, now: datetime, house: HouseFacts | None = None
) -> Diagnosis:
    """What a finding means by its kind and the error it was opened for, without looking at any connection."""
    app = AppFacts(finding=kind)
    facts = Facts(connection=_NOBODY, vendor=vendor, now=now, app=app, house=house or HouseFacts())
    if kind is FindingKind.REVOKE_GAVE_UP:
        return _certain(facts, Condition.REVOKE_GAVE_UP)
    return _by_reasons(facts, _reasons_of_app(vendor, kind, error), error)


# The questions, in the order of `diagnose`


def _taken_away(facts: Facts) -> Diagnosis | None:
    connection = facts.connection
    if connection.admin_state is AdminState.DISCONNECTING:
        failed = connection.last_error == "revoke_failed"
        tail = ("Giving the grant back has failed so far.",) if failed else ()
        return _certain(facts, Condition.DISCONNECTING, evidence=tail)
    if connection.exported_at is not None:
        return _certain(facts, Condition.EXPORTED, evidence=(f"Moved at {_at(connection.exported_at)}.",))
    if connection.admin_state is AdminState.DISABLED:
        return _certain(facts, Condition.DISABLED)
    return None


def _held_here(facts: Facts) -> Diagnosis | None:
    house = facts.house
    if house.keyless:
        hosts = ", ".join(house.keyless)
        return _certain(facts, Condition.KEYRING_LACKS_KEY, evidence=(f"It is missing on: {hosts}.",))
    if house.held is not None:
        return _certain(facts, Condition.ADOPTION_NEEDED, evidence=(house.held,))
    if not facts.app.defined:
        return _certain(facts, Condition.CLIENT_UNDEFINED)
    return None


def _ended(facts: Facts) -> Diagnosis | None:
    """Refused, for good or at first sight, or waiting for its one last try."""
    match facts.connection.health:
        case Health.NEEDS_RECONNECT | Health.DOUBTFUL:
            error = facts.connection.last_error or "refused:invalid_grant"
            return _by_reasons(facts, _reasons_of_refusal(facts, error), error)
        case Health.UNCERTAIN:
            return _unclear(facts)
    return _unclear(facts) if _left_open(facts) else None


def _of_the_app(facts: Facts) -> Diagnosis | None:
    """What stops the whole app stops this connection, too, even before it was tried; its own fault goes first."""
    app, own = facts.app, facts.connection.last_error
    if app.finding not in _STOPS_ALL:
        return None
    if own and FAULTS[facts.vendor.causes_of(own)[0]] is Fault.CONNECTION:
        return None
    error = app.finding_error or own or ""
    return _by_reasons(facts, _reasons_of_app(facts.vendor, app.finding, error), error)


def _failing(facts: Facts) -> Diagnosis | None:
    error = facts.connection.last_error
    if not error:
        return None
    return _by_reasons(facts, facts.vendor.causes_of(error), error)


def _about_to_fail(facts: Facts) -> Diagnosis | None:
    """Healthy, but something of ours will bite before long."""
    house, connection = facts.house, facts.connection
    if house.disk is not None:
        return _certain(facts, Condition.DISK_FULL, evidence=(f"Writing there: {house.disk}.",))
    if house.skewed:
        return _certain(facts, Cause.CLOCK_WRONG, evidence=_skews(facts))
    due = connection.refresh_at
    if not house.worker and due is not None and facts.now - due > _OVERDUE:
        return _certain(
            facts, Condition.NO_WORKER, evidence=(f"It should have been refreshed at {_at(due)}.",)
        )
    return None


def _well(facts: Facts) -> Diagnosis:
    if facts.under_way:
        return _certain(facts, Condition.REFRESHING)
    tried = facts.connection.last_refresh_at is not None
    return _certain(facts, Condition.HEALTHY if tried else Condition.UNTRIED)


# Which reasons come into question


def _reasons_of_refusal(facts: Facts, error: str) -> tuple[Reason, ...]:
    if facts.app.finding is FindingKind.MASS_REFUSAL and facts.connection.health is Health.DOUBTFUL:
        return _REFUSED_TOGETHER
    reasons: tuple[Reason, ...] = facts.vendor.causes_of(error)
    if error == LOST_ANSWER:
        refusal = next((each.code for each in facts.tries if each.outcome == "refused"), None)
        behind = () if refusal is None else facts.vendor.causes_of(f"refused:{refusal}")
        reasons = tuple(dict.fromkeys((Condition.HOLDER_DIED, *reasons, *behind)))
    return reasons


def _reasons_of_app(vendor: Provider, kind: FindingKind | None, error: str) -> tuple[Reason, ...]:
    return _REFUSED_TOGETHER if kind is FindingKind.MASS_REFUSAL else vendor.causes_of(error)


def _left_open(facts: Facts) -> bool:
    """Whether an attempt was begun and never ended, on tokens that may rotate."""
    connection = facts.connection
    return connection.open_attempt is not None and not facts.under_way and connection.may_rotate


def _unclear(facts: Facts) -> Diagnosis:
    """An answer is missing; the tokens wait for their one last try."""
    error = facts.connection.last_error or "unknown:holder_died"
    if _died(facts.unanswered):
        return _by_reasons(facts, (Condition.HOLDER_DIED, Cause.LOST_ANSWER), error)
    causes = tuple(cause for cause in facts.vendor.causes_of(error) if cause is not Cause.LOST_ANSWER)
    judged, (_, said) = _by_reasons(facts, causes or (Cause.ANSWER_MISSING,), error), _lost(facts)
    later = _possibility(facts, Cause.LOST_ANSWER, said)
    return replace(judged, evidence=(*said, *judged.evidence), others=(*judged.others, later))


# Ranking


def _by_reasons(facts: Facts, reasons: tuple[Reason, ...], error: str) -> Diagnosis:
    weighed = [(*_weigh(facts, reason), reason) for reason in reasons]
    left = [each for each in weighed if each[0] > _RULED_OUT] or weighed[:1]
    left.sort(key=lambda each: -each[0])  # stable: between equals the vendor's order
    (weight, evidence, first), rest = left[0], left[1:]
    others = tuple(_possibility(facts, reason, said) for _, said, reason in rest)
    sure = not rest or weight - rest[0][0] >= 2
    return _diagnosis(facts, first, evidence=evidence, code=error, others=others, sure=sure)


def _weigh(facts: Facts, reason: Reason) -> tuple[int, tuple[str, ...]]:
    rule = _RULES.get(reason)
    return (0, ()) if rule is None else rule(facts)


def _lost(facts: Facts) -> tuple[int, tuple[str, ...]]:
    attempt, connection = facts.unanswered, facts.connection
    if attempt is not None:
        said = f"The attempt of {_at(attempt.began)} was never answered ({attempt.place})."
        if connection.rotation is Rotation.NOT_SEEN:
            return -2, (said, "So far the refresh token did not rotate, so that a lost answer costs nothing.")
        return 3, (said,)
    if connection.last_error == LOST_ANSWER:
        return 3, ("Which attempt that was is not on record.",)
    return (_RULED_OUT if facts.tries else -2), ()


def _died(attempt: Try | None) -> bool:
    return attempt is not None and (attempt.ended is None or attempt.code == "holder_died")


def _holder(facts: Facts) -> tuple[int, tuple[str, ...]]:
    attempt = facts.unanswered
    if attempt is None or not _died(attempt):
        return _RULED_OUT, ()
    return 4, (f"The attempt of {_at(attempt.began)} was never ended ({attempt.place}).",)


def _idle(facts: Facts) -> tuple[int, tuple[str, ...]]:
    limit, used = facts.vendor.idle_days, facts.connection.last_refresh_at
    if limit is None:
        return _RULED_OUT, ()
    if used is None:
        return 0, ("When the refresh token was last used is not known here.",)
    idle = (facts.failed_at - used).total_seconds() / _DAY
    if idle < limit:
        return _RULED_OUT, ()
    return 3, (f"It was last refreshed {idle:.0f} days before it was refused; {limit:.0f} are allowed.",)


def _approvals(facts: Facts) -> tuple[int, tuple[str, ...]]:
    limit, known = facts.vendor.approvals_limit, facts.approvals
    if limit is None:
        return _RULED_OUT, ()
    if known is None:
        return 0, ("How often this user has approved the app is not known here.",)
    said = f"{known} of at most {limit} approvals of this user are known here; those made elsewhere are not."
    return (2 if known >= limit else 1 if known == limit - 1 else 0), (said,)


def _policy(facts: Facts) -> tuple[int, tuple[str, ...]]:
    connection = facts.connection
    if connection.connected_at is None or connection.last_refresh_at != connection.connected_at:
        return 0, ()
    return 2, ("Not one refresh has succeeded since the account was connected.",)


def _elsewhere(facts: Facts) -> tuple[int, tuple[str, ...]]:
    connection = facts.connection
    busy = sum(each.code in _BUSY_CODES for each in facts.tries if each.generation == connection.generation)
    if busy >= _BUSY_TOO_OFTEN:
        return 2, (f"{busy} attempts on these tokens met another request with the same token.",)
    if connection.rotation is Rotation.NOT_SEEN:
        return _RULED_OUT, ()
    seen = connection.rotation is Rotation.SEEN
    return -1, ("The refresh token rotates here: presenting an old one revokes the family.",) if seen else ()


def _moved(facts: Facts) -> tuple[int, tuple[str, ...]]:
    moving = next((each for each in facts.tries if each.code in _MOVING_CODES), None)
    if moving is None:
        return 0, ()
    return 2, (f"At {_at(moving.began)} {facts.vendor.title} said that the account was moving.",)


def _all_revoked(facts: Facts) -> tuple[int, tuple[str, ...]]:
    app = facts.app
    if app.granted_since:
        return _RULED_OUT, ()
    if not app.crowded:
        return -2, ()
    return 1, (f"{app.alike} of the app's {app.total} connections were refused within ten minutes.",)


def _together(facts: Facts) -> tuple[int, tuple[str, ...]]:
    _, said = _all_revoked(facts)
    return 2, said


def _of_many(facts: Facts) -> tuple[int, tuple[str, ...]]:
    app = facts.app
    if facts.connection is _NOBODY and app.finding is FindingKind.MASS_FAILURE:
        return 2, (
            "So many of the app's connections fail in the same way that it is hardly the fault of each.",
        )
    if not app.crowded:
        return _RULED_OUT, ()
    return 2, (f"{app.alike} of the app's {app.total} connections fail in the same way.",)


def _blocked(facts: Facts) -> tuple[int, tuple[str, ...]]:
    house = facts.house
    here = (f"The last attempt was made on host {facts.tries[0].host}.",) if facts.tries else ()
    if house.reached_from:
        return 3, (f"Meanwhile {facts.vendor.title} answered to: {', '.join(house.reached_from)}.", *here)
    if house.elsewhere_answered:
        return -1, here
    if house.elsewhere_failed:
        missed = f"Other providers are not reached either: {house.elsewhere_failed} requests in ten minutes."
        return 3, (missed, *here)
    return 0, here


def _unreachable(facts: Facts) -> tuple[int, tuple[str, ...]]:
    house = facts.house
    if house.elsewhere_answered and not house.reached_from:
        return 2, (f"Other providers answered {house.elsewhere_answered} requests in the last ten minutes.",)
    return 0, ()


def _clock(facts: Facts) -> tuple[int, tuple[str, ...]]:
    return (3, _skews(facts)) if facts.house.skewed else (_RULED_OUT, ())


_REFUSED_TOGETHER: Final = (Cause.MASS_REFUSAL, Cause.APP_TOKENS_REVOKED)
_NOBODY: Final = Connection(
    id=ConnectionId(""),
    name="",
    provider="",
    app_id="",
    grant_type="",
    account_id="",
    user_id="",
    identity="",
)
_BUSY_CODES: Final = frozenset({"busy", "expired_authorization_code"})
_MOVING_CODES: Final = frozenset({"migrating", "wrong_hublet"})
_RULES: Final[Mapping[Reason, Callable[[Facts], tuple[int, tuple[str, ...]]]]] = MappingProxyType(
    {
        Condition.HOLDER_DIED: _holder,
        Cause.LOST_ANSWER: _lost,
        Cause.IDLE_EXPIRED: _idle,
        Cause.APPROVALS_EXCEEDED: _approvals,
        Cause.TOKEN_POLICY: _policy,
        Cause.USED_ELSEWHERE: _elsewhere,
        Cause.ACCOUNT_MOVED: _moved,
        Cause.MASS_REFUSAL: _together,
        Cause.APP_TOKENS_REVOKED: _all_revoked,
        Cause.EGRESS_CHANGED: _of_many,
        Cause.CLIENT_SWAPPED: _of_many,
        Cause.UNRECOGNISED_ALIKE: _of_many,
        Cause.NETWORK_BLOCKED: _blocked,
        Cause.PROVIDER_UNREACHABLE: _unreachable,
        Cause.CLOCK_WRONG: _clock,
    }
)


# Putting it into words


def _certain(facts: Facts, reason: Reason, *, evidence: tuple[str, ...] = ()) -> Diagnosis:
    return _diagnosis(facts, reason, evidence=evidence, code=reason.value, others=(), sure=True)


def _diagnosis(
    facts: Facts,
    reason: Reason,
    *,
    evidence: tuple[str, ...],
    code: str,
    others: tuple[Possibility, ...],
    sure: bool,
) -> Diagnosis:
    first = _possibility(facts, reason, evidence)
    return Diagnosis(
        fault=first.fault,
        cause=first.cause,
        sentence=first.sentence if sure else f"Most likely: {first.sentence}",
        who=first.who,
        how=first.how,
        evidence=(*first.evidence, *_state_of(facts)),
        code=code,
        others=others,
    )


def _possibility(facts: Facts, reason: Reason, evidence: tuple[str, ...]) -> Possibility:
    if isinstance(reason, Condition):
        fault, remedy = CONDITIONS[reason]
        remedy = remedy.named(title=facts.vendor.title, admin=facts.vendor.account_admin)
    else:
        fault, remedy = FAULTS[reason], facts.vendor.remedy(reason)
    return Possibility(
        fault=fault,
        cause=reason.value,
        sentence=remedy.sentence,
        who=remedy.who,
        how=remedy.how,
        evidence=evidence,
    )


def _state_of(facts: Facts) -> tuple[str, ...]:
    """How it stands, for whoever reads the evidence."""
    connection = facts.connection
    lines = []
    if connection.last_refresh_at is not None:
        lines.append(f"Tokens last came at {_at(connection.last_refresh_at)}.")
    if connection.last_error is not None and connection.last_error_at is not None:
        times = f"{connection.failures} failures in a row" if connection.failures > 1 else "once"
        lines.append(f"Last error: {connection.last_error}, {times}, at {_at(connection.last_error_at)}.")
    if connection.expires_at is not None and not connection.alive(facts.now):
        lines.append(f"The access token ran out at {_at(connection.expires_at)}.")
    elif connection.expires_at is not None:
        lines.append(f"The access token lives until {_at(connection.expires_at)} and is handed out.")
    if connection.health is Health.DOUBTFUL:
        lines.append("Refused at first sight; it counts when it is refused again.")
    if connection.retry_at is not None and connection.retry_at > facts.now:
        lines.append(f"It is asked again at {_at(connection.retry_at)}.")
    return tuple(lines)


def _skews(facts: Facts) -> tuple[str, ...]:
    return tuple(
        f"The clock of host {host} is {seconds:+.0f} s beside the database's."
        for host, seconds in facts.house.skewed
    )


def _at(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%d %H:%M:%S UTC")


# What an admin wants to know of a grant while it is well


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """Facts of one connection's grant; None where a fact does not apply at its provider or is not known.

    `idle_days_left` counts from the last refresh; `life_measured` is false where the life is assumed.
    """

    rotation: str | None
    life_seconds: float | None
    life_measured: bool | None
    idle_days_left: float | None
    approvals_known: int | None
    approvals_limit: int | None
    approvals_warning: str | None


def vitals(connection: Connection, vendor: Provider, *, now: datetime, approvals: int | None) -> Vitals:
    """The facts that apply to the connection; rotation, idling and approvals are of grants with refresh tokens."""
    approved = connection.grant_type == "authorization_code"
    limit = vendor.approvals_limit if approved else None
    known = approvals if limit is not None else None
    return Vitals(
        rotation=connection.rotation.value if approved else None,
        life_seconds=connection.life_seconds,
        life_measured=None if connection.life_seconds is None else connection.life_known,
        idle_days_left=_idle_left(connection, vendor, now) if approved else None,
        approvals_known=known,
        approvals_limit=limit,
        approvals_warning=None if known is None or limit is None else _warning(known, limit),
    )


def approvals_of(grant_type: str, details: Mapping[str, Any]) -> int:
    """How many approvals of its user for its app a row has seen; an imported grant is one that was made elsewhere."""
    if grant_type != "authorization_code":
        return 0
    counted = details.get("approvals")
    return counted if isinstance(counted, int) else 1


def _idle_left(connection: Connection, vendor: Provider, now: datetime) -> float | None:
    if vendor.idle_days is None or connection.last_refresh_at is None:
        return None
    used = (now - connection.last_refresh_at).total_seconds() / _DAY
    return round(max(0.0, vendor.idle_days - used), 1)


def _warning(known: int, limit: int) -> str | None:
    """At the limit, and one before it, so that there is time to think."""
    if known < limit - 1:
        return None
    said = f"This is approval {known} known here of this user for this app; {limit} may stand"
    if known < limit:
        return f"{said}, and after one more the next pushes the oldest out."
    if known == limit:
        return f"{said}, so the next pushes the oldest out."
    return f"{said}, so the oldest were pushed out."
