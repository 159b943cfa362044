"""The judge: what the callers and the database hold, against what stands in the provider's books.

A token counts as stored from the moment some caller was given it; from then on, for as long as the provider says that it
lives, nobody who asks for less may be refused. A connection is kept if its stored refresh token is the provider's current
one. If it is not, there must be an excuse that lies outside the product: whoever held the lease was killed before the
answer was there, or the answer never came. Then the old token must have been left alone while an access token lived, and
the connection must have come to rest as `lost_answer`.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import sqlalchemy as sa

from app.broker.connection import Health
from app.db.schema import attempts
from emulator import AccessTruth, GrantTruth, SeenRequest
from tests.chaos.probing import Answer
from tests.chaos.stage import Link, Stage

__all__ = ["judge_answers", "judge_links"]

_CLOCKS: Final = 0.3  # seconds that database time, as a process knows it, and the provider's may be apart
_SAVING: Final = (
    1.0  # seconds after the answer within which a kill may have struck before the journal's fsync
)
_LEARNED: Final = 2.0  # seconds until the life of a new token is learned and every process has noticed
_SPOILT: Final = frozenset({"truncated", "no_access_token"})  # what such an answer held could not be read
_RESTLESS: Final = 15.0  # seconds to wait for a refresh that happens to be under way while we look


Excused = Callable[[Answer], bool]


def judge_answers(
    stage: Stage,
    answers: Sequence[Answer],
    *,
    min_ttl: float,
    excused: Excused = lambda _: False,
    by_process: bool = False,
) -> None:
    """Count what callers got: tokens dead on arrival, refusals although a stored token lived, the longest wait.

    `excused` says which refusals may be. With `by_process` a token counts as known only to the process that handed it
    out once its life had been learned, and only until the provider issues a newer one: that is what a process can know
    without the database.
    """
    tally = stage.run.tally
    books = {
        access.sha256: access for grant in stage.made.emulator.control.grants() for access in grant.access
    }
    known = _Known(
        answers,
        books,
        counted=_counted_from_asking(stage),
        by_process=by_process,
        issued=stage.issued() if by_process else {},
    )
    _write_down(stage, answers)
    tally.require(any(answer.status == 200 for answer in answers), "nothing was handed out at all")
    for answer in answers:
        tally.hand_outs += answer.status == 200
        down = answer.host.down_within(answer.begin, answer.end)
        if answer.status == 200:
            _judge_token(stage, answer, books.get(answer.digest), min_ttl=min_ttl, frozen=down)
        if not known.lived(answer, min_ttl) or (answer.status != 200 and excused(answer)):
            continue
        if down and answer.status in (0, 200):
            continue  # it was dead or frozen, by our doing
        if answer.status == 200:
            tally.waited = max(tally.waited, answer.end - answer.begin)
        else:
            tally.refused += 1
            what = f"{answer.status} {answer.code}" if answer.status else "no answer"
            tally.break_(
                f"{answer.name} refused ({what} by {answer.host.name} at {_at(answer.end)}) though its token lived"
            )


def _write_down(stage: Stage, answers: Sequence[Answer]) -> None:
    """For whoever wants to see what happened: every answer, beside the logs of the processes."""
    with (stage.run.directory / "answers.log").open("w") as file:
        for one in answers:
            told = f"{one.status} {one.digest[:8]} {one.expires_in} {one.code}"
            file.write(f"{_at(one.begin)} {_at(one.end)} {one.host.name} {one.name} {told}\n")


def _at(moment: float) -> str:
    """As the processes' logs have it."""
    return datetime.fromtimestamp(moment, UTC).strftime("%H:%M:%S.%f")[:-3]


def _counted_from_asking(stage: Stage) -> dict[str, float]:
    """When each access token expires if its life is counted from the request, as a careful client must."""
    control = stage.made.emulator.control
    asked: dict[str, list[SeenRequest]] = {}
    for vendor in ("salesforce", "hubspot"):
        for request in control.vendor(vendor).requests():
            if request.outcome == "granted":
                asked.setdefault(request.grant_id or "", []).append(request)
    counted = {}
    for grant in control.grants():
        for access in grant.access:
            causes = [
                one.at
                for one in asked.get(grant.id, ())
                if one.at <= access.issued_at <= (one.ended_at or access.issued_at)
            ]
            counted[access.sha256] = access.expires_at - (
                access.issued_at - max(causes, default=access.issued_at)
            )
    return counted


