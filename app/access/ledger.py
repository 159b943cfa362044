"""The SQL of the trail: the only file that touches `audit`, `audit_writers` and the register of writers.

Appending happens once for every hand-out, so it is one statement that is a transaction of its own, sent past SQLAlchemy:
under load every call into a driver gives the interpreter away, and getting it back costs more than the statement. The head
row is therefore not part of it; `Trail` moves the head behind the rows, once a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any, Final

from sqlalchemy import BigInteger, Text, delete, func, select, text, tuple_, type_coerce, update
from sqlalchemy.engine import Connection

from app.access.chain import MAC_BYTES, REGISTER, ChainKeys, Head, Mark, Row, decode_head, encode_head
from app.access.spool import Batch
from app.db.engine import Database
from app.db.schema import audit, audit_register, audit_register_head, audit_writers
from app.telemetry import Event, log

__all__ = ["Ledger", "StoredWriter", "Writer"]

_COLUMNS: Final = "writer, n, at, actor, action, target, outcome, detail, mac"
_ONE_ROW: Final = "(?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT: Final = {
    "sqlite": f"INSERT INTO audit ({_COLUMNS}) VALUES {_ONE_ROW}",  # noqa: S608 - all constant
    # The same text for any number of rows: a column is an array.
    "postgresql": (
        f"INSERT INTO audit ({_COLUMNS}) SELECT $1::text, rows.* FROM unnest("  # noqa: S608 - all constant
        "$2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::bytea[]) AS rows"
    ),
}
_INSERT_ONCE: Final = text(
    f"INSERT INTO audit ({_COLUMNS}) VALUES"  # noqa: S608 - all constant
    " (:writer, :n, :at, :actor, :action, :target, :outcome, :detail, :mac) ON CONFLICT (writer, n) DO NOTHING"
)
_RAISE_HEAD: Final = text(
    "INSERT INTO audit_writers (id, host, started_at, kept_n, kept_mac, head_n, head_mac)"
    " VALUES (:id, :host, :started, 0, :kept, :n, :head)"
    " ON CONFLICT (id) DO UPDATE SET head_n = excluded.head_n, head_mac = excluded.head_mac"
    " WHERE audit_writers.head_n < excluded.head_n"
)
_MARK: Final = text(
    "INSERT INTO audit_register (n, writer, sequence, mac, link) VALUES (:n, :writer, :sequence, :mac, :link)"
    " ON CONFLICT (n) DO NOTHING"
)
_RAISE_REGISTER: Final = text(
    "INSERT INTO audit_register_head (one, n, link) VALUES (1, :n, :link)"
    " ON CONFLICT (one) DO UPDATE SET n = excluded.n, link = excluded.link"
)
_AT: Final = type_coerce(audit.c.at, BigInteger)
_STORED: Final = (
    audit.c.writer,
    audit.c.n,
    _AT.label("at"),
    audit.c.actor,
    audit.c.action,
    audit.c.target,
    audit.c.outcome,
    type_coerce(audit.c.detail, Text).label("detail"),  # the text itself: the mac covers bytes, not meaning
    audit.c.mac,
)


@dataclass(frozen=True, slots=True)
class Writer:
    """One process start; `started` in microseconds since 1970."""

    id: str
    host: str
    started: int


@dataclass(frozen=True, slots=True)
class StoredWriter:
    """A row of audit_writers; both macs still carry their seals."""

    id: str
    kept_n: int
    kept_mac: bytes
    head_n: int
    head_mac: bytes


class Ledger:
    """Reads and writes of the trail in its database."""

    def __init__(self, database: Database, keys: ChainKeys) -> None:
        self._database = database
        self._keys = keys
        self._rows_at_once = _many if database.dialect == "sqlite" else _columns

    def raise_head(self, writer: Writer, n: int, mac: bytes) -> None:
        """Store a writer if it is not there, and its head unless one as high is there; doing it twice is doing it once."""
        with self._database.write() as connection:
            self._raise_head(connection, writer, n, mac)

    def append(self, rows: Callable[[], Sequence[Row]]) -> None:
        """Append what `rows` gives, all of it or nothing.

        `rows` is called when it is this process's turn to write, so that who came while it waited is in the commit.
        """
        with self._database.single() as run:
            statement, values = self._rows_at_once(rows())
            run(statement, values)

    def deliver(self, batch: Batch) -> None:
        """Bring a spooled batch in, in a transaction of its own; doing it twice is doing it once."""
        end = batch.rows[-1]
        writer = Writer(batch.writer, batch.host, batch.started)
        with self._database.write() as connection:
            connection.execute(_INSERT_ONCE, [row._asdict() for row in batch.rows])
            self._raise_head(connection, writer, end.n, end.mac)

    def has(self, batch: Batch) -> bool:
        """Whether the rows of a batch were brought in before: the head was raised with them."""
        stored = self.writer(batch.writer)
        return stored is not None and stored.head_n >= batch.rows[-1].n

    def mark(self, writer: str, n: int, mac: bytes) -> None:
        """Note in the register how far a writer has come, if that is news; those rows must be stored."""
        with self._database.write() as connection:
            self._mark(connection, writer, n, mac)

    def mark_end(self, writer: str) -> None:
        """Note in the register where a writer that is gone has ended."""
        newest = select(audit.c.n, audit.c.mac).where(audit.c.writer == writer).order_by(audit.c.n.desc())
        with self._database.read() as connection:
            last = connection.execute(newest.limit(1)).one_or_none()
        stored = self.writer(writer)
        # Rows missing before the stored head are for `verify` to name, not for the register to confirm.
        if last is not None and stored is not None and last.n >= stored.head_n:
            self.mark(writer, last.n, bytes(last.mac))

    def marks_after(self, n: int, *, limit: int = 2000) -> Sequence[Mark]:
        """The next marks of the register in order."""
        question = select(audit_register).where(audit_register.c.n > n).order_by(audit_register.c.n)
        with self._database.read() as connection:
            found = connection.execute(question.limit(limit)).all()
        return [Mark(row.n, row.writer, row.sequence, bytes(row.mac), bytes(row.link)) for row in found]

    def register_head(self) -> Head | None:
        """Where the register ends; None when what is stored as its end is missing or not ours."""
        with self._database.read() as connection:
            return self._register_head(connection)

    def writer(self, writer: str) -> StoredWriter | None:
        """One writer's heads as stored."""
        with self._database.read() as connection:
            found = connection.execute(_writer_rows().where(audit_writers.c.id == writer)).one_or_none()
        return None if found is None else StoredWriter(*found)

    def writer_after(self, writer: str) -> str | None:
        """The next writer's id in order, whether rows or only a head are left of it; begin with the empty
        string.
        """
        with self._database.read() as connection:
            named = connection.scalar(
                select(audit_writers.c.id)
                .where(audit_writers.c.id > writer)
                .order_by(audit_writers.c.id)
                .limit(1)
            )
            written = connection.scalar(
                select(audit.c.writer).where(audit.c.writer > writer).order_by(audit.c.writer).limit(1)
            )
        return min((id_ for id_ in (named, written) if id_ is not None), default=None)

    def rows_after(self, writer: str, n: int, *, limit: int = 2000) -> Sequence[Row]:
        """A writer's next rows in order."""
        question = (
            select(*_STORED).where(audit.c.writer == writer, audit.c.n > n).order_by(audit.c.n).limit(limit)
        )
        with self._database.read() as connection:
            return [_row(found) for found in connection.execute(question)]

    def all_rows(self, *, since: datetime | None = None, page: int = 2000) -> Iterator[Row]:
        """Every row by writer and number, read page by page so that neither memory nor the database's log
        grows.
        """
        writer, n = "", 0
        while True:
            question = (
                select(*_STORED)
                .where(tuple_(audit.c.writer, audit.c.n) > tuple_(writer, n))
                .order_by(audit.c.writer, audit.c.n)
                .limit(page)
            )
            if since is not None:
                question = question.where(audit.c.at >= since)
            with self._database.read() as connection:
                found = [_row(row) for row in connection.execute(question)]
            yield from found
            if len(found) < page:
                return
            writer, n = found[-1].writer, found[-1].n

    def search(
        self,
        *,
        equal: dict[str, str],
        since: datetime | None,
        until: datetime | None,
        before: tuple[int, str, int] | None,
        limit: int,
    ) -> Sequence[Row]:
        """Rows newest first; `before` is (at, writer, n) of the last row of the page before."""
        question = select(*_STORED).where(*(audit.c[name] == value for name, value in equal.items()))
        if since is not None:
            question = question.where(audit.c.at >= since)
        if until is not None:
            question = question.where(audit.c.at < until)
        if before is not None:
            question = question.where(tuple_(_AT, audit.c.writer, audit.c.n) < tuple_(*before))
        question = question.order_by(audit.c.at.desc(), audit.c.writer.desc(), audit.c.n.desc()).limit(limit)
        with self._database.read() as connection:
            return [_row(found) for found in connection.execute(question)]

    def first_since(self, writer: str, moment: datetime) -> int | None:
        """The lowest number of a writer's rows at or after the moment."""
        question = select(audit.c.n).where(audit.c.writer == writer, audit.c.at >= moment).order_by(audit.c.n)
        with self._database.read() as connection:
            return connection.scalar(question.limit(1))

    def newest(self, writer: str) -> int:
        """The highest number of a writer's rows, 0 without any."""
        question = select(audit.c.n).where(audit.c.writer == writer).order_by(audit.c.n.desc()).limit(1)
        with self._database.read() as connection:
            return connection.scalar(question) or 0

    def forget(self, writer: str, *, kept_before: int, up_to: int, mac: bytes) -> int:
        """Remove rows up to a number and put the kept head there, in one transaction; the count of rows
        removed. A head that a killed writer left behind them comes along.
        """
        kept = encode_head(self._keys, "kept", writer, up_to, mac)
        with self._database.write() as connection:
            moved = connection.execute(
                update(audit_writers)
                .where(audit_writers.c.id == writer, audit_writers.c.kept_n == kept_before)
                .values(kept_n=up_to, kept_mac=kept)
            )
            if moved.rowcount != 1:  # somebody else prunes at this moment
                return 0
            connection.execute(
                update(audit_writers)
                .where(audit_writers.c.id == writer, audit_writers.c.head_n < up_to)
                .values(head_n=up_to, head_mac=self._head(writer, up_to, mac))
            )
            return connection.execute(
                delete(audit).where(audit.c.writer == writer, audit.c.n <= up_to)
            ).rowcount

    def _head(self, writer: str, n: int, mac: bytes) -> bytes:
        return encode_head(self._keys, "head", writer, n, mac)

    def _raise_head(self, connection: Connection, writer: Writer, n: int, mac: bytes) -> None:
        values = {
            "id": writer.id,
            "host": writer.host,
            "started": writer.started,
            "kept": encode_head(self._keys, "kept", writer.id, 0, self._keys.origin(writer.id)),
            "n": n,
            "head": self._head(writer.id, n, mac),
        }
        if connection.scalar(select(audit_writers.c.id).where(audit_writers.c.id == writer.id)) is None:
            # In one transaction: no writer without its place in the register, and none there that is not here.
            self._mark(connection, writer.id, 0, self._keys.origin(writer.id))
        connection.execute(_RAISE_HEAD, values)

    def _mark(self, connection: Connection, writer: str, n: int, mac: bytes) -> None:
        self._database.take_turns(connection, "audit register")
        listed = select(func.max(audit_register.c.sequence)).where(audit_register.c.writer == writer)
        newest = connection.scalar(listed)
        if newest is not None and newest >= n:
            return
        head = self._register_head(connection)
        if head is None:
            # To go on from what somebody else put there would put our seal under it.
            log(Event.AUDIT_BROKEN, writer=REGISTER, reason="The end of the register of writers is not ours.")
            return
        mark = Mark(head.n + 1, writer, n, mac, b"")
        mark = mark._replace(link=self._keys.link(bytes.fromhex(head.mac), mark))
        if connection.execute(_MARK, mark._asdict()).rowcount != 1:
            log(Event.AUDIT_BROKEN, writer=REGISTER, sequence=mark.n, reason="A line of it is not ours.")
            return  # recording goes on; `verify` names the line
        sealed = encode_head(self._keys, "register", REGISTER, mark.n, mark.link)
        connection.execute(_RAISE_REGISTER, {"n": mark.n, "link": sealed})

    def _register_head(self, connection: Connection) -> Head | None:
        stored = connection.execute(select(audit_register_head.c.n, audit_register_head.c.link)).one_or_none()
        if stored is None:
            begun = connection.scalar(select(audit_register.c.n).limit(1)) is not None
            return None if begun else Head(REGISTER, 0, bytes(MAC_BYTES).hex())
        link = decode_head(self._keys, "register", REGISTER, stored.n, bytes(stored.link))
        return None if link is None else Head(REGISTER, stored.n, link.hex())


