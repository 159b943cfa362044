"""The bytes an audit row is authenticated as, and the chain they form.

Every process start is one writer. Its rows are numbered 1, 2, 3, … and each carries

    mac(n) = HMAC-SHA256(row key, mac(n-1) || body(n))          mac(0) = HMAC-SHA256(origin key, writer)

    body   = n                unsigned, 8 bytes; all numbers are big endian
           | at               signed, 8 bytes: microseconds since 1970
           | 6 × length       unsigned, 4 bytes each; 0xFFFFFFFF stands for an absent detail
           | writer | actor | action | target | outcome | detail      UTF-8, detail as the JSON text stored

All fields have their length in front, so no two rows share a body. A head is (writer, n, mac(n)); where it
is stored, a seal is appended, HMAC-SHA256(seal key, kind | writer | n | mac), because mac(n) itself stands
in the table for anyone to copy: without the seal whoever can write to the database could cut off the tail
or the beginning and move the head row along.

A chain proves what stands in it, not that it was ever there. So every writer is listed in a register when it
begins, when it ends and now and then between, each time with its number and mac; the marks are chained too,

    link(i) = HMAC-SHA256(register key, link(i-1) || i | n | length | writer | mac(n))      link(0) = 32 zero bytes

and the newest link is kept under a seal. So no writer vanishes, and none falls behind its newest mark, unless all
that any writer was marked with since goes too. Two things the database alone cannot show, because all of it was
genuine once: the whole trail put back to an earlier state of it, and one writer put back to a head it has had since
its newest mark. The heads in the log show both, the register's among them.

Compatibility: rows are kept for years. A change of these bytes needs a new origin (hence a new writer) and
must keep verifying the old ones; never edit this encoding in place.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

__all__ = ["REGISTER", "ChainKeys", "Head", "Kind", "Mark", "Row", "decode_head", "encode_head"]

Kind = Literal["head", "kept", "register"]
REGISTER: Final = "register"  # whose head the newest link of the register is; no writer is called so

MAC_BYTES: Final = 32
_ABSENT: Final = 0xFFFFFFFF
_FIXED: Final = struct.Struct(">Qq6I")


class Row(NamedTuple):
    """One audit row exactly as it is stored; `at` in microseconds since 1970, `detail` as JSON text."""

    writer: str
    n: int
    at: int
    actor: str
    action: str
    target: str
    outcome: str
    detail: str | None
    mac: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """Where a writer's chain stands; `mac` is hex, a prefix of at least 16 digits is enough to compare
    with.
    """

    writer: str
    n: int
    mac: str


class Mark(NamedTuple):
    """One line of the register: `writer` stood at row `sequence` with this mac; 0 is its beginning."""

    n: int
    writer: str
    sequence: int
    mac: bytes
    link: bytes


class ChainKeys:
    """The keys of the chain, derived from one key that lives outside the audit database."""

    __slots__ = ("_origin", "_register", "_row", "_seal")

    def __init__(self, key: bytes) -> None:
        if len(key) < MAC_BYTES:
            raise ValueError("the audit key has at least 32 bytes")
        self._row = hmac.digest(key, b"drawbridge audit 1 row", "sha256")
        self._origin = hmac.digest(key, b"drawbridge audit 1 origin", "sha256")
        self._seal = hmac.digest(key, b"drawbridge audit 1 seal", "sha256")
        self._register = hmac.digest(key, b"drawbridge audit 1 register", "sha256")

    def origin(self, writer: str) -> bytes:
        """The mac before a writer's first row."""
        return hmac.digest(self._origin, writer.encode(), "sha256")

    def mac(self, previous: bytes, row: Row) -> bytes:
        """The mac of a row that follows `previous`; the row's own `mac` field is not looked at."""
        texts = [text.encode("utf-8", "surrogatepass") for text in (row.writer, *row[3:7])]
        detail = None if row.detail is None else row.detail.encode("utf-8", "surrogatepass")
        lengths = [len(text) for text in texts]
        lengths.append(_ABSENT if detail is None else len(detail))
        message = b"".join((previous, _FIXED.pack(row.n, row.at, *lengths), *texts, detail or b""))
        return hmac.digest(self._row, message, "sha256")

    def link(self, previous: bytes, mark: Mark) -> bytes:
        """The link of a mark that follows `previous`; the mark's own `link` field is not looked at."""
        name = mark.writer.encode("utf-8", "surrogatepass")
        numbers = struct.pack(">QQI", mark.n, mark.sequence, len(name))
        return hmac.digest(self._register, b"".join((previous, numbers, name, mark.mac)), "sha256")

    def seal(self, kind: Kind, writer: str, n: int, mac: bytes) -> bytes:
        """What proves that we, and nobody with mere access to the database, put this head there."""
        name = writer.encode()
        message = kind.encode() + struct.pack(">QI", n, len(name)) + name + mac
        return hmac.digest(self._seal, message, "sha256")


def encode_head(keys: ChainKeys, kind: Kind, writer: str, n: int, mac: bytes) -> bytes:
    """The bytes of a head as audit_writers keeps them: mac and seal."""
    return mac + keys.seal(kind, writer, n, mac)


def decode_head(keys: ChainKeys, kind: Kind, writer: str, n: int, stored: bytes) -> bytes | None:
    """The mac of a stored head; None when its seal is not ours."""
    mac, seal = stored[:MAC_BYTES], stored[MAC_BYTES:]
    return mac if hmac.compare_digest(seal, keys.seal(kind, writer, n, mac)) else None