def _judge_token(
    stage: Stage, answer: Answer, access: AccessTruth | None, *, min_ttl: float, frozen: bool
) -> None:
    tally = stage.run.tally
    if access is None:
        tally.break_(f"{answer.name}: a token was handed out that the provider never issued")
        return
    # When the request came the token lived for `min_ttl`, or it should not have been answered with it.
    expires_at = access.expires_at
    short = expires_at < answer.begin + min_ttl - _CLOCKS or answer.expires_in < int(min_ttl)
    if short or (expires_at < answer.end and not frozen):
        tally.expired += 1
        left = expires_at - answer.end
        tally.break_(f"{answer.name}: {answer.host.name} handed out a token with {left:.2f} s left")


class _Known:
    """Which tokens were stored at a moment, as far as callers can tell: those that one of them had been given."""

    def __init__(
        self,
        answers: Sequence[Answer],
        books: Mapping[str, AccessTruth],
        *,
        counted: Mapping[str, float],
        by_process: bool,
        issued: Mapping[str, Sequence[float]],
    ) -> None:
        self._by_process = by_process
        self._issued = issued
        # Since when which tokens are known: moments, the latest expiry until then, and when the newest was issued.
        self._seen: dict[tuple[str, str], tuple[list[float], list[float], list[float]]] = {}
        met: set[tuple[str, str, str]] = set()
        for answer in sorted(answers, key=lambda one: one.end):
            key, access = self._key(answer), books.get(answer.digest)
            if access is None or (*key, answer.digest) in met:
                continue
            if by_process and answer.begin < access.issued_at + _LEARNED:
                continue
            met.add((*key, answer.digest))
            moments, latest, newest = self._seen.setdefault(key, ([], [], []))
            moments.append(answer.end)
            newest.append(max(access.issued_at, newest[-1] if newest else 0.0))
            latest.append(max(counted[answer.digest], latest[-1] if latest else 0.0))

    def lived(self, answer: Answer, min_ttl: float) -> bool:
        """Whether a token stored before the request lived for `min_ttl` even when the answer came."""
        moments, latest, newest = self._seen.get(self._key(answer), ([], [], []))
        index = bisect.bisect_right(moments, answer.begin)
        if index == 0 or latest[index - 1] < answer.end + min_ttl + _CLOCKS:
            return False
        # What was issued since may be stored, and then the older token is not what this process believes in any more.
        return not any(
            newest[index - 1] < moment < answer.end for moment in self._issued.get(answer.name, ())
        )

    def _key(self, answer: Answer) -> tuple[str, str]:
        return answer.name, answer.host.name if self._by_process else ""


@dataclass(frozen=True, slots=True)
class _Held:
    host: str
    started_at: float


@dataclass(frozen=True, slots=True)
class _Case:
    """Everything about one connection of one round."""

    link: Link
    grant: GrantTruth
    requests: list[SeenRequest]
    attempts: list[_Held]
    health: Health
    last_error: str | None
    stored: str

    @property
    def kept(self) -> bool:
        return (
            self.grant.live
            and self.stored == self.grant.refresh_sha256
            and self.health is not Health.NEEDS_RECONNECT
        )

    @property
    def last_granted(self) -> SeenRequest | None:
        granted = [request for request in self.requests if request.outcome == "granted"]
        return granted[-1] if granted else None


def judge_links(stage: Stage, links: Sequence[Link]) -> None:
    """Count what became of the connections of a round."""
    stage.run.tally.connection_rounds += len(links)
    for case in _restful(stage, links):
        if not case.kept:
            _judge_loss(stage, case)
        _judge_presentations(stage, case)


def _restful(stage: Stage, links: Sequence[Link]) -> list[_Case]:
    """The cases once none of them is between two states: a refresh may be under way while we look."""
    until = time.monotonic() + _RESTLESS
    while True:
        cases = _cases(stage, links)
        moving = [case for case in cases if not case.kept and case.health is not Health.NEEDS_RECONNECT]
        if not moving or time.monotonic() > until:
            return cases
        time.sleep(0.3)


def _cases(stage: Stage, links: Sequence[Link]) -> list[_Case]:
    control = stage.made.emulator.control
    seen: dict[str, list[SeenRequest]] = {}
    for vendor in {link.vendor for link in links}:
        for request in control.vendor(vendor).requests():
            seen.setdefault(request.grant_id or "", []).append(request)
    held = _holders(stage)
    cases = []
    for link in links:
        found = stage.command.store.tokens_of(link.connection_id)
        assert found is not None
        row, tokens = found
        case = _Case(
            link=link,
            grant=control.grant(link.grant_id),
            requests=seen.get(link.grant_id, []),
            attempts=held.get(link.connection_id, []),
            health=row.health,
            last_error=row.last_error,
            stored=tokens.refresh_token.sha256() if tokens.refresh_token else "",
        )
        cases.append(case)
    return cases


