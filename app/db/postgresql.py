"""What `engine` must know of PostgreSQL: how to connect, which limits to set, what its errors mean."""

from __future__ import annotations

import contextlib
import hashlib
import select
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Literal, cast

import psycopg
import sqlalchemy as sa
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, Engine

from app.clock import Clock

__all__ = ["Postgresql"]

WAIT: Final = 5.0  # seconds for a free connection of the pool
_ANSWER_LIMIT: Final = 15.0  # seconds without an answer from the server before a connection is given up
_CANCEL: Final = 2.0  # seconds to have a statement cancelled
_IDLE_PROBE: Final = 30.0  # seconds idle after which a firewall may have dropped a connection unnoticed


class Postgresql:
    """A server, perhaps behind a transaction pooler: no session state, limits are set per transaction."""

    name: Literal["sqlite", "postgresql"] = "postgresql"

    def __init__(self, url: URL, clock: Clock, *, threads: int) -> None:
        self._url = url
        self._clock = clock
        # A connection is held for milliseconds, never during a call to a provider. Four workers of 32 threads
        # stay at 4 × 20 = 80, under PostgreSQL's default of 100.
        self._kept = max(2, threads // 4)
        self._burst = max(2, threads // 4 + 4)

    def engine(self) -> Engine:
        engine = sa.create_engine(
            self._url,
            pool_size=self._kept,
            max_overflow=self._burst,
            pool_timeout=WAIT,
            pool_recycle=1800,
            pool_use_lifo=True,  # lets the ones above the usual need grow idle
            hide_parameters=True,
            use_native_hstore=False,  # saves a query at each connect
            connect_args={
                "autocommit": True,
                "prepare_threshold": None,
                "connect_timeout": 5,
                "application_name": "drawbridge",
                "keepalives_idle": 20,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 15_000,  # milliseconds until unacknowledged bytes end the connection
            },
        )
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "checkin", self._note_idle)
        event.listen(engine, "checkout", self._probe)
        return engine

    def begin(self, connection: Connection, patience: float) -> None:
        """One message, so the limits cost no round trip; the lock wait ends first because its error says
        more."""
        _impatient(connection).answer_limit = 2 * patience + 5
        wait = int(patience * 1000)
        connection.exec_driver_sql(
            "BEGIN ISOLATION LEVEL READ COMMITTED; "
            f"SET LOCAL lock_timeout = {wait * 4 // 5}; SET LOCAL statement_timeout = {wait}; "
            # A frozen process must not keep its row locks.
            f"SET LOCAL idle_in_transaction_session_timeout = {2 * wait}"
        )

    def gate(self, _patience: float) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def take_turns(self, connection: Connection, name: str) -> None:
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))

    def insist_unbroken(self, connection: Connection) -> None:
        """After a failed statement COMMIT would quietly roll back; on SQLite it would not, so neither may
        pass."""
        if _impatient(connection).info.transaction_status == TransactionStatus.INERROR:
            raise RuntimeError(
                "a statement failed inside write(); to survive that use connection.begin_nested()"
            )

    def send(
        self,
        connection: Connection,
        patience: float,
        statement: str,
        values: Sequence[str | int | bytes | None],
    ) -> int:
        """Run one statement that is a transaction of its own and return how many rows it touched.

        One that takes longer than `patience` seconds is cancelled on the server and the connection given up.

        Straight through libpq: the driver hands the interpreter over several times for each statement, and under load
        getting it back costs more than the statement itself. Raises SQLAlchemy's errors.
        """
        raw = _impatient(connection)
        try:
            result = _answer(raw, patience, statement.encode(), [_text(value) for value in values])
            if result.status != ExecStatus.COMMAND_OK:
                raise psycopg.errors.error_from_result(result)
        except psycopg.IntegrityError as error:
            raise exc.IntegrityError(None, None, error) from error
        except psycopg.Error as error:
            if raw.closed:
                connection.invalidate()
            raise exc.OperationalError(None, None, error, connection_invalidated=raw.closed) from error
        return result.command_tuples or 0

    def explain(self, error: exc.DBAPIError) -> str | None:
        state = getattr(error.orig, "sqlstate", None)
        if state is None:
            return _GONE if isinstance(error.orig, psycopg.OperationalError) else None
        for length in (5, 2):  # the whole code, else its class
            if sentence := _POSTGRESQL_SENTENCES.get(state[:length]):
                return sentence
        return _GONE if error.connection_invalidated else None

    def before_fork(self, engine: Engine) -> None:
        """Nothing to close: a socket that the child leaves alone stays the parent's."""

    def after_fork(self, *, child: bool) -> None:
        """Nothing beside the pool to renew."""

    def _connect(self, _dialect: Any, _record: Any, arguments: Any, options: Any) -> psycopg.Connection[Any]:
        return _Impatient.connect(*arguments, **options)

    def _note_idle(self, raw: _Impatient | None, record: Any) -> None:
        if raw is not None:  # else it was given up
            raw.answer_limit = _ANSWER_LIMIT
            record.info["idle_since"] = self._clock.elapsed()

    def _probe(self, raw: _Impatient, record: Any, _proxy: Any) -> None:
        """Let the pool replace connections that died while idle, without a round trip on the usual way.

        An idle connection has nothing to say; if there is something to read, it is the server's good-bye.
        """
        idle = self._clock.elapsed() - record.info.get("idle_since", self._clock.elapsed())
        try:
            if idle >= _IDLE_PROBE or _something_to_read(raw.fileno()):
                raw.execute("SELECT 1")
        except psycopg.Error as error:
            raise exc.InvalidatePoolError from error


