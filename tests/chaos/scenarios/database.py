"""PostgreSQL restarts, is stopped at once, killed, out of connections, and gone, also beyond the grace (P1, P2, P5, P6).

While it is away every process goes on handing out the tokens it knows, and writes its audit rows to its own disk. When it is
back the rows are brought in, in order and once, and answers that the provider gave meanwhile are stored. After the grace
nothing is handed out: a permission may have been taken away that nobody here can know of.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
import sqlalchemy as sa

from app.db.schema import audit
from app.telemetry import Event
from tests.chaos.books import judge_answers, judge_links
from tests.chaos.probing import Answer, Probers
from tests.chaos.stage import Link, Run, Stage, staged
from tests.postgres import PostgresServer

__all__ = ["judge_trail", "rows_without_answer", "run"]

_DELIVERY: Final = 8.0  # seconds without a new row after which no more are expected
_LAG: Final = 1.0  # seconds between the last look at the database and the moment it goes away
_RETURN: Final = 4.0  # seconds within which a process goes back to a database that answers again
_LEARNED: Final = 2.5  # seconds until the life of a new token is learned and every process has noticed
_CLOCKS: Final = 0.3  # seconds that database time, as a process knows it, and ours may be apart
_MOST: Final = 400  # connections tried to leave no place free


def run(run: Run) -> None:
    """One kind of outage a round."""
    pace, server = run.pace, run.server
    assert server is not None
    half = pace.connections // 2
    still = [f"still-{number:02}" for number in range(half)]
    busy = [f"busy-{number:02}" for number in range(half)]
    min_ttl = 1.0
    with staged(run, OUTAGE_GRACE_SECONDS=f"{pace.grace:g}") as stage:
        for kind, name in (("web", "web1"), ("web", "web2"), ("worker", "worker1")):
            stage.host(name, kind)  # type: ignore[arg-type]
        stage.start(stage.hosts)
        stage.warm_up([*still, *busy])
        stage.made.emulator.control.salesforce.misbehave("latency", delay=pace.latency)
        kinds = list(_OUTAGES)
        run.dice.shuffle(kinds)
        gone: list[Outage] = []
        with stage.probers([*still, *busy], min_ttl=min_ttl) as probers:
            for number in run.rounds():
                kind = kinds[(number - 1) % len(kinds)]
                links = _round(stage, server, kind, probers=probers, still=still, busy=busy, gone=gone)
                judge_links(stage, links)
        answers = probers.answers()
        judge_answers(
            stage, answers, min_ttl=min_ttl, excused=lambda answer: _grace_is_over(answer, gone, pace.grace),
            by_process=True,
        )  # fmt: skip
        _require_closed(stage, answers, gone)
        judge_trail(stage, answers)


def _round(
    stage: Stage,
    server: PostgresServer,
    kind: str,
    *,
    probers: Probers,
    still: Sequence[str],
    busy: Sequence[str],
    gone: list[Outage],
) -> list[Link]:
    """Every process knows every token; then half of them are being refreshed when the database goes."""
    run = stage.run
    links = stage.bring(still)
    stage.wait_until_settled(links, within=60)
    time.sleep(_LEARNED)
    probers.ask_everywhere(still)
    links += stage.bring(busy)
    time.sleep(run.dice.uniform(0.0, run.pace.latency))
    run.say(kind)
    began = time.time()
    down, returning = _OUTAGES[kind](stage, server)
    back = time.time()
    gone.append(Outage(began, down, returning, back))
    run.tally.faults += 1
    late = stage.wait_until_settled(links, within=run.pace.life + 2 * run.pace.lease + 30)
    for link in late:
        run.tally.break_(f"{link.name} did not come to rest after: {kind}")
    if time.time() - back > run.pace.lease:
        run.say(f"last at rest: {', '.join(stage.last_at_rest)}")
    when, rest = time.strftime("%H:%M:%S", time.gmtime(began)), time.time() - back
    run.tally.note(f"{kind} at {when}: away {back - began:.1f} s, all at rest {rest:.1f} s later")
    return links


@dataclass(frozen=True, slots=True)
class Outage:
    """When the database began to go, was gone for certain, was let back, and answered again."""

    began: float
    down: float
    returning: float
    back: float


def _restart(_: Stage, server: PostgresServer) -> tuple[float, float]:
    server.stop()
    gone = time.time()
    server.start()
    return gone, gone


def _stop_at_once(_: Stage, server: PostgresServer) -> tuple[float, float]:
    server.stop_at_once()
    gone = time.time()
    server.start()
    return gone, gone


def _kill(_: Stage, server: PostgresServer) -> tuple[float, float]:
    server.kill()
    gone = time.time()
    server.start()
    return gone, gone


def _gone(stage: Stage, server: PostgresServer) -> tuple[float, float]:
    return _stay_away(server, stage.run.pace.outage)


def _gone_too_long(stage: Stage, server: PostgresServer) -> tuple[float, float]:
    return _stay_away(server, stage.run.pace.grace + 4.0)


def _stay_away(server: PostgresServer, seconds: float) -> tuple[float, float]:
    server.stop()
    down = time.time()
    time.sleep(seconds)
    returning = time.time()
    server.start()
    return down, returning


def _no_places(stage: Stage, server: PostgresServer) -> tuple[float, float]:
    """Every place of the server is taken, and whoever of ours had one is thrown out and finds it taken."""
    with contextlib.ExitStack() as taken:
        first = taken.enter_context(psycopg.connect(server.url(), autocommit=True))
        _take_places(server, taken)
        down = time.time()
        until = time.monotonic() + stage.run.pace.outage
        while time.monotonic() < until:
            first.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'drawbridge'"
            )
            _take_places(server, taken)
            time.sleep(0.1)
        return down, time.time()


def _take_places(server: PostgresServer, taken: contextlib.ExitStack) -> None:
    with contextlib.suppress(psycopg.OperationalError):
        for _ in range(_MOST):
            taken.enter_context(psycopg.connect(server.url(), connect_timeout=5))


_OUTAGES: Final[Mapping[str, Callable[[Stage, PostgresServer], tuple[float, float]]]] = {
    "restarted": _restart,
    "stopped at once": _stop_at_once,
    "killed with SIGKILL": _kill,
    "gone within the grace": _gone,
    "gone for longer than the grace": _gone_too_long,
    "out of connections": _no_places,
}


def _grace_is_over(answer: Answer, gone: Sequence[Outage], grace: float) -> bool:
    """Whether the grace may have run out by then; once back, a process needs a moment to notice."""
    return any(
        outage.began + grace - _LAG <= answer.end and answer.begin <= outage.back + _RETURN for outage in gone
    )


def _require_closed(stage: Stage, answers: Sequence[Answer], gone: Sequence[Outage]) -> None:
    """After the grace nothing is handed out (P6), and that was really tried."""
    grace = stage.run.pace.grace
    for outage in gone:
        closed_from = outage.down + grace + _LAG
        if outage.returning < closed_from + _LAG:
            continue
        after = [one for one in answers if one.begin > closed_from and one.end < outage.returning]
        handed = [one for one in after if one.status == 200]
        stage.run.tally.require(not handed, f"{len(handed)} tokens were handed out after the grace was over")
        stage.run.tally.require(bool(after), "nobody asked after the grace was over")


def judge_trail(stage: Stage, answers: Sequence[Answer]) -> None:
    """The trail is whole and has a row for every hand-out; rows may still be on their way.

    A row too many is none that was answered: what was recorded is decided anew if recording took long, or if the token did
    not outlive it. But a request that was recorded and never answered was accepted and then dropped.
    """
    tally = stage.run.tally
    handed = sum(answer.status == 200 for answer in answers)
    rows, moved = -1, time.monotonic()
    while (now := _issued_rows(stage)) < handed and time.monotonic() < moved + _DELIVERY:
        if now != rows:
            rows, moved = now, time.monotonic()
        time.sleep(0.2)
    rows = now
    verdict = stage.command.trail.verify()
    tally.require(verdict.sound, f"the trail is broken: {verdict.bad}")
    tally.require(rows >= handed, f"{handed} hand-outs, but {rows} rows in the trail")
    if rows > handed:
        _judge_rows_too_many(stage, answers)
    tally.note(f"trail: {rows} rows for {handed} hand-outs, {verdict.writers} writers, sound {verdict.sound}")


def _judge_rows_too_many(stage: Stage, answers: Sequence[Answer]) -> None:
    dropped, anew = rows_without_answer(answers, _issued_moments(stage))
    stage.run.tally.require(not dropped, f"{dropped} hand-outs were recorded and never answered")
    stage.run.tally.note(f"{anew} hand-outs were decided anew after they had been recorded")


def rows_without_answer(answers: Sequence[Answer], moments: Mapping[str, Sequence[float]]) -> tuple[int, int]:
    """How many recorded hand-outs belong to requests that got no answer, and how many to none that got another.

    `moments` says when hand-outs of each connection were recorded, in epoch seconds and in order.
    """
    dropped = anew = 0
    asked: dict[str, list[Answer]] = {}
    for answer in answers:
        asked.setdefault(answer.name, []).append(answer)
    for name, recorded in moments.items():
        left, theirs = list(recorded), asked.get(name, [])
        for answer in (one for one in theirs if one.status == 200):
            fitting = next((moment for moment in left if _during(answer, moment)), None)
            if fitting is not None:
                left.remove(fitting)
        unanswered = [one for one in theirs if not one.status]
        lost = sum(any(_during(one, moment) for one in unanswered) for moment in left)
        dropped, anew = dropped + lost, anew + len(left) - lost
    return dropped, anew


def _during(answer: Answer, moment: float) -> bool:
    return answer.begin - _CLOCKS <= moment <= answer.end + _CLOCKS


def _issued_moments(stage: Stage) -> dict[str, list[float]]:
    """When hand-outs were recorded, by connection, in order."""
    at = sa.type_coerce(audit.c.at, sa.BigInteger)
    query = sa.select(audit.c.target, at.label("at")).where(audit.c.action == str(Event.TOKEN_ISSUED))
    moments: dict[str, list[float]] = {}
    with stage.command.audit_database.read() as connection:
        for row in connection.execute(query.order_by(at)):
            moments.setdefault(row.target, []).append(row.at / 1e6)
    return moments


def _issued_rows(stage: Stage) -> int:
    query = sa.select(sa.func.count()).select_from(audit).where(audit.c.action == str(Event.TOKEN_ISSUED))
    with stage.command.audit_database.read() as connection:
        return int(connection.scalar(query) or 0)
