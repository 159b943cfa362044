"""Sealed records: AES-256-GCM under a data key of their own, which a KEK wraps.

The stored format, version 1; all of it is bytes, integers are big-endian:

    version      1 byte, 1
    algorithm    1 byte, 1 = AES-256-GCM for the record and for the wrapping
    KEK id       1 byte length, then so many bytes of ASCII
    wrapped DEK  60 bytes: nonce 12, ciphertext 32, tag 16
    nonce        12 bytes
    ciphertext   as long as the record, then the tag, 16 bytes

The DEK is wrapped with the additional data (format, KEK id, table, column, row id), the record is encrypted
with (format, table, column, row id, generation), each part preceded by its length in four bytes. So a record
opens in no other place and at no other generation, and a wrapped key opens at no other row.

Compatibility: what version 1 means never changes. A new version reads this one for as long as a database may
hold it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.crypto.keyring import WRAPPED_SIZE, Kek, Keyring
from app.errors import KeyringFault, Unopenable
from app.telemetry import Event, log, metrics

__all__ = [
    "Place",
    "Sealed",
    "Sealer",
    "check_canary",
    "kek_id_of",
    "make_canary",
    "open_",
    "rewrap",
    "seal",
]

_VERSION_AND_ALGORITHM: Final = bytes((1, 1))
_KEY_FORMAT: Final = b"drawbridge/envelope/1/key"
_RECORD_FORMAT: Final = b"drawbridge/envelope/1/record"
_DEK_SIZE: Final = 32
_NONCE_SIZE: Final = 12
_TAG_SIZE: Final = 16
_CANARY: Final = b"This opens, so the key is the right one."


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies; it opens nowhere else. `generation` is 0 for rows that have none."""

    table: str
    column: str
    row_id: str
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed record and the name of its KEK, which goes into the column beside it."""

    blob: bytes
    kek_id: str


class Sealer:
    """Seals with the KEK that is active now and opens with whichever a record names; safe for threads.

    `active` is asked at each sealing, because the database says which key is active and may change its mind.
    """

    def __init__(self, keyring: Keyring, active: Callable[[], str]) -> None:
        self._keyring = keyring
        self._active = active

    def seal(self, plaintext: bytes, place: Place) -> Sealed:
        """Seal a record for its place. Raises `Unopenable` when the active key is not in the keyring."""
        kek = self._keyring.get(self._active())
        return Sealed(seal(plaintext, place, kek=kek), kek.id)

    def open(self, blob: bytes, place: Place) -> bytes:
        """Open the record that lies at this place. Raises `Unopenable`."""
        return open_(blob, place, self._keyring)

    def rewrap(self, blob: bytes, place: Place) -> Sealed:
        """The same record under the active key. Raises `Unopenable`."""
        kek = self._keyring.get(self._active())
        return Sealed(rewrap(blob, place, self._keyring, to=kek), kek.id)


def seal(plaintext: bytes, place: Place, *, kek: Kek, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Seal a record for one place under a new data key; `random` is another one only for known-answer
    vectors."""
    data_key = random(_DEK_SIZE)
    wrapped = kek.wrap(data_key, bound_to=_key_binding(kek.id, place), random=random)
    nonce = random(_NONCE_SIZE)
    ciphertext = AESGCM(data_key).encrypt(nonce, plaintext, _record_binding(place))
    return _header(kek.id) + wrapped + nonce + ciphertext


def open_(blob: bytes, place: Place, keyring: Keyring) -> bytes:
    """Open a record. Raises `Unopenable` for another place, another key or a single changed bit."""
    try:
        return _opened(blob, place, keyring)
    except Unopenable as error:
        _tell(blob, place, error)
        raise


def _opened(blob: bytes, place: Place, keyring: Keyring) -> bytes:
    parts = _Parts.of(blob)
    data_key = keyring.get(parts.kek_id).unwrap(parts.wrapped, bound_to=_key_binding(parts.kek_id, place))
    try:
        return AESGCM(data_key).decrypt(parts.nonce, parts.ciphertext, _record_binding(place))
    except InvalidTag:
        raise Unopenable(f"A sealed record in {place.table}.{place.column} belongs elsewhere.") from None


