"""The proof of the trail: reads every row in order and says where the chain breaks, if it does.

Memory is bounded by a page of rows. It may run beside live writers and a prune: what they move meanwhile is
read again before anything is called wrong.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from app.access.chain import ChainKeys, Head, Row, decode_head
from app.access.ledger import Ledger, StoredWriter
from app.telemetry import Event, log

__all__ = ["Bad", "Verdict", "inspect", "prune"]

_PREFIX: Final = 16  # hex digits, 64 bits: what the log shows of a head
_BEFORE_ALL: Final = -(2**62)


@dataclass(frozen=True, slots=True)
class Bad:
    """The first row that is not as it was written: writer, number, and what is wrong in a sentence."""

    writer: str
    n: int
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an inspection found; `rows` and `writers` are how many were sound before it ended."""

    rows: int
    writers: int
    bad: Bad | None

    @property
    def sound(self) -> bool:
        """Whether the whole trail is as it was written."""
        return self.bad is None


@dataclass(frozen=True, slots=True)
class _Position:
    n: int
    mac: bytes


class _Broken(Exception):
    def __init__(self, n: int, why: str) -> None:
        super().__init__(why)
        self.n = n
        self.why = why


def inspect(ledger: Ledger, keys: ChainKeys, heads: Sequence[Head] = ()) -> Verdict:
    """Check the whole trail and stop at the first bad row; `heads` are those somebody kept elsewhere."""
    if any(len(head.mac) < _PREFIX for head in heads):
        raise ValueError("a head is compared by at least sixteen hex digits of its mac")
    rows = writers = 0
    for writer in _writers(ledger, heads):
        try:
            rows += _walk_writer(ledger, keys, writer, [head for head in heads if head.writer == writer])
        except _Broken as broken:
            return Verdict(rows, writers, Bad(writer, broken.n, broken.why))
        writers += 1
    return Verdict(rows, writers, None)


def prune(ledger: Ledger, keys: ChainKeys, older_than: datetime) -> int:
    """Remove each writer's rows from before a moment and move its kept head; the count of rows removed."""
    removed = segments = 0
    for writer in _writers(ledger, ()):
        try:
            count = _prune_writer(ledger, keys, writer, older_than)
        except _Broken as broken:
            log(Event.AUDIT_BROKEN, writer=writer, sequence=broken.n, reason=broken.why)
            continue
        removed += count
        segments += bool(count)
    if removed:
        log(Event.AUDIT_PRUNED, segments=segments, entries=removed, before=older_than.isoformat())
    return removed


def _writers(ledger: Ledger, heads: Sequence[Head]) -> Iterator[str]:
    named = sorted({head.writer for head in heads})
    writer = ""
    while True:
        stored = ledger.writer_after(writer)
        kept_elsewhere = next((name for name in named if name > writer), None)
        found = min((name for name in (stored, kept_elsewhere) if name is not None), default=None)
        if found is None:
            return
        yield found
        writer = found


def _walk_writer(ledger: Ledger, keys: ChainKeys, writer: str, heads: Sequence[Head]) -> int:
    """Check one writer; the count of its rows. A prune that moves the kept head under us makes it begin
    again.
    """
    while True:
        stored = _stored(ledger, writer, heads)
        try:
            return _walk_from(ledger, keys, stored, heads)
        except _Broken:
            again = ledger.writer(writer)
            if again is None or again.kept_n == stored.kept_n:
                raise


def _walk_from(ledger: Ledger, keys: ChainKeys, stored: StoredWriter, heads: Sequence[Head]) -> int:
    """Check from the kept head to the last row. Rows behind the stored head are as good as those before it: a live writer
    moves its head once a second, and a killed one leaves it where it was.
    """
    known = [*heads, _head(keys, stored)]
    position = start = _kept(keys, stored)
    _compare(position, known)
    while page := ledger.rows_after(stored.id, position.n if position is not start else _BEFORE_ALL):
        for row in page:
            position = _step(keys, position, row)
            _compare(position, known)
    if stored.head_n > position.n:
        raise _Broken(position.n + 1, "This row is missing: the stored head is further on.")
    if any(head.n > position.n for head in heads):
        raise _Broken(position.n + 1, "This row is missing: a head that was kept elsewhere is further on.")
    return position.n - start.n


def _step(keys: ChainKeys, position: _Position, row: Row) -> _Position:
    if row.n <= position.n:
        raise _Broken(row.n, "This row lies before the head that pruning kept.")
    if row.n != position.n + 1:
        raise _Broken(position.n + 1, "This row is missing.")
    mac = keys.mac(position.mac, row)
    if not hmac.compare_digest(mac, row.mac):
        raise _Broken(row.n, "This row was edited, or another one was put in its place.")
    return _Position(row.n, mac)


def _compare(position: _Position, heads: Sequence[Head]) -> None:
    for head in heads:
        if head.n == position.n and not position.mac.hex().startswith(head.mac.lower()):
            raise _Broken(position.n, "This row differs from a head that was kept.")


def _head(keys: ChainKeys, stored: StoredWriter) -> Head:
    mac = decode_head(keys, "head", stored.id, stored.head_n, stored.head_mac)
    if mac is None:
        raise _Broken(stored.head_n, "The stored head was edited.")
    return Head(stored.id, stored.head_n, mac.hex())


def _stored(ledger: Ledger, writer: str, heads: Sequence[Head]) -> StoredWriter:
    stored = ledger.writer(writer)
    if stored is not None:
        return stored
    first = ledger.rows_after(writer, _BEFORE_ALL, limit=1)
    n = first[0].n if first else min((head.n for head in heads), default=1)
    raise _Broken(n, "No head is stored for this writer.")


def _kept(keys: ChainKeys, stored: StoredWriter) -> _Position:
    mac = decode_head(keys, "kept", stored.id, stored.kept_n, stored.kept_mac)
    if mac is None:
        raise _Broken(stored.kept_n, "The head that pruning kept was edited.")
    return _Position(stored.kept_n, mac)


def _prune_writer(ledger: Ledger, keys: ChainKeys, writer: str, older_than: datetime) -> int:
    stored = _stored(ledger, writer, ())
    position = _kept(keys, stored)
    newest = max(stored.head_n, ledger.newest(writer))
    first_kept = ledger.first_since(writer, older_than)
    last = newest if first_kept is None else first_kept - 1
    removed = 0
    while position.n < last:
        before = position
        page = [row for row in ledger.rows_after(writer, before.n) if row.n <= last]
        if not page:
            raise _Broken(before.n + 1, "This row is missing.")
        for row in page:
            position = _step(keys, position, row)
        if not ledger.forget(writer, kept_before=before.n, up_to=position.n, mac=position.mac):
            break
        removed += len(page)
    return removed
