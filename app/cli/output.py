"""How a command says what came of it: sentences and tables for people, one JSON value for programs."""

from __future__ import annotations

import functools
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, ParamSpec, TypeVar

import click

__all__ = ["Output", "OutputRefused", "Steps", "as_text", "reporting"]

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN_STEPS: Final = 10  # lines of progress where there is no terminal to draw on


class OutputRefused(click.ClickException):
    """Standard output did not take what exists nowhere else."""


class Output:
    """Results go to standard output, as text or as JSON; progress and questions to standard error."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def tell(self, data: Mapping[str, object], *lines: str) -> None:
        """One result: the object for programs, the lines for people."""
        click.echo(_json(data) if self.as_json else "\n".join(lines))

    def hand_over(self, data: Mapping[str, object], *lines: str) -> None:
        """The same for what exists nowhere else: returns once it is out, on disk where standard output is a file.

        Raises `OutputRefused`, also for a reader who has gone: nobody has read it then.
        """
        if sys.stdout is None:
            raise OutputRefused("Standard output is closed.")
        try:
            self.tell(data, *lines)
            _insist_out()
        except OSError as error:
            _leave_unwritten()
            raise OutputRefused(f"Standard output takes nothing ({error.strerror}).") from error

    def table(
        self, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str], *, nothing: str
    ) -> None:
        """Several results: a list of objects for programs, the named columns under their titles for people."""
        if self.as_json:
            click.echo(_json(rows))
        elif not rows:
            click.echo(nothing, err=True)
        elif sys.stdout.isatty():
            _draw(rows, columns)
        else:
            _write(rows, columns)

    @contextmanager
    def progress(self, title: str) -> Iterator[Steps]:
        """Show how far something long is: a bar on a terminal, a line now and then otherwise."""
        if sys.stderr.isatty():
            with _Bar(title) as bar:
                yield bar.move
        else:
            yield _Lines(title).move


Steps = Callable[[int, int], None]  # (done, total)


def reporting(command: Callable[P, R]) -> Callable[..., R]:
    """Give a command the `--json` option and its first argument, `out`."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
    @functools.wraps(command)
    def run(*args: Any, as_json: bool, **options: Any) -> R:
        return command(Output(as_json=as_json), *args, **options)  # type: ignore[arg-type]

    return run


class _Bar:
    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def move(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total or None)


class _Lines:
    def __init__(self, title: str) -> None:
        self._title = title
        self._told = -1

    def move(self, done: int, total: int) -> None:
        tenth = _PLAIN_STEPS * done // total if total else done // 1000
        if tenth > self._told:
            self._told = tenth
            click.echo(f"{self._title}: {done}{f' of {total}' if total else ''}", err=True)


def _insist_out() -> None:
    sys.stdout.flush()
    descriptor = _descriptor()
    if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fsync(descriptor)


def _leave_unwritten() -> None:
    """What is still in the buffer is not tried again at exit, where it would fail once more."""
    descriptor = _descriptor()
    if descriptor is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _descriptor() -> int | None:
    """That of standard output; None where it is kept in memory."""
    try:
        return sys.stdout.fileno()
    except io.UnsupportedOperation:
        return None


def _draw(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns.values(), box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(as_text(row.get(name)) for name in columns))
    Console().print(table, markup=False)


def _write(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> None:
    lines = [list(columns.values()), *([as_text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def as_text(value: object) -> str:
    """A value as people read it."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case datetime():
            return _instant(value)
        case list() | tuple():
            return " ".join(map(str, value)) or "-"
    return str(value)


def _json(value: object) -> str:
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: object) -> object:
    match value:
        case datetime():
            return _instant(value)
        case set() | frozenset():
            return sorted(value)
    return str(value)


def _instant(value: datetime) -> str:
    """RFC 3339 in UTC, to the second."""
    return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
