"""The log stream: JSON lines, registered fields only, libraries scrubbed, and it never raises."""

import io
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.errors import NotFound
from app.secret import Secret
from app.telemetry import REGISTER, Event, configure, log, logs

ROOT = Path(__file__).parents[2]
TOKEN = "na1-5ecret00-1111-2222-3333-444455556666"


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Give the test runner its own logging back."""
    root, stream = logging.getLogger(), logs._stream
    handlers, level, raising, showing = (
        list(root.handlers),
        root.level,
        logging.raiseExceptions,
        warnings.showwarning,
    )
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logs._stream, logging.raiseExceptions, warnings.showwarning = stream, raising, showing


class Log(io.StringIO):
    """A stream that reads its own lines."""

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def out() -> Log:
    """The log at its loudest."""
    out = Log()
    configure("DEBUG", stream=out)
    return out


def test_every_event_is_registered_and_well_named() -> None:
    """area:subject:action, a sentence, and fields that are plain words."""
    assert set(REGISTER) == set(Event)
    for event, spec in REGISTER.items():
        assert len(event.value.split(":")) == 3
        assert spec.says.endswith(".")
        assert all(field.isidentifier() for field in spec.fields)
        assert not {"email", "name", "user", "token", "time", "level", "event"} & spec.fields


def test_an_event_is_one_line_of_json_with_its_fields(out: Log) -> None:
    """Time, level, name and the registered fields."""
    log(Event.JOURNAL_REPLAYED, connection="hubspot-1", generation=3, saved=True, outcome="granted")
    (line,) = out.lines()
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "event": "broker:journal:replayed",
        "connection": "hubspot-1",
        "generation": 3,
        "saved": True,
        "outcome": "granted",
    }


def test_a_field_that_is_not_registered_does_not_get_out(out: Log) -> None:
    """Not its value, not its name; that something was left out does."""
    log(Event.REFRESH_ENDED, connection="hubspot-1", surprise="hunter2", access_token=Secret("hunter3"))
    (line,) = out.lines()
    assert line["fields_left_out"] == 2
    assert "surprise" not in out.getvalue()
    assert "hunter" not in out.getvalue()


def test_what_is_quieter_than_the_level_is_not_written() -> None:
    """And the level can be changed while the program runs."""
    out = Log()
    configure("warning", stream=out)
    log(Event.REFRESH_ENDED, connection="a")
    logging.getLogger("urllib3").info("x")
    assert out.getvalue() == ""
    log(Event.ANSWER_ODD, connection="a")
    configure("INFO", stream=out)
    log(Event.REFRESH_ENDED, connection="a")
    assert [line["level"] for line in out.lines()] == ["warning", "info"]


def test_an_exception_is_shown_without_its_message(out: Log) -> None:
    """As a field, or the one being handled."""
    log(Event.JOB_FAILED, job="x", error=ValueError(f"bad {TOKEN}"))
    try:
        raise NotFound("There is no such thing.")
    except NotFound:
        log(Event.REFRESH_CRASHED, connection="a", exc_info=True)
    log(Event.REFRESH_CRASHED, connection="a", exc_info=KeyError("k"))
    first, second, third = out.lines()
    assert first["error"]["type"] == "ValueError"
    assert second["error"]["detail"] == "There is no such thing."
    assert third["error"]["type"] == "KeyError"
    assert "5ecret" not in out.getvalue()


def test_logging_never_raises(out: Log) -> None:
    """A value that breaks when looked at, an event that is none, a stream that is closed."""

    class Broken(dict[str, str]):
        def items(self) -> Any:
            raise RuntimeError(TOKEN)

    log(Event.JOB_RAN, job=Broken(a="b"))
    log("no such event")  # type: ignore[arg-type]
    failed = out.lines()
    assert [line["event"] for line in failed] == ["telemetry:log:failed"] * 2
    assert failed[0]["failed"] == "jobs:run:done"
    assert "5ecret" not in out.getvalue()
    out.close()
    log(Event.JOB_RAN, job="x")
    logging.getLogger("any").error("x")
    assert logs.lost_lines() == 2


def test_a_line_stays_one_line(out: Log) -> None:
    """A line break in a value cannot forge another event."""
    log(Event.JOB_RAN, job='x\n{"event":"forged"}')
    assert len(out.lines()) == 1


def test_many_threads_write_whole_lines(out: Log) -> None:
    """No line is torn by another."""

    def write() -> None:
        for number in range(100):
            log(Event.JOB_RAN, job="x" * 200, done=number)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(out.lines()) == 800


# -- libraries


@pytest.mark.parametrize(
    "name", ["urllib3.connectionpool", "werkzeug", "gunicorn.error", "alembic", "unknown"]
)
@pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR])
def test_a_librarys_words_are_scrubbed_at_every_level(out: Log, name: str, level: int) -> None:
    """In the template and in the arguments."""
    logging.getLogger(name).log(
        level, 'GET "%s" %d refresh_token=abc Bearer hunter22', f"/x?code={TOKEN}", 200
    )
    (line,) = out.lines()
    assert line["event"] == "telemetry:library:spoke"
    assert line["logger"] == name
    assert line["message"].startswith('GET "/x?code=[redacted]')
    assert "200" in line["message"]
    for secret in ("5ecret", "abc", "hunter22"):
        assert secret not in out.getvalue()


def test_a_librarys_arguments_go_by_type(out: Log) -> None:
    """Rows, parameters, responses and exceptions have a repr that shows everything."""
    logger = logging.getLogger("library")
    logger.info("%r %s %s %.1f", {"name": "Ada Lovelace"}, ("Ada",), ValueError("Ada"), 2.55)
    logger.info("%(row)s", {"row": ["Ada"]})
    logger.info("100%")
    logger.info("%d", "not a number")
    logger.info(*("%s and %s", "one"))
    logger.info(ValueError("Ada"))
    messages = [line["message"] for line in out.lines()]
    assert messages[0] == "'<dict>' <tuple> <ValueError> 2.5"
    assert messages[1:5] == ["<list>", "100%", "%d", "%s and %s"]
    assert "ValueError" in messages[5]
    assert "Ada" not in out.getvalue()


def test_a_librarys_traceback_has_no_message_source_or_locals(out: Log) -> None:
    """Only where it was."""
    hidden = "hunter2"
    try:
        raise RuntimeError(hidden)
    except RuntimeError:
        logging.getLogger("library").exception("it broke")
    (line,) = out.lines()
    assert line["message"] == "it broke"
    assert line["error"]["type"] == "RuntimeError"
    assert line["error"]["at"]
    assert "hunter2" not in out.getvalue()


def test_sql_is_logged_without_its_parameters_and_rows(out: Log) -> None:
    """SQLAlchemy at DEBUG writes both, a person's name among them."""
    logging.getLogger("sqlalchemy.engine").setLevel(logging.DEBUG)
    try:
        engine = sa.create_engine("sqlite://")
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT :who AS who"), {"who": "Ada Lovelace"}).all()
        engine.dispose()
    finally:
        logging.getLogger("sqlalchemy.engine").setLevel(logging.NOTSET)
    assert "SELECT ? AS who" in out.getvalue()
    assert "Ada" not in out.getvalue()


