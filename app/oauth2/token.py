"""The access token as a value: how long it lives and when it has to be replaced.

            now
sent ────────┼──────── expires_at − window ──────────── expires_at − min_ttl ──────── expires_at
  FRESH: hand out        STALE: hand out, refresh soon      EXPIRED (for this caller): refresh first
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final

from app.oauth2.outcomes import Granted
from app.secret import Secret

__all__ = ["Freshness", "TokenSet", "freshness", "refresh_window"]

# The refresh window is at most this part of the life, so that a 5-minute token is not refreshed all the time.
WINDOW_SHARE: Final = 1 / 3


class Freshness(Enum):
    """What may be done with an access token right now."""

    FRESH = "fresh"
    STALE = "stale"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """What is kept of a grant: the tokens, when the request for them was sent, and when the access token
    ends.

    `life_known` is false where the provider did not say and a cautious life was assumed.
    """

    access_token: Secret
    refresh_token: Secret | None
    expires_at: datetime
    obtained_at: datetime
    life_known: bool

    @classmethod
    def of(
        cls, granted: Granted, *, previous: Secret | None = None, life: float, life_known: bool = True
    ) -> TokenSet:
        """Turn an answer into what is to be stored; `life` is in seconds and counts from *sending* the
        request.

        An answer without a refresh token leaves the `previous` one in force (RFC 6749 §6).
        """
        return cls(
            access_token=granted.access_token,
            refresh_token=granted.refresh_token or previous,
            expires_at=granted.sent_at + timedelta(seconds=life),
            obtained_at=granted.sent_at,
            life_known=life_known,
        )

    @property
    def life(self) -> float:
        """The whole life of the access token in seconds."""
        return (self.expires_at - self.obtained_at).total_seconds()


def freshness(expires_at: datetime, life: float, *, now: datetime, min_ttl: float, ahead: float) -> Freshness:
    """Say whether a token may be handed out and whether it should be replaced; every duration is in seconds.

    EXPIRED also means: alive, but for less than the `min_ttl` this caller asked for. The end itself is
    outside: a token with nothing left is EXPIRED even for `min_ttl=0`.
    """
    left = (expires_at - now).total_seconds()
    if left <= 0 or left < min_ttl:
        return Freshness.EXPIRED
    return Freshness.STALE if left <= refresh_window(life, ahead) else Freshness.FRESH


def refresh_window(life: float, ahead: float) -> float:
    """How many seconds before its end a token of that life is due for refresh."""
    return max(0.0, min(ahead, life * WINDOW_SHARE))
