"""Misbehaviour on request: what can go wrong with an answer, when it strikes and for whom.

A fault is data; `FaultBook` keeps those in force and hands them out, `serving` carries them out.
Kinds and options:

    latency {delay}                 wait `delay` seconds, then go on
    hang {delay}                    silence until released or for `delay` seconds, then the connection closes
    status {status, retry_after, body, headers}   answer with this status and a complete body
    html {status}                   answer with an HTML page
    redirect {location, status}     answer with a redirect; without `location` to this server's /elsewhere
    error {error, description}      answer with one of the vendor's own errors, by name
    drop {}                         close the connection without an answer
    truncated {mode}                `length`: Content-Length promises more; `json`: cut, yet complete
    no_access_token {}              200 whose JSON has no access_token
    edit {set, omit}                change or remove fields of the JSON answer
    drip {delay}                    send the body byte by byte over `delay` seconds
    oversized {size}                a valid JSON body of about `size` bytes
    inactive {}                     introspection says active=false whatever the token is
    other_account {account, user}   the consent page grants for another account than was chosen
    deny_redirect {}                a refusal at the consent page is reported to the callback

`when` is `before` (the request is not processed) or `after` (processed first, so a rotation has happened and
only the answer is lost); each kind has a default and takes the other where both make sense.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from emulator.clock import ShiftedClock
from emulator.model import FromMapping, SetUpError

When = Literal["before", "after"]

ENDPOINTS = ("token", "introspect", "revoke", "authorize", "api", "*")
EDITING = {"edit", "inactive"}
CONSENTING = {"other_account", "deny_redirect"}
DEFAULT_WHEN: dict[str, When] = {
    "latency": "before",
    "hang": "before",
    "status": "before",
    "html": "before",
    "redirect": "before",
    "error": "before",
    "drop": "before",
    "truncated": "after",
    "no_access_token": "after",
    "edit": "after",
    "drip": "after",
    "oversized": "after",
    "inactive": "after",
    "other_account": "before",
    "deny_redirect": "before",
}
OPTIONS: dict[str, set[str]] = {
    "latency": {"delay"},
    "hang": {"delay"},
    "status": {"status", "retry_after", "body", "headers"},
    "html": {"status"},
    "redirect": {"location", "status"},
    "error": {"error", "description"},
    "drop": set(),
    "truncated": {"mode"},
    "no_access_token": set(),
    "edit": {"set", "omit"},
    "drip": {"delay"},
    "oversized": {"size"},
    "inactive": set(),
    "other_account": {"account", "user"},
    "deny_redirect": set(),
}


@dataclass(slots=True)
class Fault(FromMapping):
    """One misbehaviour in force; None in a filter matches everything, `count` None never runs out.

    `seconds` is the time it stays in force on the emulator's clock.
    """

    kind: str
    endpoint: str = "token"
    when: When | None = None
    count: int | None = None
    seconds: float | None = None
    app: str | None = None
    account: str | None = None
    user: str | None = None
    grant_id: str | None = None
    grant_type: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    id: int = 0
    hits: int = 0
    until: float | None = None
    released: threading.Event = field(default_factory=threading.Event, repr=False)

    def check(self) -> None:
        """Raise SetUpError when kind, endpoint, moment or options are unknown."""
        if self.kind not in OPTIONS:
            raise SetUpError(f"unknown kind {self.kind!r}, known are {sorted(OPTIONS)}")
        if self.endpoint not in ENDPOINTS:
            raise SetUpError(f"unknown endpoint {self.endpoint!r}, known are {ENDPOINTS}")
        if self.when not in (None, "before", "after"):
            raise SetUpError(f"when is 'before' or 'after', not {self.when!r}")
        unknown = set(self.options) - OPTIONS[self.kind]
        if self.kind in EDITING and self.when == "before":
            raise SetUpError(f"{self.kind} changes an answer, so it cannot strike before there is one")
        if unknown:
            raise SetUpError(f"{self.kind} takes {sorted(OPTIONS[self.kind])}, not {sorted(unknown)}")

    @property
    def moment(self) -> When:
        """When it strikes, with the default of its kind."""
        return self.when or DEFAULT_WHEN[self.kind]

    @property
    def answers(self) -> bool:
        """Whether it decides the answer alone, so that only one such fault can strike a request."""
        return self.kind not in {"latency"} | EDITING | CONSENTING

    def strikes(self, endpoint: str, subject: Mapping[str, str | None]) -> bool:
        """Whether this request is meant."""
        if self.endpoint not in ("*", endpoint):
            return False
        wanted = {
            "app": self.app,
            "account": self.account,
            "user": self.user,
            "grant_id": self.grant_id,
            "grant_type": self.grant_type,
        }
        return all(value is None or subject.get(name) == value for name, value in wanted.items())

    def describe(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "id": self.id, "kind": self.kind, "endpoint": self.endpoint, "when": self.moment,
            "count": self.count, "until": self.until, "hits": self.hits, "options": self.options,
            "app": self.app, "account": self.account, "user": self.user,
            "grant_id": self.grant_id, "grant_type": self.grant_type,
        }  # fmt: skip


class FaultBook:
    """The faults of one vendor in the order they were asked for; safe to use from many threads."""

    def __init__(self, clock: ShiftedClock, ids: itertools.count[int]) -> None:
        self._clock = clock
        self._ids = ids
        self._lock = threading.Lock()
        self._faults: dict[int, Fault] = {}

    def add(self, fault: Fault) -> Fault:
        """Put a fault in force."""
        fault.check()
        with self._lock:
            fault.id = next(self._ids)
            fault.until = None if fault.seconds is None else self._clock.now() + fault.seconds
            self._faults[fault.id] = fault
            return fault

    def take(self, endpoint: str, subject: Mapping[str, str | None]) -> list[Fault]:
        """Return the faults that strike this request and use up one of each one's count."""
        with self._lock:
            self._expire()
            struck = self._select(endpoint, subject)
            for fault in struck:
                fault.hits += 1
                if fault.count is not None:
                    fault.count -= 1
            return struck

    def _select(self, endpoint: str, subject: Mapping[str, str | None]) -> list[Fault]:
        struck: list[Fault] = []
        for fault in self._faults.values():
            if fault.count == 0 or not fault.strikes(endpoint, subject):
                continue
            if fault.answers and any(other.answers for other in struck):
                continue
            struck.append(fault)
        return struck

    def _expire(self) -> None:
        now = self._clock.now()
        for fault in [f for f in self._faults.values() if f.until is not None and f.until <= now]:
            del self._faults[fault.id]

    def listing(self) -> list[dict[str, Any]]:
        """Describe the faults in force or used up, with their hits."""
        with self._lock:
            return [fault.describe() for fault in self._faults.values()]

    def lift(self, fault_id: int | None = None) -> int:
        """Remove one fault, or all, let go whoever hangs on them, and return how many were removed."""
        with self._lock:
            chosen = [fault for fault in self._faults.values() if fault_id in (None, fault.id)]
            for fault in chosen:
                fault.released.set()
                del self._faults[fault.id]
            return len(chosen)