def test_handlers_libraries_brought_along_are_taken_away() -> None:
    """gunicorn's write straight to standard error."""
    own = io.StringIO()
    logger = logging.getLogger("gunicorn.error")
    handler = logging.StreamHandler(own)
    logger.addHandler(handler)
    logger.propagate = False
    out = Log()
    configure("INFO", stream=out)
    logger.warning("token=%s", TOKEN)
    assert own.getvalue() == ""
    assert out.lines()[0]["message"] == "token=[redacted]"
    assert logger.handlers == []


def test_warnings_are_lines_too(out: Log) -> None:
    """Python prints them with the source line otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logs._show_warning
        warnings.warn(f"old {TOKEN}", UserWarning, stacklevel=1)
    (line,) = out.lines()
    assert line["message"] == "UserWarning: old [redacted]"


PROGRAM = """
import sys, threading
from app.telemetry import configure
configure("INFO")
def fail():
    secret = "hunter2"
    raise ValueError(secret)
thread = threading.Thread(target=fail, name="worker-1")
thread.start()
thread.join()
fail()
"""


def test_a_crash_is_one_line_without_the_exceptions_message() -> None:
    """Of a thread and of the program; the interpreter would print the message."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["event"], line["thread"]) for line in lines] == [
        ("telemetry:program:crashed", "worker-1"),
        ("telemetry:program:crashed", "main"),
    ]
    assert done.returncode == 1
    assert "hunter2" not in done.stderr + done.stdout


def test_importing_changes_nothing() -> None:
    """No handler, no environment variable, no file."""
    program = """
import logging, os, sys
before = dict(os.environ), sys.excepthook, list(logging.getLogger().handlers)
import app.telemetry, app.telemetry.metrics, app.http_client, app.settings, threading
assert before == (dict(os.environ), sys.excepthook, list(logging.getLogger().handlers))
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
