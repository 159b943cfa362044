"""The rate of a caller."""

import pytest

from app.access.limits import Rates
from app.errors import RateLimited
from tests.access_stage import JumpingClock


def test_a_caller_may_use_one_seconds_worth_and_then_waits() -> None:
    """The bucket holds as much as the rate, and says how long until the next."""
    clock = JumpingClock()
    rates = Rates(clock)
    for _ in range(4):
        rates.take("c", 4.0)
    with pytest.raises(RateLimited) as caught:
        rates.take("c", 4.0)
    assert 0 < (caught.value.retry_after or 0) <= 0.25
    clock.jump(0.25)
    rates.take("c", 4.0)


def test_a_rate_below_one_still_lets_one_request_through() -> None:
    """A slow caller may ask once, then again when its time has come."""
    clock = JumpingClock()
    rates = Rates(clock)
    rates.take("c", 0.1)
    with pytest.raises(RateLimited):
        rates.take("c", 0.1)
    clock.jump(10)
    rates.take("c", 0.1)


def test_callers_have_buckets_of_their_own() -> None:
    """One caller's haste does not slow another."""
    rates = Rates(JumpingClock())
    rates.take("a", 1.0)
    rates.take("b", 1.0)
