"""What many schedules came to, summed up, kept in a file, and shown."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.simulation.plan import Outcome
from tests.simulation.schedule import Step

__all__ = ["Broken", "Sums", "shown"]


@dataclass(slots=True)
class Broken:
    """A schedule in which a promise was broken, with its last steps."""

    seed: int
    violation: str
    steps: list[str]


@dataclass(slots=True)
class Sums:
    """Sums over schedules; `done` are the numbers of the finished batches."""

    start: int = 1
    batch: int = 10
    done: list[int] = field(default_factory=list)
    schedules: int = 0
    steps: int = 0
    virtual_seconds: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    windows: Counter[str] = field(default_factory=Counter)
    broken: list[Broken] = field(default_factory=list)

    def add(self, outcome: Outcome, *, last: int = 60) -> None:
        """Count one schedule."""
        self.schedules += 1
        self.steps += outcome.steps
        self.virtual_seconds += round(outcome.seconds)
        self.counts.update(outcome.counts)
        self.faults.update(outcome.faults)
        self.windows.update(outcome.windows)
        if outcome.violation is not None:
            steps = [shown(step) for step in outcome.trace[-last:]]
            self.broken.append(Broken(outcome.seed, outcome.violation, steps))

    def join(self, other: Sums) -> None:
        """Add what another process counted."""
        self.schedules += other.schedules
        self.steps += other.steps
        self.virtual_seconds += other.virtual_seconds
        self.counts.update(other.counts)
        self.faults.update(other.faults)
        self.windows.update(other.windows)
        self.broken += other.broken

    def save(self, file: Path) -> None:
        """Put it where a later run finds it; a crash leaves the file of before."""
        temporary = file.with_name(f"{file.name}.tmp")
        temporary.write_text(json.dumps(self.plain() | {"done": sorted(self.done)}))
        temporary.replace(file)

    @classmethod
    def load(cls, file: Path) -> Sums:
        """Go on from where a run stopped."""
        found: dict[str, Any] = json.loads(file.read_text())
        found["broken"] = [Broken(**one) for one in found["broken"]]
        for name in ("counts", "faults", "windows"):
            found[name] = Counter(found[name])
        found.pop("per_second", None)
        return cls(**found)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "start": self.start,
            "batch": self.batch,
            "schedules": self.schedules,
            "steps": self.steps,
            "virtual_seconds": self.virtual_seconds,
            "seconds": round(self.seconds, 3),
            "counts": dict(sorted(self.counts.items())),
            "faults": dict(sorted(self.faults.items())),
            "windows": dict(sorted(self.windows.items())),
            "broken": [
                {"seed": one.seed, "violation": one.violation, "steps": one.steps} for one in self.broken
            ],
        }

    def text(self) -> str:
        """For people."""
        counts = self.counts
        rate = self.schedules / self.seconds if self.seconds else 0.0
        answers = {key[5:]: number for key, number in counts.items() if key.startswith("fate ")}
        return "\n".join(
            (
                f"{self.schedules} schedules, {self.steps} steps, {self.virtual_seconds / 86_400:.1f} days of virtual time",
                f"{self.seconds:.0f} s, {rate:.1f} schedules a second",
                f"hand-outs {counts['hand_outs']}, refusals {counts['refusals']}, commits {counts['commits']}",
                f"refreshes {counts['refresh']}, minted {counts['mint']}, codes exchanged {counts['code']}",
                f"open attempts taken over when their token was dead {counts['overtaken']}",
                f"last tries that met a spent token {counts['last_tries']}, lost for good {counts['needs_reconnect']}",
                "faults: " + _list(self.faults),
                "answers: " + _list(answers),
                "windows: " + (_list(self.windows) or "none"),
                f"violations: {len(self.broken)}",
            )
        )


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))


def shown(step: Step) -> str:
    """One step of a trace as a line."""
    number, moment, who, kind, detail = step
    return f"{number:6d} {moment:12.4f} {who:<18} {kind} {' '.join(detail.split())}".rstrip()
