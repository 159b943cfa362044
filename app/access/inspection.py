"""The proof of the trail: reads every row in order and says where the chain breaks, if it does.

The register of writers comes first: whoever is in it must be there, with every row it had when it was marked.

Memory is bounded by a page of rows and the register. It may run beside live writers and a prune: what they move meanwhile is
read again before anything is called wrong.
"""

from __future__ import annotations

import hmac
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from app.access.chain import MAC_BYTES, REGISTER, ChainKeys, Head, Mark, Row, decode_head
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
    writer = REGISTER
    register = _Register(ledger, keys, heads)
    try:
        register.read()
        for writer in _writers(ledger, register.heads()):
            rows += _walk_writer(ledger, keys, writer, register)
            writers += 1
    except _Broken as broken:
        return Verdict(rows, writers, Bad(writer, broken.n, broken.why))
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


class _Register:
    """What is known of each writer beside its rows: the marks of the register and the heads somebody kept."""

    def __init__(self, ledger: Ledger, keys: ChainKeys, heads: Sequence[Head]) -> None:
        self._ledger = ledger
        self._keys = keys
        self._kept = [head for head in heads if head.writer == REGISTER]
        self._known: dict[str, list[Head]] = {}
        self._listed: set[str] = set()
        self._position = _Position(0, bytes(MAC_BYTES))
        for head in heads:
            if head.writer != REGISTER:
                self._known.setdefault(head.writer, []).append(head)

    def heads(self) -> list[Head]:
        """Every head that is known of any writer."""
        return [head for heads in self._known.values() for head in heads]

    def of(self, writer: str) -> list[Head]:
        """The heads that are known of one."""
        return self._known.get(writer, [])

    def lists(self, writer: str) -> bool:
        """Whether a writer is in it; one that has just begun is looked for in what was added meanwhile."""
        if writer not in self._listed:
            self.read()
        return writer in self._listed

    def read(self) -> None:
        """Check what was added since the last call, from the beginning at first."""
        end = self._ledger.register_head()
        if end is None:
            raise _Broken(self._position.n, "The end of the register of writers was edited or removed.")
        known = _by_number([*self._kept, end])
        _compare(self._position, known)
        while page := self._ledger.marks_after(self._position.n if self._position.n else _BEFORE_ALL):
            for mark in page:
                self._step(mark)
                _compare(self._position, known)
        if max(known) > self._position.n:
            raise _Broken(self._position.n + 1, "This line of the register of writers is missing.")

    def _step(self, mark: Mark) -> None:
        if mark.n != self._position.n + 1:
            raise _Broken(self._position.n + 1, "This line of the register of writers is missing.")
        if not hmac.compare_digest(self._keys.link(self._position.mac, mark), mark.link):
            raise _Broken(mark.n, "This line of the register of writers was edited.")
        self._position = _Position(mark.n, mark.link)
        self._listed.add(mark.writer)
        self._known.setdefault(mark.writer, []).append(Head(mark.writer, mark.sequence, mark.mac.hex()))


def _writers(ledger: Ledger, heads: Sequence[Head]) -> Iterator[str]:
    named = sorted({head.writer for head in heads})
    writer = ""
    while True:
        stored = ledger.writer_after(writer)
        at = bisect_right(named, writer)
        kept_elsewhere = named[at] if at < len(named) else None
        found = min((name for name in (stored, kept_elsewhere) if name is not None), default=None)
        if found is None:
            return
        yield found
        writer = found


def _walk_writer(ledger: Ledger, keys: ChainKeys, writer: str, register: _Register) -> int:
    """Check one writer; the count of its rows. A prune that moves the kept head under us makes it begin
    again.
    """
    while True:
        stored = _stored(ledger, writer, register.of(writer))
        if not register.lists(writer):
            raise _Broken(stored.kept_n + 1, "The writer of this row is not in the register of writers.")
        heads = register.of(writer)
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
    known = _by_number([*heads, _head(keys, stored)])
    position = start = _kept(keys, stored)
    _compare(position, known)
    while page := ledger.rows_after(stored.id, position.n if position is not start else _BEFORE_ALL):
        for row in page:
            position = _step(keys, position, row)
            _compare(position, known)
    if stored.head_n > position.n:
        raise _Broken(position.n + 1, "This row is missing: the stored head is further on.")
    if any(head.n > position.n for head in heads):
        raise _Broken(
            position.n + 1, "This row is missing: the register, or a head kept elsewhere, is further on."
        )
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


def _by_number(heads: Sequence[Head]) -> dict[int, list[str]]:
    known: dict[int, list[str]] = {}
    for head in heads:
        known.setdefault(head.n, []).append(head.mac.lower())
    return known


def _compare(position: _Position, known: Mapping[int, Sequence[str]]) -> None:
    for mac in known.get(position.n, ()):
        if not position.mac.hex().startswith(mac):
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
    if first:
        raise _Broken(first[0].n, "No head is stored for this writer.")
    n = min((head.n for head in heads if head.n), default=1)
    raise _Broken(n, "This writer is gone, with its head and all its rows.")


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