def rewrap(
    blob: bytes, place: Place, keyring: Keyring, *, to: Kek, random: Callable[[int], bytes] = os.urandom
) -> bytes:
    """The same record with its data key wrapped by another KEK; nonce and ciphertext stay byte for byte.

    The generation of the place does not matter here: the record itself is not opened. Raises `Unopenable`.
    """
    try:
        parts = _Parts.of(blob)
        data_key = keyring.get(parts.kek_id).unwrap(parts.wrapped, bound_to=_key_binding(parts.kek_id, place))
    except Unopenable as error:
        _tell(blob, place, error)
        raise
    wrapped = to.wrap(data_key, bound_to=_key_binding(to.id, place), random=random)
    return _header(to.id) + wrapped + parts.nonce + parts.ciphertext


def kek_id_of(blob: bytes) -> str:
    """The name of the KEK that wraps a record's data key. Raises `Unopenable` for bytes of another format."""
    return _Parts.of(blob).kek_id


def make_canary(kek: Kek) -> bytes:
    """A known record under a key; stored when the key is first used, opened at every start."""
    return seal(_CANARY, _canary_place(kek.id), kek=kek)


def check_canary(blob: bytes, keyring: Keyring) -> None:
    """Raise `KeyringFault` unless the keyring has the very key that a canary was made with."""
    try:
        _prove(blob, keyring)
    except KeyringFault as fault:
        log(Event.CANARY_FAILED, kek=_claimed(blob), reason=fault.detail)
        raise


def _prove(blob: bytes, keyring: Keyring) -> None:
    try:
        kek_id = kek_id_of(blob)
        if kek_id not in keyring.ids:
            raise KeyringFault(f"The database is sealed with the key {kek_id}, which the keyring lacks.")
        opened = _opened(blob, _canary_place(kek_id), keyring)
    except Unopenable as error:
        raise KeyringFault(
            "A key of the keyring is not the one of that name the database was sealed with."
        ) from error
    if opened != _CANARY:
        raise KeyringFault("The database holds a canary that is not ours.")


@dataclass(frozen=True, slots=True)
class _Parts:
    kek_id: str
    wrapped: bytes
    nonce: bytes
    ciphertext: bytes

    @classmethod
    def of(cls, blob: bytes) -> _Parts:
        if blob[:2] != _VERSION_AND_ALGORITHM or len(blob) < 3:
            raise Unopenable("A sealed record has a format this version does not know.")
        wrapped_at = 3 + blob[2]
        nonce_at = wrapped_at + WRAPPED_SIZE
        ciphertext_at = nonce_at + _NONCE_SIZE
        if len(blob) < ciphertext_at + _TAG_SIZE:
            raise Unopenable("A sealed record is cut short.")
        # Latin-1 takes any byte; a name that is not one of the keyring's is refused there.
        kek_id = blob[3:wrapped_at].decode("latin-1")
        return cls(kek_id, blob[wrapped_at:nonce_at], blob[nonce_at:ciphertext_at], blob[ciphertext_at:])


def _tell(blob: bytes, place: Place, error: Unopenable) -> None:
    """Name the row for whoever must look at it; nothing of the record itself."""
    metrics.unopenable.inc()
    log(
        Event.RECORD_UNOPENABLE,
        table=place.table,
        column=place.column,
        row=place.row_id,
        kek=_claimed(blob),
        reason=error.detail,
    )


def _claimed(blob: bytes) -> str | None:
    """The KEK a record names, None where its bytes are no record of ours."""
    try:
        return kek_id_of(blob)
    except Unopenable:
        return None


def _header(kek_id: str) -> bytes:
    return _VERSION_AND_ALGORITHM + bytes((len(kek_id),)) + kek_id.encode("ascii")


def _key_binding(kek_id: str, place: Place) -> bytes:
    return _joined(_KEY_FORMAT, kek_id.encode(), *_row(place))


def _record_binding(place: Place) -> bytes:
    return _joined(_RECORD_FORMAT, *_row(place), struct.pack(">Q", place.generation))


def _row(place: Place) -> tuple[bytes, bytes, bytes]:
    return place.table.encode(), place.column.encode(), place.row_id.encode()


def _joined(*parts: bytes) -> bytes:
    """Each part after its length, so that no two lists of parts look alike."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def _canary_place(kek_id: str) -> Place:
    return Place("keks", "canary", kek_id)
