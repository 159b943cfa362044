"""What the emulator received: totals per endpoint, every token request, revoked grants, calls with dead
tokens.

Tests ask here whether a client behaved. Tokens are written down as SHA-256 only.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import Any

from emulator.clock import ShiftedClock

# A bench of 1,000 connections over an hour stays far below; older entries fall out, totals stay.
KEPT_REQUESTS = 200_000


@dataclass(slots=True)
class TokenRequest:
    """One token request. `outcome` goes from open over processing to granted, an error's name or fault:kind.

    `concurrent_with` lists others with the same token open at the same time."""

    id: int
    at: float
    path: str
    grant_type: str | None
    app: str | None
    account: str | None
    user: str | None
    grant_id: str | None
    refresh_sha256: str | None
    concurrent_with: list[int]
    secret_index: int | None = None
    reuse: bool = False
    processed: bool = False
    outcome: str = "open"
    status: int | None = None
    faults: list[str] = field(default_factory=list)
    ended_at: float | None = None


@dataclass(slots=True)
class Revocation:
    """A grant that died, and why."""

    grant_id: str
    account: str
    app: str
    at: float
    reason: str


class Ledger:
    """Counts and remembers; one per vendor, safe to use from many threads."""

    def __init__(self, clock: ShiftedClock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._next_id = 1
        self._open: dict[int, TokenRequest] = {}
        self._clear()

    def _clear(self) -> None:
        self._requests: deque[TokenRequest] = deque(maxlen=KEPT_REQUESTS)
        self._revocations: list[Revocation] = []
        self._endpoints: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._most_open = 0

    def reset(self) -> None:
        """Forget everything counted so far; requests still open keep their entries out of the list."""
        with self._lock:
            self._clear()

    def count(self, endpoint: str) -> None:
        """Add one request to an endpoint's total."""
        with self._lock:
            self._endpoints[endpoint] += 1

    def begin(self, path: str, subject: dict[str, str | None]) -> TokenRequest:
        """Open an entry for a token request that has just arrived."""
        with self._lock:
            same = subject["refresh_sha256"]
            others = [e.id for e in self._open.values() if same is not None and e.refresh_sha256 == same]
            entry = TokenRequest(
                id=self._next_id,
                at=self._clock.now(),
                path=path,
                grant_type=subject["grant_type"],
                app=subject["app"],
                account=subject["account"],
                user=subject["user"],
                grant_id=subject["grant_id"],
                refresh_sha256=same,
                concurrent_with=others,
            )
            self._next_id += 1
            for other in others:
                self._open[other].concurrent_with.append(entry.id)
            self._open[entry.id] = entry
            self._most_open = max(self._most_open, len(self._open))
            self._requests.append(entry)
            return entry

    def end(self, entry: TokenRequest, status: int | None) -> None:
        """Close an entry with the HTTP status that was sent, None when no answer was."""
        with self._lock:
            entry.status = status
            entry.ended_at = self._clock.now()
            self._open.pop(entry.id, None)
            self._outcomes[entry.outcome] += 1

    def note_revocation(self, revocation: Revocation) -> None:
        """Remember that a grant died."""
        with self._lock:
            self._revocations.append(revocation)

    def note_call(self, token_state: str) -> None:
        """Count a protected-resource call by the state of its token: live, expired, revoked or unknown."""
        with self._lock:
            self._calls[token_state] += 1

    def totals(self) -> dict[str, Any]:
        """Return all counters as JSON-ready data."""
        with self._lock:
            reused = sum(1 for entry in self._requests if entry.reuse)
            overlapping = sum(1 for entry in self._requests if entry.concurrent_with)
            return {
                "endpoints": dict(self._endpoints),
                "outcomes": dict(self._outcomes),
                "calls": {state: self._calls[state] for state in ("live", "expired", "revoked", "unknown")},
                "reuses": reused,
                "concurrent": overlapping,
                "most_open": self._most_open,
                "open": len(self._open),
                "revocations": [asdict(item) for item in self._revocations],
            }

    def requests(self, since: int = 0) -> list[dict[str, Any]]:
        """Return token requests with an id above `since`, oldest first."""
        with self._lock:
            return [asdict(entry) for entry in self._requests if entry.id > since]
