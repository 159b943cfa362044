"""What a scenario counted, and the table of all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

__all__ = ["Tally", "draw"]

_MOST_TOLD: Final = 12  # broken promises told in words; the rest are counted


@dataclass(slots=True)
class Tally:
    """One line of the table.

    `revoked` families that the provider revoked because an old token came back, `expired` tokens handed out dead or with
    less left than asked for, `refused` requests turned away although a stored token lived, `lost` connections whose stored
    refresh token is not the provider's current one: all four must be 0. `unread` are answers that nobody can have read
    (their holder was dead, the provider never sent them): each was detected, and not spent again while a token lived.
    `window` are answers lost in the windows that P1 names. `waited` is the longest wait, in seconds, of a caller whose
    token lived; -1 when there was none.
    """

    scenario: str
    database: str
    rounds: int = 0
    connection_rounds: int = 0
    faults: int = 0
    hand_outs: int = 0
    revoked: int = 0
    expired: int = 0
    refused: int = 0
    lost: int = 0
    unread: int = 0
    window: int = 0
    waited: float = -1.0
    seconds: float = 0.0
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def break_(self, sentence: str) -> None:
        """A promise did not hold."""
        self.broken.append(sentence)

    def require(self, held: bool, sentence: str) -> None:
        """A promise, and what to say if it did not hold."""
        if not held:
            self.break_(sentence)

    def note(self, sentence: str) -> None:
        """Something measured, told below the table."""
        self.notes.append(sentence)

    @property
    def result(self) -> str:
        """One word."""
        if self.broken:
            return "BROKEN"
        return "cut short" if self.interrupted else "holds"

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(asdict(self) | {"result": self.result})

    @classmethod
    def from_json(cls, line: str) -> Tally:
        """The way back."""
        data: dict[str, Any] = json.loads(line)
        del data["result"]
        return cls(**data)


_COLUMNS: Final = (
    ("scenario", "scenario"),
    ("database", "database"),
    ("rounds", "rounds"),
    ("conn. rounds", "connection_rounds"),
    ("faults", "faults"),
    ("hand-outs", "hand_outs"),
    ("revoked", "revoked"),
    ("expired", "expired"),
    ("refused", "refused"),
    ("lost", "lost"),
    ("unread", "unread"),
    ("window", "window"),
    ("longest wait", "waited"),
    ("took", "seconds"),
    ("result", "result"),
)


def draw(tallies: Sequence[Tally]) -> str:
    """The table, and below it what was measured and what was broken."""
    lines = [[title for title, _ in _COLUMNS]]
    lines += [[_cell(tally, name) for _, name in _COLUMNS] for tally in tallies]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    table = [
        "  ".join(
            cell.ljust(width) if column < 2 or column == len(_COLUMNS) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    below = [f"{tally.scenario} on {tally.database}: {note}" for tally in tallies for note in tally.notes]
    broken = [
        f"BROKEN {tally.scenario} on {tally.database}: {sentence}"
        for tally in tallies
        for sentence in _some(tally.broken)
    ]
    return "\n".join([table[0], "-" * len(table[0]), *table[1:], "", *below, *broken])


def _some(sentences: Sequence[str]) -> list[str]:
    more = len(sentences) - _MOST_TOLD
    return [*sentences[:_MOST_TOLD], *([f"... and {more} more"] if more > 0 else [])]


def _cell(tally: Tally, name: str) -> str:
    value = getattr(tally, name)
    if name == "waited":
        return "-" if value < 0 else f"{1000 * value:.0f} ms"
    return f"{value:.0f} s" if name == "seconds" else str(value)
