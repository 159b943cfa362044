"""The key encryption keys: from the environment, or from a file that development makes for itself.

Both hold one JSON object, `{"active": "k2", "keys": {"k1": "<base64 of 32 bytes>", "k2": "…"}}`. Which key
seals is said by the database; `active` is only what a new installation begins with. Faults never repeat what
was found: where a name is expected there may be a key.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.errors import KeyringFault, Unopenable
from app.secret import Secret
from app.telemetry import Event, log

if TYPE_CHECKING:
    from app.settings import Settings

__all__ = ["WRAPPED_SIZE", "Kek", "Keyring"]

_KEY_SIZE: Final = 32
_NONCE_SIZE: Final = 12
_TAG_SIZE: Final = 16
WRAPPED_SIZE: Final = _NONCE_SIZE + _KEY_SIZE + _TAG_SIZE  # 60 bytes: a data key as a KEK wraps it
# Shorter than the base64 of a key (43 characters and more), so that a key in the place of a name is not taken
# for one.
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_FILE_NAME: Final = "keyring.json"


class Kek:
    """One key encryption key, which can wrap and unwrap data keys and show nothing of itself.

    The bytes go into the cipher and are not kept. A key in Vault Transit or a cloud KMS would offer the same
    two methods. Wrapping uses random 96-bit nonces: good for 2^32 records under one key (NIST SP 800-38D
    §8.3).
    """

    __slots__ = ("_cipher", "id")

    def __init__(self, kek_id: str, key: bytes) -> None:
        if not _ID.fullmatch(kek_id) or len(key) != _KEY_SIZE:
            raise ValueError("a KEK has a short name and 32 bytes")
        self.id = kek_id
        self._cipher = AESGCM(key)

    def wrap(self, data_key: bytes, *, bound_to: bytes, random: Callable[[int], bytes] = os.urandom) -> bytes:
        """Encrypt a data key so that it opens only with the same `bound_to`: nonce, ciphertext, tag."""
        nonce = random(_NONCE_SIZE)
        return nonce + self._cipher.encrypt(nonce, data_key, bound_to)

    def unwrap(self, wrapped: bytes, *, bound_to: bytes) -> bytes:
        """The data key again. Raises `Unopenable` when key, binding or bytes are not those of the
        wrapping."""
        try:
            return self._cipher.decrypt(wrapped[:_NONCE_SIZE], wrapped[_NONCE_SIZE:], bound_to)
        except InvalidTag:
            raise Unopenable(f"A sealed record does not open with the key {self.id}.") from None

    def __repr__(self) -> str:
        return f"Kek({self.id!r}, …)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Kek is not pickled")


@dataclass(frozen=True, slots=True)
class _Content:
    active: str
    keks: Mapping[str, Kek]


class Keyring:
    """The keys this process holds, by name; safe for threads.

    One that comes from a file is read again when a name is asked for that it lacks and the file has changed,
    so that a key added while processes run reaches them. Every fault of the text or file is raised at once as
    one `KeyringFault`.
    """

    def __init__(
        self,
        content: _Content,
        *,
        file: Path | None = None,
        seen: tuple[int, ...] = (),
        private: bool = True,
    ) -> None:
        self._content = content
        self._seen = seen
        self._private = private
        self.file = file

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """The keyring of the settings; in development without one, that of `STATE_DIR`, made if need be.

        Raises `KeyringFault`; always in production without one, for an invented key would die with its disk.
        """
        if settings.keyring_file is not None:
            return cls.from_file(settings.keyring_file, private=False)
        if settings.keyring is not None:
            return cls.from_text(settings.keyring)
        if settings.environment == "production":
            raise KeyringFault(
                "No keyring: set DRAWBRIDGE_KEYRING or DRAWBRIDGE_KEYRING_FILE; production invents none."
            )
        file = settings.state_dir / _FILE_NAME
        if not file.exists():
            _make_file(file)
        return cls.from_file(file)

    @classmethod
    def from_text(cls, text: Secret) -> Self:
        """Read a keyring from its JSON. Raises `KeyringFault`."""
        return cls(_parse(text.reveal()))

    @classmethod
    def from_file(cls, file: Path, *, private: bool = True) -> Self:
        """Read a keyring from a file. Raises `KeyringFault`.

        One of our own making nobody but its owner may read. Who may read a file the operator names is the operator's
        to say: container platforms mount secrets readable by every user of the container.
        """
        text, seen = _read_file(file, private=private)
        return cls(_parse(text), file=file, seen=seen, private=private)

    @property
    def active_hint(self) -> str:
        """The key a new installation begins with; later the database says."""
        return self._content.active

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of all keys, in the order they were written."""
        return tuple(self._content.keks)

    def get(self, kek_id: str) -> Kek:
        """The key of this name. Raises `Unopenable`, with the name, when it is not here."""
        if kek_id not in self._content.keks:
            self._look_again()
        kek = self._content.keks.get(kek_id)
        if kek is None:
            raise Unopenable(f"The keyring lacks the key {kek_id}." if _ID.fullmatch(kek_id) else None)
        return kek

    def reload(self) -> bool:
        """Read the file again if it has changed, and tell whether it had. Raises `KeyringFault`."""
        if self.file is None or _identity_of(self.file) in (None, self._seen):
            return False
        text, seen = _read_file(self.file, private=self._private)
        self._content, self._seen = _parse(text), seen
        self.tell()
        return True

    def tell(self) -> None:
        """Say in the log which keys this process holds, by their names."""
        log(Event.KEYRING_LOADED, source="file" if self.file else "environment", ids=self.ids)

    def add_generated(self, *, taken: Collection[str] = ()) -> str:
        """Write one more key into the file and return its name, one that is neither in the file nor `taken`.

        The file is replaced as a whole; two processes adding at once both get theirs. Raises `KeyringFault`
        for a keyring that is not in a file: its keys must be changed where they come from.
        """
        if self.file is None:
            raise KeyringFault("The keyring comes from the environment: add the key there and start again.")
        try:
            with _alone_in(self.file.parent):
                name = _add_to(self.file, taken, private=self._private)
        except OSError as error:
            raise KeyringFault(
                f"The keyring file {self.file} cannot be changed: {error.strerror}."
            ) from error
        self.reload()
        return name

    def _look_again(self) -> None:
        try:
            self.reload()
        except KeyringFault as fault:
            raise Unopenable(
                fault.detail
            ) from fault  # no start to refuse any more: the keys read before still serve

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self.ids)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Keyring is not pickled")


