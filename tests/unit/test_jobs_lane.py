"""One app's lane: how many at once, how many a second, and one at a time after a pause."""

from __future__ import annotations

from app.broker.connection import Connection, ConnectionId
from app.broker.refresh import Ending, EndingKind
from app.clock import Clock
from app.jobs.lane import HOLD, IN_FLIGHT, Lane


class HandClock(Clock):
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 1000.0

    def elapsed(self) -> float:
        """What was set."""
        return self.at


def connection(number: int) -> Connection:
    """The connection with this number."""
    return Connection(
        id=ConnectionId(f"{number:032x}"),
        name=f"c{number}",
        provider="hubspot",
        app_id="a",
        grant_type="authorization_code",
        account_id=str(number),
        user_id="",
        identity=str(number),
    )


def lane_with(count: int, *, rate: float = 1000.0) -> tuple[Lane, HandClock]:
    """A lane with so many connections waiting, a second after it was made."""
    clock = HandClock()
    lane = Lane(clock)
    lane.rate = rate
    for number in range(count):
        lane.add(connection(number))
    clock.at += 1.0
    return lane, clock


def taken(lane: Lane) -> list[str]:
    """The names of what may go out now, in order."""
    names = []
    while (one := lane.next()) is not None:
        names.append(one.name)
    return names


def test_the_oldest_go_first_and_only_so_many_at_once() -> None:
    """A full lane gives out its limit in order of arrival, and one more for each that ended."""
    lane, _ = lane_with(IN_FLIGHT + 2)
    assert taken(lane) == [f"c{number}" for number in range(IN_FLIGHT)]
    lane.ended(connection(3).id, Ending(EndingKind.FAILED))
    assert taken(lane) == [f"c{IN_FLIGHT}"]


def test_what_is_queued_or_under_way_is_not_queued_again() -> None:
    """A connection that is claimed a second time is kept once, whether it waits or runs."""
    lane, _ = lane_with(1)
    assert lane.add(connection(0))
    assert taken(lane) == ["c0"]
    assert lane.add(connection(0))
    assert taken(lane) == []


def test_a_second_gives_no_more_than_the_rate_and_the_burst() -> None:
    """At eight a second, two go at once and eight follow over the next second."""
    lane, clock = lane_with(40, rate=8.0)
    assert len(taken(lane)) == 2
    went = 0
    for _ in range(64):
        clock.at += 1 / 64
        for name in taken(lane):
            went += 1
            lane.ended(connection(int(name[1:])).id, Ending(EndingKind.REFRESHED))
    assert went == 8


def test_a_slow_rate_still_gives_one() -> None:
    """At one refresh in four seconds, one goes now and the next in four seconds."""
    lane, clock = lane_with(3, rate=0.25)
    assert taken(lane) == ["c0"]
    clock.at += 3.9
    assert taken(lane) == []
    clock.at += 0.2
    assert taken(lane) == ["c1"]


def test_a_full_lane_lets_go_of_the_rest() -> None:
    """It keeps what can go out before the hold has passed and refuses more, so that others are reached."""
    lane, _ = lane_with(0, rate=5.0)
    kept = [lane.add(connection(number)) for number in range(100)]
    assert kept.count(True) == 5.0 * HOLD
    assert kept[:50] == [True] * 50


def test_after_a_pause_one_goes_ahead_of_the_others() -> None:
    """Nothing goes during the pause; then one at a time until one succeeds, then all that may."""
    lane, clock = lane_with(10)
    lane.pause(clock.at + 5.0)
    assert taken(lane) == []
    clock.at += 5.0
    assert taken(lane) == ["c0"]
    lane.ended(connection(0).id, Ending(EndingKind.FAILED))
    assert taken(lane) == ["c1"]
    lane.ended(connection(1).id, Ending(EndingKind.REFRESHED))
    assert len(taken(lane)) == 8