def _holders(stage: Stage) -> dict[str, list[_Held]]:
    query = sa.select(attempts.c.connection_id, attempts.c.host, attempts.c.started_at)
    held: dict[str, list[_Held]] = {}
    with stage.command.database.read() as transaction:
        for row in transaction.execute(query.order_by(attempts.c.started_at)):
            held.setdefault(row.connection_id, []).append(_Held(row.host, row.started_at.timestamp()))
    return held


def _judge_loss(stage: Stage, case: _Case) -> None:
    tally, name = stage.run.tally, case.link.name
    excuse = _excuse(stage, case)
    if excuse is None:
        tally.revoked += case.grant.revoked is not None
        tally.lost += 1
        tally.break_(
            f"{name}: {case.health.value} ({case.last_error}), at the provider "
            f"{case.grant.revoked or 'live'}, and nobody outside is to blame: {_story(stage, case)}"
        )
        return
    if excuse == "window":
        tally.window += 1
    else:
        tally.unread += 1
    tally.require(
        case.health is Health.NEEDS_RECONNECT and case.last_error == "lost_answer",
        f"{name}: its answer was lost ({excuse}), but it stands at {case.health.value} ({case.last_error})",
    )
    _require_left_alone(stage, case)


def _excuse(stage: Stage, case: _Case) -> str | None:
    """Why the answer with the current refresh token cannot have been stored, None when it could."""
    request = case.last_granted
    if request is None or case.stored == case.grant.refresh_sha256:
        return None
    if request.status is None and request.ended_at is not None:
        return "unsent"
    if _SPOILT & set(request.faults):
        return "spoilt"
    if _given_up(stage, request, request.ended_at or 0.0):
        return "late"
    killed = _killed(stage, case, request)
    if killed is None:
        return None
    return "dead" if request.ended_at is None or killed <= request.ended_at else "window"


def _given_up(stage: Stage, request: SeenRequest, at: float) -> bool:
    """Whether nobody waited for the answer any more at that moment."""
    return at - request.at > stage.run.pace.timeout - 0.1


def _killed(stage: Stage, case: _Case, request: SeenRequest) -> float | None:
    """When the holder of this request was killed with its answer outstanding, None when it was not."""
    holders = [held.host for held in case.attempts if held.started_at <= request.at + _CLOCKS]
    host = next((host for host in stage.hosts if holders and host.name == holders[-1]), None)
    if host is None:
        return None
    latest = float("inf") if request.ended_at is None else request.ended_at + _SAVING
    return next((kill for kill in host.kills if request.at <= kill <= latest), None)


def _require_left_alone(stage: Stage, case: _Case) -> None:
    """Presenting the old token again while an access token lives would take that with it."""
    spent = case.last_granted
    assert spent is not None
    again = [
        request
        for request in case.requests
        if request.id > spent.id and request.refresh_sha256 == spent.refresh_sha256
    ]
    alive_until = max((a.expires_at for a in case.grant.access if a.issued_at < spent.at), default=0.0)
    for request in again:
        stage.run.tally.require(
            request.at >= alive_until - 0.1,
            f"{case.link.name}: presented again {alive_until - request.at:.2f} s before its access token died",
        )


def _judge_presentations(stage: Stage, case: _Case) -> None:
    """One holder at a time: two requests with one token may overlap only if nobody waited for the first any more."""
    by_id = {request.id: request for request in case.requests}
    for request in case.requests:
        for other in (by_id[number] for number in request.concurrent_with if number in by_id):
            abandoned = _given_up(stage, request, other.at) or _killed(stage, case, request) is not None
            if other.id > request.id and not abandoned:
                stage.run.tally.break_(f"{case.link.name}: presented by two holders at once")


def _story(stage: Stage, case: _Case) -> str:
    """What happened, for a person to read: times count from the first request."""
    if not case.requests:
        return "never presented"
    start = case.requests[0].at
    told = [
        f"{request.at - start:.2f}-{(request.ended_at or 0) - start:.2f} {request.outcome}"
        f"{' REUSE' if request.reuse else ''}{' ' + '+'.join(request.faults) if request.faults else ''}"
        for request in case.requests
    ]
    held = [
        f"{held.started_at - start:.2f} {held.host}" for held in case.attempts if held.started_at > start - 5
    ]
    kills = [
        f"{kill - start:.2f} {host.name}" for host in stage.hosts for kill in host.kills if kill > start - 5
    ]
    return f"requests [{', '.join(told)}] attempts [{', '.join(held)}] kills [{', '.join(kills)}]"