def _parse(text: str) -> _Content:
    """Read the JSON and name every fault in it at once, by position where a name cannot be trusted."""
    try:
        document = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        raise KeyringFault('The keyring is not JSON like {"active":"k1","keys":{"k1":"<base64>"}}.') from None
    if not isinstance(document, _Pairs) or sorted(name for name, _ in document) != ["active", "keys"]:
        raise KeyringFault('The keyring must be one JSON object with "active" and "keys", each once.')
    active, keys = document.get("active"), document.get("keys")
    if not isinstance(keys, _Pairs) or not keys:
        raise KeyringFault('"keys" in the keyring must be an object with at least one key.')
    faults = [
        fault for number, (name, value) in enumerate(keys, 1) for fault in _faults_of(number, name, value)
    ]
    faults += _repetitions(keys)
    if not isinstance(active, str) or active not in dict(keys):
        faults.append('"active" in the keyring is not the name of one of its keys')
    if faults:
        raise KeyringFault("; ".join(faults) + ".")
    return _Content(
        active, MappingProxyType({name: Kek(name, base64.b64decode(value)) for name, value in keys})
    )


class _Pairs(list[tuple[str, Any]]):
    """A JSON object that still knows the names written twice."""

    def get(self, name: str) -> Any:
        return dict(self).get(name)


def _faults_of(number: int, name: str, value: Any) -> Iterator[str]:
    called = f"key {name}" if _ID.fullmatch(name) else f"key number {number}"
    if called != f"key {name}":
        yield f"{called} of the keyring needs a name of up to 32 letters, digits, - and _"
    key = _decoded(value)
    if key is None:
        yield f"{called} of the keyring is not base64"
    elif len(key) != _KEY_SIZE:
        yield f"{called} of the keyring has {len(key)} bytes instead of 32"


def _decoded(value: Any) -> bytes | None:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (binascii.Error, ValueError):
        return None


def _repetitions(keys: _Pairs) -> Iterator[str]:
    names = [name for name, _ in keys]
    values = [_decoded(value) for _, value in keys]
    if len(set(names)) < len(names):
        yield "a name stands twice in the keyring"
    if len({value for value in values if value}) < len([value for value in values if value]):
        yield "two names in the keyring have the same key"


def _read_file(file: Path, *, private: bool) -> tuple[str, tuple[int, ...]]:
    try:
        with file.open(encoding="utf-8") as opened:
            status = os.fstat(
                opened.fileno()
            )  # of what was opened, not of what the name means a moment later
            if private and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeyringFault(
                    f"The keyring file {file} is open to other users (mode "
                    f"{stat.S_IMODE(status.st_mode):04o}): run chmod 600 on it; if it was read, rotate."
                )
            return opened.read(), _identity(status)
    except OSError as error:
        raise KeyringFault(f"The keyring file {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise KeyringFault(f"The keyring file {file} is not text.") from None


def _identity_of(file: Path) -> tuple[int, ...] | None:
    try:
        return _identity(file.stat())
    except OSError:
        return None


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _add_to(file: Path, taken: Collection[str], *, private: bool) -> str:
    text, _ = _read_file(file, private=private)
    name = _next_name({*_parse(text).keks, *taken})
    document: dict[str, Any] = json.loads(text)
    document["keys"][name] = _new_key()
    with _written_beside(file, json.dumps(document, indent=2)) as fresh:
        fresh.replace(file)
    return name


def _make_file(file: Path) -> None:
    """Make a keyring with one new key, unless another process was faster: `link` fails where `rename` would
    replace."""
    text = json.dumps({"active": "k1", "keys": {"k1": _new_key()}}, indent=2)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _written_beside(file, text) as fresh:
            file.hardlink_to(fresh)
        log(Event.KEYRING_MADE, kek="k1")
    except FileExistsError:
        return
    except OSError as error:
        raise KeyringFault(f"The keyring file {file} cannot be made: {error.strerror}.") from error


@contextmanager
def _written_beside(file: Path, text: str) -> Iterator[Path]:
    """A durable private file with this text in the same folder, gone at the end unless it was renamed."""
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        yield fresh
        _sync_folder(file.parent)
    finally:
        fresh.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from changing the keyring of this folder; the lock ends with the descriptor."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _next_name(taken: Collection[str]) -> str:
    numbers = [int(name[1:]) for name in taken if re.fullmatch(r"k[0-9]{1,9}", name)]
    return f"k{max(numbers, default=0) + 1}"


def _new_key() -> str:
    return base64.b64encode(secrets.token_bytes(_KEY_SIZE)).decode()