def _many(rows: Sequence[Row]) -> tuple[str, Sequence[Any]]:
    return _inserting(len(rows)), tuple(chain.from_iterable(rows))


@lru_cache(maxsize=128)  # as many statements as the driver keeps prepared
def _inserting(count: int) -> str:
    return _INSERT["sqlite"].replace(_ONE_ROW, ", ".join([_ONE_ROW] * count))


def _columns(rows: Sequence[Row]) -> tuple[str, Sequence[Any]]:
    """Arrays as PostgreSQL writes them (manual, 8.15.2): an eighth of the driver's own work for lists."""
    _, numbers, moments, *texts, macs = zip(*rows, strict=True)
    arrays = [*map(_array, (numbers, moments)), *(_array(map(_element, column)) for column in texts)]
    return _INSERT["postgresql"], (rows[0].writer, *arrays, _array(f'"\\\\x{mac.hex()}"' for mac in macs))


def _array(elements: Iterable[object]) -> str:
    return "{" + ",".join(map(str, elements)) + "}"


@lru_cache(maxsize=4096)  # the same few texts make up nearly all rows
def _element(value: str | None) -> str:
    if value is None:
        return "NULL"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _writer_rows() -> Any:
    columns = audit_writers.c
    return select(columns.id, columns.kept_n, columns.kept_mac, columns.head_n, columns.head_mac)


def _row(found: Any) -> Row:
    return Row._make((*found[:8], bytes(found[8])))
