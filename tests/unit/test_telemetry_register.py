"""The register against the program: whatever is logged is registered, with every field it is given."""

import ast
from collections.abc import Iterator
from pathlib import Path

from app.telemetry import REGISTER, Event

APP = Path(__file__).parents[2] / "app"
RESERVED = {"exc_info"}


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