def _answer(raw: _Impatient, patience: float, statement: bytes, values: Sequence[bytes | None]) -> PGresult:
    line = raw.pgconn
    line.send_query_params(statement, values)
    while line.flush():  # the socket takes no more for now; the server may have to be read before it reads
        _until_ready(raw, patience, select.POLLIN | select.POLLOUT)
        line.consume_input()
    while line.is_busy():
        _until_ready(raw, patience, select.POLLIN)
        line.consume_input()
    result = line.get_result()
    while line.get_result() is not None:  # libpq says the end with a result of none
        pass
    if result is None:
        raise psycopg.OperationalError("the server ended the connection")
    return result


def _text(value: str | int | bytes | None) -> bytes | None:
    """A parameter in PostgreSQL's text form."""
    if value is None or isinstance(value, bytes):
        return None if value is None else b"\\x%b" % value.hex().encode()
    return str(value).encode()


def _until_ready(raw: _Impatient, patience: float, what: int) -> None:
    poll = select.poll()
    poll.register(raw.pgconn.socket, what)
    if poll.poll(1000 * patience):
        return
    # Left alone, the statement would go on waiting there with its connection long after we have given it up.
    with contextlib.suppress(psycopg.Error):
        raw.cancel_safe(timeout=_CANCEL)
    raw.close()
    raise psycopg.OperationalError("the server does not answer")


class _Impatient(psycopg.Connection[Any]):
    """A connection that is given up when the server holds it but does not answer: stopped, or its host
    hangs."""

    answer_limit = _ANSWER_LIMIT

    def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
        """Wait like the parent class, but not for ever."""
        options.setdefault("timeout", self.answer_limit)
        try:
            return super().wait(gen, *arguments, **options)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.close()  # in the middle of an answer: of no use to anybody
            raise


def _impatient(connection: Connection) -> _Impatient:
    return cast("_Impatient", connection.connection.dbapi_connection)


def _something_to_read(descriptor: int, *, seconds: float = 0.0) -> bool:
    poll = select.poll()  # not select(), which knows descriptors below 1024 only
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


_GONE: Final = "The database server cannot be reached, refuses us or has closed the connection."
_POSTGRESQL_SENTENCES: Final = {  # PostgreSQL manual, Appendix A: five characters are one code, two its class
    "08": _GONE,
    "25006": "The database is read-only.",
    "25P03": "The database ended a transaction that stood still.",
    "25P04": "The database ended a transaction that took too long.",
    "40": "The database gave way to a competing transaction.",
    "42501": "The database user lacks a privilege.",
    "53100": "The disk of the database server is full.",
    "53": "The database server lacks resources.",
    "55P03": "The database stayed locked by another writer.",
    "57014": "The database took too long.",
    "57": "The database server is starting, stopping or restarting.",
    "58": "The database server has a system error.",
    "XX": "The database server reports damage.",
}
