"""What is sealed to a public key opens with its private key alone."""

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from hypothesis import given
from hypothesis import strategies as st

from app.crypto.sealed_box import open_from, seal_to
from app.errors import InvalidRequest, Unopenable
from app.secret import Secret

Private = x25519.X25519PrivateKey | ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def private_pem(key: Private) -> Secret:
    """A private key as OpenSSL writes it."""
    return Secret(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode()
    )


def public_pem(key: Private) -> bytes:
    """Its public key as OpenSSL writes it."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


OURS, THEIRS = x25519.X25519PrivateKey.generate(), x25519.X25519PrivateKey.generate()
SEALED = seal_to(public_pem(OURS), b"a line of an export")


@given(st.binary(max_size=2000))
def test_what_was_sealed_opens(plaintext: bytes) -> None:
    """Any bytes."""
    assert open_from(private_pem(OURS), seal_to(public_pem(OURS), plaintext)) == plaintext


def test_sealing_twice_gives_two_texts_without_the_plaintext() -> None:
    """A new ephemeral key each time."""
    assert seal_to(public_pem(OURS), b"a line of an export") != SEALED
    assert b"export" not in SEALED


def test_only_the_recipient_opens_it() -> None:
    """Another key of the same kind does not."""
    with pytest.raises(Unopenable, match="another key"):
        open_from(private_pem(THEIRS), SEALED)


@pytest.mark.parametrize("position", range(len(SEALED)))
def test_any_changed_byte_shows(position: int) -> None:
    """Magic, ephemeral key, ciphertext and tag alike."""
    for mask in (0x01, 0x10):
        changed = bytearray(SEALED)
        changed[position] ^= mask
        with pytest.raises(Unopenable):
            open_from(private_pem(OURS), bytes(changed))


@pytest.mark.parametrize("length", range(len(SEALED)))
def test_a_text_cut_short_shows(length: int) -> None:
    """Wherever it was cut."""
    with pytest.raises(Unopenable):
        open_from(private_pem(OURS), SEALED[:length])


def test_an_ephemeral_key_of_small_order_shows() -> None:
    """It would make the shared secret one that everybody knows (RFC 7748 §6.1)."""
    with pytest.raises(Unopenable):
        open_from(private_pem(OURS), SEALED[:4] + bytes(32) + SEALED[36:])


@pytest.mark.parametrize(
    ("pem", "sentence"),
    [
        (b"", "does not hold a public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "does not hold a public key"),
        (public_pem(ed25519.Ed25519PrivateKey.generate()), "kind X25519"),
        (public_pem(ec.generate_private_key(ec.SECP256R1())), "kind X25519"),
        (private_pem(OURS).reveal().encode(), "private key; keep it"),
    ],
)
def test_what_is_no_x25519_public_key_is_refused(pem: bytes, sentence: str) -> None:
    """An operator who names the wrong file is told so, and a private key is not taken."""
    with pytest.raises(InvalidRequest, match=sentence):
        seal_to(pem, b"x")


@pytest.mark.parametrize(
    ("pem", "sentence"),
    [
        (Secret(""), "does not hold a private key"),
        (Secret(public_pem(OURS).decode()), "does not hold a private key"),
        (private_pem(ed25519.Ed25519PrivateKey.generate()), "kind X25519"),
    ],
)
def test_what_is_no_x25519_private_key_is_refused(pem: Secret, sentence: str) -> None:
    """The same for whoever opens."""
    with pytest.raises(InvalidRequest, match=sentence):
        open_from(pem, SEALED)


def test_keys_that_openssl_makes_serve(tmp_path: Path) -> None:
    """The two commands the documentation names."""
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "X25519", "-out", key], check=True)
    public = subprocess.run(
        ["openssl", "pkey", "-in", key, "-pubout"], check=True, capture_output=True
    ).stdout
    assert open_from(Secret(key.read_text()), seal_to(public, b"moved")) == b"moved"
