"""The register against the program: what is logged is registered with all its fields, and what is registered is used."""

import ast
from collections.abc import Iterator
from pathlib import Path

from app.telemetry import REGISTER, Event, metrics

APP = Path(__file__).parents[2] / "app"
RESERVED = {"exc_info"}
RECORDING = {"inc", "dec", "set", "observe", "observe_all", "labels"}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of `log(Event.…)` in the program, with where it stands."""
    for file in sorted(APP.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "log":
                yield f"{file.relative_to(APP)}:{node.lineno}", node


def events_of(call: ast.Call) -> list[str]:
    """The events a call may log: one, or the two of a conditional expression."""
    named = [node for node in ast.walk(call.args[0]) if isinstance(node, ast.Attribute)]
    return [node.attr for node in named if isinstance(node.value, ast.Name) and node.value.id == "Event"]


def test_every_field_the_program_logs_is_registered() -> None:
    """A field that is not would be left out silently, in the night it is needed."""
    missing = [
        f"{place} {name}: {keyword.arg}"
        for place, call in calls()
        for name in events_of(call)
        for keyword in call.keywords
        if keyword.arg not in {None, *RESERVED} and keyword.arg not in REGISTER[Event[name]].fields
    ]
    assert missing == []


def chains() -> Iterator[tuple[str, ...]]:
    """Every dotted name in the program with the file it stands in: ("db/epoch.py", "metrics", "jobs", "labels")."""
    for file in sorted(APP.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts: list[str] = []
            inner = node
            while isinstance(inner, ast.Attribute):
                parts.insert(0, inner.attr)
                inner = inner.value
            if parts and isinstance(inner, ast.Name):
                yield str(file.relative_to(APP)), inner.id, *parts


def test_every_event_is_told_somewhere() -> None:
    """An event that nothing logs or records promises a warning that will never come."""
    told = {
        chain[2] for chain in chains() if chain[1] == "Event" and not chain[0].endswith("telemetry/events.py")
    }
    assert set(Event.__members__) - told == set()


def test_every_metric_is_recorded_somewhere() -> None:
    """A number that nothing moves looks like good news."""
    names = {
        name: measure
        for name, measure in vars(metrics).items()
        if isinstance(measure, metrics.Counter | metrics.Gauge | metrics.Histogram)
    }
    assert len(names) == len(metrics._all)
    elsewhere = {chain[2] for chain in chains() if chain[1] == "metrics" and {*chain[3:]} & RECORDING}
    at_home = {
        chain[1]
        for chain in chains()
        if chain[0].endswith("telemetry/metrics.py") and {*chain[2:]} & RECORDING
    }
    assert set(names) - elsewhere - at_home == set()
