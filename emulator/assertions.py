"""Checks a JWT bearer assertion (RFC 7523) with `cryptography` alone, so that no client library is its own
judge.

RS256 only. `exp` may be a number or a string of digits, because widely used clients send either; no upper
bound is enforced unless the emulator is told to.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from emulator.model import SetUpError


class BadAssertionError(Exception):
    """The assertion cannot be read, is not RS256, or its signature does not fit."""


@dataclass(frozen=True, slots=True)
class Assertion:
    """Claims of an assertion that has been taken apart but not yet been believed."""

    claims: dict[str, Any]
    signed: bytes
    signature: bytes

    @property
    def issuer(self) -> str:
        """The consumer key, `iss`."""
        return str(self.claims.get("iss", ""))

    @property
    def username(self) -> str:
        """Who it speaks for: `prn` wins over `sub`."""
        return str(self.claims.get("prn") or self.claims.get("sub") or "")

    @property
    def audiences(self) -> list[str]:
        """The `aud` claim as a list."""
        aud = self.claims.get("aud", [])
        return [str(item) for item in aud] if isinstance(aud, list) else [str(aud)]

    @property
    def expires_at(self) -> float | None:
        """The `exp` claim in epoch seconds, None when it is missing or no number."""
        try:
            return float(self.claims["exp"])
        except (KeyError, TypeError, ValueError):
            return None


def read(text: str) -> Assertion:
    """Take a compact JWT apart; BadAssertionError when it is none or not RS256."""
    try:
        header, payload, signature = text.split(".")
        algorithm = json.loads(_decode(header)).get("alg")
        claims = json.loads(_decode(payload))
        parsed = Assertion(claims, f"{header}.{payload}".encode(), _decode(signature))
    except (ValueError, AttributeError, binascii.Error) as error:
        raise BadAssertionError("not a compact JWT") from error
    if algorithm != "RS256" or not isinstance(claims, dict):
        raise BadAssertionError("RS256 with a claims object is needed")
    return parsed


def verify(assertion: Assertion, pem: str) -> None:
    """Check the signature with a public key or certificate in PEM; BadAssertionError when it does not fit."""
    try:
        public_key(pem).verify(assertion.signature, assertion.signed, PKCS1v15(), hashes.SHA256())
    except InvalidSignature as error:
        raise BadAssertionError("signature does not fit") from error


def public_key(pem: str) -> RSAPublicKey:
    """Read an RSA public key or the one inside a certificate; SetUpError for anything else."""
    try:
        if "BEGIN CERTIFICATE" in pem:
            key: object = x509.load_pem_x509_certificate(pem.encode()).public_key()
        else:
            key = serialization.load_pem_public_key(pem.encode())
    except ValueError as error:
        raise SetUpError("jwt_public_key is no PEM public key or certificate") from error
    if not isinstance(key, RSAPublicKey):
        raise SetUpError("jwt_public_key is not an RSA key")
    return key


def _decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
