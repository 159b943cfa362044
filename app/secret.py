"""A string that must not be read by accident.

Tokens, client secrets, caller secrets and keys travel through the program as `Secret`. It shows nothing of itself when
printed, logged, formatted, pickled or put into a traceback; `reveal()` is the only way out, and a test lists the files in
which that word may stand.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NoReturn

__all__ = ["Secret"]


class Secret:
    """A secret text that hides itself; compare with `==` (constant time), read with `reveal()`."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError("a Secret holds text")
        self._text = text

    def reveal(self) -> str:
        """The clear text; call it only where the text must leave the program or be computed with."""
        return self._text

    def sha256(self) -> str:
        """The SHA-256 of the text in lower-case hex: how a token is named without being told."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(("Secret", self._text))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled")
