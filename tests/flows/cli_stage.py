"""The real command line in this process: words in, exit code, output and complaints out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import app.telemetry
from app.cli.program import program
from app.telemetry import logs
from tests.installation import Installation, installation


@dataclass(frozen=True)
class Said:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value it printed."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Terminal:
    """A shell with the settings of one installation."""

    environment: Mapping[str, str]

    def type(self, *words: str, standard_input: str | bytes | None = None) -> Said:
        """Run one command."""
        result = CliRunner().invoke(
            program, words, input=standard_input, env=self.environment, prog_name="drawbridge"
        )
        assert "Traceback" not in result.stderr
        return Said(result.exit_code, result.stdout, result.stderr)

    def done(self, *words: str, standard_input: str | bytes | None = None) -> Said:
        """Run one command that must succeed."""
        said = self.type(*words, standard_input=standard_input)
        assert said.code == 0, said
        return said

    def json(self, *words: str, standard_input: str | bytes | None = None) -> Any:
        """Run one command that must succeed, with --json."""
        return self.done(*words, "--json", standard_input=standard_input).json


@contextmanager
def terminal(
    directory: Path, monkeypatch: pytest.MonkeyPatch, **environ: str
) -> Iterator[tuple[Terminal, Installation]]:
    """A terminal on a migrated SQLite installation."""
    # A command quiets the log of its process by taking over every logger; here the process is pytest's.
    monkeypatch.setattr(app.telemetry, "configure", lambda *_, **__: None)
    monkeypatch.setattr(logs, "_stream", logs._Stream(None, logging.CRITICAL))
    with installation(f"sqlite:///{directory / 'drawbridge.db'}", directory, **environ) as made:
        opened = Terminal(made.environment())
        opened.done("migrate")
        yield opened, made


def audited(opened: Terminal) -> list[tuple[str, str, str]]:
    """Who did what to what, from the exported trail."""
    rows = [json.loads(line) for line in opened.done("audit", "export").out.splitlines()]
    return [
        (row["actor"], row["action"], row["target"]) for row in sorted(rows, key=lambda row: str(row["at"]))
    ]
