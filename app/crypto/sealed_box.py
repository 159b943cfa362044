"""Sealing to a public key that an operator names: how connections leave for another installation.

HPKE, RFC 9180, base mode, one message: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM. The format,
version 1:

    magic        4 bytes, "DBX" and 1
    enc          32 bytes, the ephemeral X25519 public key
    ciphertext   as long as the plaintext, then the tag, 16 bytes

with `info` being "drawbridge/export/1". Only the holder of the private key can open it and any change shows;
who made it, it does not say. Keys come from `openssl genpkey -algorithm X25519 -out key.pem; openssl pkey -in
key.pem -pubout`.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from app.errors import InvalidRequest, Unopenable
from app.secret import Secret

__all__ = ["open_from", "seal_to"]

_MAGIC: Final = b"DBX\x01"
_INFO: Final = b"drawbridge/export/1"


def seal_to(public_key_pem: bytes, plaintext: bytes) -> bytes:
    """Seal to an X25519 public key in PEM. Raises `InvalidRequest` for anything else, a private key above
    all."""
    if b"PRIVATE KEY" in public_key_pem:
        raise InvalidRequest("This is a private key; keep it and give its public key.")
    try:
        key = serialization.load_pem_public_key(public_key_pem)
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidRequest("The file does not hold a public key in PEM.") from None
    if not isinstance(key, X25519PublicKey):
        raise InvalidRequest("The public key must be of the kind X25519.")
    return _MAGIC + _suite().encrypt(plaintext, key, _INFO)


def open_from(private_key_pem: Secret, blob: bytes) -> bytes:
    """Open what was sealed to this key's public key.

    Raises `InvalidRequest` for a key of another kind, `Unopenable` for another recipient's or changed bytes.
    """
    try:
        key = serialization.load_pem_private_key(private_key_pem.reveal().encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidRequest("The file does not hold a private key in PEM without a passphrase.") from None
    if not isinstance(key, X25519PrivateKey):
        raise InvalidRequest("The private key must be of the kind X25519.")
    if blob[: len(_MAGIC)] != _MAGIC:
        raise Unopenable("This is not an export sealed by Drawbridge.")
    try:
        return _suite().decrypt(blob[len(_MAGIC) :], key, _INFO)
    except (InvalidTag, ValueError):
        raise Unopenable("The export was sealed to another key or has been changed.") from None


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
