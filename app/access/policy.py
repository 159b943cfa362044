"""The one door: decides what a caller may do, and records it.

`require` is the first line of whatever a caller can ask for. It does not trust the `Caller` it is given to
be up to date: a request may have waited for a refresh while an admin took the permission away, so it
decides on what is true in the present epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from app.access.audit import Detail, Entry, Trail
from app.access.belief import EpochSource
from app.access.callers import Caller, Callers
from app.access.denials import Denials
from app.access.permissions import Action, Permission
from app.errors import Forbidden, Unauthenticated

__all__ = ["Access", "Action", "Permission"]

_MANY: Final = 50_000  # decisions kept; a caller that asks for random names must not fill the memory

_Question = tuple[str, int, frozenset[Action] | None, Action, str]


class Access:
    """Decides and records; safe for threads."""

    def __init__(self, callers: Callers, epochs: EpochSource, denials: Denials, trail: Trail) -> None:
        self._callers = callers
        self._epochs = epochs
        self._denials = denials
        self._trail = trail
        self._known = _Known(-1)

    def require(self, caller: Caller, action: Action, target: str) -> None:
        """Return when the caller may do this; the hand-out itself is recorded by who makes it.

        Raises `Forbidden` after recording the denial, the same whether the target exists or not;
        `Unauthenticated` when the caller has been removed, disabled or given a new secret since it proved
        itself.
        """
        allowed = self._decide(caller, action, target)
        if allowed:
            return
        code = "unauthenticated" if allowed is None else "forbidden"
        self._denials.known(caller.actor, action=action, target=target, code=code)
        if allowed is None:
            raise Unauthenticated
        raise Forbidden(f"This caller does not have {action} on the name asked for.")

    def allows(self, caller: Caller, action: Action, target: str) -> bool:
        """The same question without a record: for listing what a caller may see."""
        return self._decide(caller, action, target) is True

    def remembers(self, caller: Caller, action: Action, target: str) -> bool:
        """Whether the caller is known to be allowed, in the present epoch; never waits, and false may mean unknown."""
        epochs, known = self._epochs.glance(), self._known
        if epochs is None or known.epoch != epochs.access:
            return False
        return known.answers.get(_question(caller, action, target)) is True

    def refuse(self, caller: Caller, target: str, *, code: str) -> None:
        """Put on record that a connection gives a caller no token, before the answer leaves; `code` says why.

        Many of the same in a second are counted. Raises `AuditUnavailable`.
        """
        self._denials.connection(caller.actor, target=target, code=code)

    def record(
        self,
        actor: str,
        event: str,
        *,
        target: str = "",
        outcome: str = "done",
        detail: Mapping[str, Detail] | None = None,
    ) -> None:
        """Put something on record, durably, before the answer leaves; raises `AuditUnavailable`."""
        self._trail.record(Entry(actor, event, target, outcome, detail))

    def record_all(self, entries: Sequence[Entry]) -> None:
        """The same for several things, which share one wait for the disk."""
        self._trail.record_all(entries)

    def _decide(self, caller: Caller, action: Action, target: str) -> bool | None:
        """Whether it may; None when the caller is no longer the one that proved itself."""
        known = self._present()
        question = _question(caller, action, target)
        try:
            return known.answers[question]
        except KeyError:
            answer = self._ask(known, caller, action, target)
        if len(known.answers) >= _MANY:
            known.answers.clear()
        known.answers[question] = answer
        return answer

    def _ask(self, known: _Known, caller: Caller, action: Action, target: str) -> bool | None:
        if caller.id not in known.callers:
            known.callers[caller.id] = self._callers.by_id(caller.id)
        present = known.callers[caller.id]
        if present is None or not present.enabled or present.version != caller.version:
            return None
        if caller.scopes is not None and action not in caller.scopes:
            return False
        return present.may(action, target)

    def _present(self) -> _Known:
        """What was learned in this epoch. Read after the epoch was, so it is at least as new; dropped whole
        when that moves.
        """
        epoch = self._epochs.look().access
        known = self._known
        if known.epoch != epoch:
            known = self._known = _Known(epoch)
        return known


def _question(caller: Caller, action: Action, target: str) -> _Question:
    return caller.id, caller.version, caller.scopes, action, target


class _Known:
    __slots__ = ("answers", "callers", "epoch")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.answers: dict[_Question, bool | None] = {}
        self.callers: dict[str, Caller | None] = {}
