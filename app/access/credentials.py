"""What an Authorization header says, before anybody believes it.

Parsing never says why it failed: every fault is the same `Unauthenticated`, so that nobody learns by trying.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from dataclasses import dataclass
from typing import Final

from app.errors import Unauthenticated
from app.secret import Secret

__all__ = [
    "LONGEST_HEADER",
    "Basic",
    "Bearer",
    "looks_like_client_id",
    "new_client_id",
    "new_secret",
    "parse",
]

LONGEST_HEADER: Final = 8192  # characters; our longest, a Bearer of our own, has about 900
_BASIC: Final = re.compile(
    r"basic +([A-Za-z0-9+/]+={0,2})", re.IGNORECASE
)  # RFC 7617 §2: token68 of RFC 9110 §11.2
_BEARER: Final = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)  # RFC 6750 §2.1
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")  # RFC 7617 §2 forbids them
_CLIENT_ID: Final = re.compile(r"dbc_[A-Za-z0-9_-]{22}")


@dataclass(frozen=True, slots=True)
class Basic:
    """A client id and the secret it came with (RFC 7617)."""

    client_id: str
    secret: Secret


@dataclass(frozen=True, slots=True)
class Bearer:
    """A token (RFC 6750)."""

    token: Secret


def parse(header: str | None) -> Basic | Bearer:
    """Read one Authorization header value; anything else than one well-formed credential is
    `Unauthenticated`.

    Two credentials sent as two headers arrive joined by a comma, which is in neither grammar.
    """
    if header is None or len(header) > LONGEST_HEADER:
        raise Unauthenticated
    header = header.strip(" \t")
    if (bearer := _BEARER.fullmatch(header)) is not None:
        return Bearer(Secret(bearer[1]))
    if (basic := _BASIC.fullmatch(header)) is not None:
        return _basic(basic[1])
    raise Unauthenticated


def looks_like_client_id(text: str) -> bool:
    """Whether this could be an id of ours; what could not need not be looked up."""
    return _CLIENT_ID.fullmatch(text) is not None


def new_client_id() -> str:
    """A fresh client id: public, random so that none can be guessed from another."""
    return f"dbc_{secrets.token_urlsafe(16)}"


def new_secret() -> Secret:
    """A fresh caller secret: 256 bits, so a plain SHA-256 of it can be stored and no slow hash is needed."""
    return Secret(secrets.token_urlsafe(32))


def _basic(token68: str) -> Basic:
    try:
        text = base64.b64decode(token68, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        raise Unauthenticated from None
    client_id, colon, secret = text.partition(":")
    if not colon or not client_id or not secret or _CONTROL.search(text):
        raise Unauthenticated
    return Basic(client_id, Secret(secret))
