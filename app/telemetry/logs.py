"""The one log stream: JSON lines, one event each, on standard error.

Our own events come through `log()` and carry only registered fields. Libraries log through the standard
`logging` module; `configure()` takes all of its loggers over, so that their words pass the same redaction
at every level. Their arguments go by type: numbers as they are, text scrubbed, anything else (SQL
parameters, rows, responses) as its class.

A line that cannot be written is dropped and counted. Nothing here raises into the program.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, TextIO

from app.telemetry.events import REGISTER, Event, Spec
from app.telemetry.redaction import fault, presentable, scrub

__all__ = ["configure", "log", "lost_lines"]

_LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_Line = dict[str, Any]
_render: Final = json.JSONEncoder(default=lambda value: f"<{type(value).__name__}>").encode


class _Stream:
    """Where lines go and from which level on; one per process, replaced as a whole by `configure()`."""

    __slots__ = ("_lock", "_out", "lost", "threshold")

    def __init__(self, out: TextIO | None, threshold: int) -> None:
        self._out = out
        self._lock = threading.Lock()
        self.threshold = threshold
        self.lost = 0

    def write(self, line: _Line) -> None:
        """Write one line whole; a closed or full stream costs the line, not the program."""
        try:
            # The machine's own time, not the database's: a log is compared with the logs of the same machine.
            line["time"] = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
            text = _render(line)
            out = self._out or sys.stderr
            with self._lock:
                out.write(f"{text}\n")
                out.flush()
        except Exception:  # noqa: BLE001 - whatever goes wrong while logging must not reach the program
            self.lost += 1


# The one global: libraries find their loggers through a global too, so this cannot hang on an object of ours.
_stream = _Stream(None, logging.INFO)


def lost_lines() -> int:
    """How many lines could not be written since `configure()`."""
    return _stream.lost


def log(event: Event, *, exc_info: BaseException | bool = False, **fields: object) -> None:
    """Write an event with its registered fields; fields that are not in the register are left out and
    counted.

    An exception as a field, or the one being handled with `exc_info=True`, shows its class, place and
    causes, never its message (ours show code and detail). Never raises.
    """
    stream = _stream
    try:
        spec = REGISTER[event]
        if _LEVELS[spec.level] < stream.threshold:
            return
        stream.write(_own_line(event, spec, fields, error=_handled(exc_info)))
    except Exception as error:  # noqa: BLE001 - a broken field must not break the request it came from
        stream.write(
            {"level": "error", "event": Event.LOG_FAILED, "failed": _name(event), "error": fault(error)}
        )


def _own_line(
    event: Event, spec: Spec, fields: Mapping[str, object], *, error: BaseException | None
) -> _Line:
    allowed = spec.fields
    line: _Line = {"level": spec.level, "event": event.value}
    line |= {name: presentable(value) for name, value in fields.items() if name in allowed}
    dropped = len(fields) - sum(name in allowed for name in fields)
    if dropped:
        line["fields_left_out"] = dropped
    if error is not None:
        line["error"] = fault(error)
    return line


def _handled(exc_info: object) -> BaseException | None:
    if isinstance(exc_info, BaseException):
        return exc_info
    return sys.exc_info()[1] if exc_info else None


def _name(event: object) -> str:
    return event.value if isinstance(event, Event) else f"<{type(event).__name__}>"


def configure(level: str, *, stream: TextIO | None = None) -> None:
    """Send everything that is logged from `level` on (DEBUG, INFO, WARNING, ERROR, CRITICAL) to `stream`.

    Takes over every logger that exists, their own handlers included, and Python's warnings. Without a
    stream this is the process's own log on standard error, and exceptions nobody catches are logged there
    as well. May be repeated.
    """
    global _stream
    threshold = logging.getLevelNamesMapping()[level.upper()]
    _stream = _Stream(stream, threshold)
    logging.raiseExceptions = False  # its way of telling prints a record's raw arguments
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_Scrubber())
    root.setLevel(threshold)
    _take_over(root.manager)
    # Its INFO is every SQL statement, which it asks about once, when an engine is made.
    statements = logging.NOTSET if threshold <= logging.DEBUG else max(threshold, logging.WARNING)
    logging.getLogger("sqlalchemy").setLevel(statements)
    logging.getLogger("alembic").setLevel(statements)  # its INFO is what our own event of a migration says
    if stream is None:
        _tell_of_crashes()


def _take_over(manager: logging.Manager) -> None:
    """gunicorn, werkzeug and alembic bring handlers of their own, which would write past the redaction."""
    for logger in list(manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
            logger.propagate = True
            logger.setLevel(logging.NOTSET)  # LOG_LEVEL says what is heard, for all of them
    warnings.showwarning = _show_warning


class _Scrubber(logging.Handler):
    """Turns a record of the standard library into one of our lines."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = _stream
        try:
            stream.write(_library_line(record))
        except Exception as error:  # noqa: BLE001 - a record that cannot be shown must not break its sender
            name = scrub(str(record.name))
            stream.write({"level": "error", "event": Event.LOG_FAILED, "failed": name, "error": fault(error)})

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Count it; the inherited way prints the record's raw arguments."""
        _stream.lost += 1


def _library_line(record: logging.LogRecord) -> _Line:
    line: _Line = {
        "level": record.levelname.lower(),
        "event": Event.LIBRARY_SPOKE.value,
        "logger": scrub(record.name),
        "message": scrub(_message(record)),
    }
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        line["error"] = fault(error)
    return line


def _message(record: logging.LogRecord) -> str:
    template = record.msg if isinstance(record.msg, str) else str(presentable(record.msg))
    if not record.args:
        return template
    arguments: Any = record.args
    if isinstance(arguments, Mapping):
        shown: Any = {name: _argument(value) for name, value in arguments.items()}
    else:
        shown = tuple(map(_argument, arguments))
    try:
        return str(template % shown)
    except (TypeError, ValueError, KeyError):
        return template


def _argument(value: object) -> object:
    """A number stays a number, so that %d goes on working."""
    if isinstance(value, (bool, int, float, str)):
        return value
    return f"<{type(value).__name__}>"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    told = scrub(f"{category.__name__}: {message}")
    if _stream.threshold <= logging.WARNING:
        shown = {
            "level": "warning",
            "event": Event.LIBRARY_SPOKE.value,
            "logger": "warnings",
            "message": told,
        }
        _stream.write(shown)


def _tell_of_crashes() -> None:
    """The interpreter's own way prints the exception's message, and with it whatever the message quotes."""
    sys.excepthook = _program_crashed
    threading.excepthook = _thread_crashed


def _program_crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, KeyboardInterrupt):
        log(Event.CRASHED, thread="main", error=error)


def _thread_crashed(crash: threading.ExceptHookArgs) -> None:
    if crash.exc_value is not None:
        log(Event.CRASHED, thread=crash.thread.name if crash.thread else "unknown", error=crash.exc_value)
