"""How fresh a token is, for whom."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.oauth2.outcomes import Granted
from app.oauth2.token import Freshness, TokenSet, freshness, refresh_window
from app.secret import Secret

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("left", "life", "min_ttl", "ahead", "expected"),
    [
        (1800, 1800, 60, 300, Freshness.FRESH),
        (301, 1800, 60, 300, Freshness.FRESH),
        (300, 1800, 60, 300, Freshness.STALE),
        (60, 1800, 60, 300, Freshness.STALE),
        (59.9, 1800, 60, 300, Freshness.EXPIRED),
        (59.9, 1800, 0, 300, Freshness.STALE),
        (0, 1800, 0, 300, Freshness.EXPIRED),
        (-1, 1800, 0, 300, Freshness.EXPIRED),
        (110, 300, 60, 300, Freshness.FRESH),
        (100, 300, 60, 300, Freshness.STALE),
        (5, 1800, 0, 0, Freshness.FRESH),
        (400, 1800, 500, 300, Freshness.EXPIRED),
    ],
)
def test_freshness_table(left: float, life: float, min_ttl: float, ahead: float, expected: Freshness) -> None:
    """The window is the smaller of the setting and a third of the life; `min_ttl` beats both."""
    end = NOW + timedelta(seconds=left)
    assert freshness(end, life, now=NOW, min_ttl=min_ttl, ahead=ahead) is expected


@given(st.floats(-1e6, 1e6), st.floats(0.001, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_what_may_be_handed_out_always_lives_long_enough(
    left: float, life: float, min_ttl: float, ahead: float
) -> None:
    """Nothing but EXPIRED is ever said of a token with less left than was asked for."""
    end = NOW + timedelta(seconds=left)
    left = (end - NOW).total_seconds()
    found = freshness(end, life, now=NOW, min_ttl=min_ttl, ahead=ahead)
    assert (found is Freshness.EXPIRED) == (left <= 0 or left < min_ttl)
    assert 0 <= refresh_window(life, ahead) <= life / 3


def test_life_counts_from_sending() -> None:
    """An answer that took long does not make its token live longer."""
    granted = Granted(Secret("a"), None, expires_in=100.0, sent_at=NOW)
    kept = TokenSet.of(granted, previous=Secret("r"), life=100.0)
    assert kept.expires_at == NOW + timedelta(seconds=100)
    assert kept.obtained_at == NOW
    assert kept.life == 100.0
    assert kept.life_known


def test_refresh_token_stays_unless_a_new_one_comes() -> None:
    """An answer without a refresh token leaves the old one in force, another one replaces it."""
    silent = Granted(Secret("a"), None, sent_at=NOW)
    rotated = Granted(Secret("a"), Secret("r2"), sent_at=NOW)
    assert TokenSet.of(silent, previous=Secret("r1"), life=9, life_known=False).refresh_token == Secret("r1")
    assert TokenSet.of(rotated, previous=Secret("r1"), life=9).refresh_token == Secret("r2")
