"""The secrets of one trip through the provider's consent page, made and compared; kept and expired elsewhere.

Three values guard the way back. `state` names the trip and is stored as a digest. The browser's own token
sits in a cookie, so that a callback URL sent to somebody else is of no use in his browser (login CSRF, RFC
9700 §4.7). The PKCE verifier never leaves us until the code is exchanged, so that a stolen code is of no use
either (RFC 7636).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from typing import Final

from app.secret import Secret

__all__ = [
    "browser_hash",
    "challenge",
    "denied",
    "matches",
    "new_browser_token",
    "new_state",
    "new_verifier",
    "state_hash",
]

# 32 bytes are 256 bits; as base64url without padding 43 characters, the least RFC 7636 §4.1 allows for a
# verifier.
_BYTES: Final = 32


def new_state() -> str:
    """A fresh `state` of 256 random bits in `[A-Za-z0-9_-]` (RFC 6749 §10.12)."""
    return secrets.token_urlsafe(_BYTES)


def new_browser_token() -> Secret:
    """A fresh value for the cookie that binds a trip to the browser it began in."""
    return Secret(secrets.token_urlsafe(_BYTES))


def new_verifier() -> Secret:
    """A fresh PKCE code verifier of 43 characters (RFC 7636 §4.1)."""
    return Secret(secrets.token_urlsafe(_BYTES))


def challenge(verifier: Secret) -> str:
    """The S256 code challenge of a verifier (RFC 7636 §4.2); `plain` is not offered."""
    digest = hashlib.sha256(verifier.reveal().encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def state_hash(state: str) -> str:
    """What is stored of a `state`: its SHA-256 in hex, so that a read of the table cannot finish anybody's
    trip.
    """
    return hashlib.sha256(state.encode(errors="surrogatepass")).hexdigest()


def browser_hash(token: Secret, provider: str) -> str:
    """What is stored of the browser's token: a digest that holds for one provider only (mix-up, RFC 9700
    §4.4).
    """
    return hmac.new(
        token.reveal().encode(), f"drawbridge handshake {provider}".encode(), hashlib.sha256
    ).hexdigest()


def denied(error: str) -> bool:
    """Whether a callback's `error` says that the person at the consent page said no (RFC 6749 §4.1.2.1).

    Salesforce's pages spell it with a hyphen as well.
    """
    return error.strip().lower().replace("-", "_") == "access_denied"


def matches(stored: str, presented: str) -> bool:
    """Compare two digests in constant time."""
    return hmac.compare_digest(stored.encode(), presented.encode(errors="surrogatepass"))
