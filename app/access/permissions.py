"""What a caller can be allowed to do, and on which names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from app.errors import Unprocessable

__all__ = ["Action", "Permission"]

_PATTERN: Final = re.compile(r"[a-z0-9._*-]{1,128}")


class Action(StrEnum):
    """What may be allowed; also the OAuth scopes of our tokens (RFC 6749 §3.3 lets a colon stand in a
    scope).
    """

    TOKEN_ISSUE = "token:issue"  # noqa: S105 - the name of an action
    CONNECTION_READ = "connection:read"
    CONNECTION_MANAGE = "connection:manage"
    SYNC_READ = "sync:read"
    SYNC_WRITE = "sync:write"


@dataclass(frozen=True, slots=True, order=True)
class Permission:
    """An action on every name a pattern covers; `*` in it stands for any run of characters, none included."""

    action: Action
    pattern: str

    @classmethod
    def parse(cls, text: str) -> Permission:
        """Read ACTION@PATTERN, like token:issue@hubspot-*; raises `Unprocessable` saying what is wrong."""
        action, at, pattern = text.partition("@")
        if not at:
            raise Unprocessable("A permission is written ACTION@PATTERN, like token:issue@hubspot-*.")
        if action not in set(Action):
            raise Unprocessable(f"The action of a permission is one of: {', '.join(Action)}.")
        if _PATTERN.fullmatch(pattern) is None:
            raise Unprocessable(
                "The pattern of a permission has 1 to 128 of a-z, 0-9, dot, dash, underscore and *."
            )
        return cls(Action(action), pattern)

    def covers(self, action: Action, name: str) -> bool:
        """Whether this permission allows that action on that name."""
        return self.action == action and _matches(self.pattern, name)

    def __str__(self) -> str:
        return f"{self.action}@{self.pattern}"


@lru_cache(maxsize=1024)
def _pieces(pattern: str) -> tuple[str, tuple[str, ...], str]:
    first, *rest = pattern.split("*")
    return first, tuple(rest[:-1]), rest[-1]


def _matches(pattern: str, name: str) -> bool:
    """Leftmost match of each piece in turn: linear, where a regular expression with many stars would be
    exponential.
    """
    if "*" not in pattern:
        return pattern == name
    first, middle, last = _pieces(pattern)
    end = len(name) - len(last)
    if end < len(first) or not name.startswith(first) or not name.endswith(last):
        return False
    position = len(first)
    for piece in middle:
        found = name.find(piece, position, end)
        if found < 0:
            return False
        position = found + len(piece)
    return True
