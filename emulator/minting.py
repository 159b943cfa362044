"""Where ids and tokens come from: shaped like the vendors' own, repeatable when a seed is given.

A token of a seeded emulator is predictable by design. That is fit for a demo on loopback and for nothing
else.
"""

from __future__ import annotations

import hashlib
import random
import string
import threading
import uuid

BASE62 = string.ascii_uppercase + string.ascii_lowercase + string.digits
BASE64URL = BASE62 + "-_"
SESSION_ALPHABET = BASE62 + "._"
CHECK_ALPHABET = string.ascii_uppercase + "012345"


class Minter:
    """Makes ids and tokens from one random source; `seed=None` takes the operating system's."""

    def __init__(self, seed: int | None = None) -> None:
        self._random: random.Random = random.SystemRandom() if seed is None else random.Random(seed)
        self._lock = threading.Lock()

    def text(self, length: int, alphabet: str = BASE62) -> str:
        """Return `length` random characters of `alphabet`."""
        with self._lock:
            return "".join(self._random.choices(alphabet, k=length))

    def number(self, low: int, high: int) -> int:
        """Return a random integer with both ends included."""
        with self._lock:
            return self._random.randint(low, high)

    def uuid(self) -> str:
        """Return a random UUID in text form (version 4)."""
        with self._lock:
            return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def salesforce_id(self, prefix: str) -> str:
        """Return an 18-character record id whose first three characters are `prefix`."""
        return with_checksum(prefix + self.text(15 - len(prefix)))


def with_checksum(identifier: str) -> str:
    """Return the 18-character form of a 15- or 18-character Salesforce id; ValueError for any other length.

    Each block of five characters gives one check character: bit j is set when character j is A-Z.
    """
    if len(identifier) not in (15, 18):
        raise ValueError(f"a Salesforce id has 15 or 18 characters, not {len(identifier)}")
    stem = identifier[:15]
    return stem + "".join(_check_character(stem[start : start + 5]) for start in (0, 5, 10))


def _check_character(block: str) -> str:
    bits = sum(
        1 << position for position, character in enumerate(block) if character in string.ascii_uppercase
    )
    return CHECK_ALPHABET[bits]


def sha256(token: str) -> str:
    """Return the lower-case hex SHA-256 of a token: the only form in which tokens reach a log or a report."""
    return hashlib.sha256(token.encode()).hexdigest()
