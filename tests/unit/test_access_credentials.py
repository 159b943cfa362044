"""Parsing what a header says: one exception for everything, and nothing else ever."""

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access.credentials import (
    LONGEST_HEADER,
    Basic,
    Bearer,
    looks_like_client_id,
    new_client_id,
    new_secret,
    parse,
)
from app.errors import Unauthenticated

SAFE = string.ascii_letters + string.digits + "_-"


def encoded(data: bytes) -> str:
    """Encode the token68 of a Basic credential."""
    return base64.b64encode(data).decode()


@given(st.text())
def test_any_text_is_a_credential_or_unauthenticated(header: str) -> None:
    """Whatever a header holds, parsing it raises Unauthenticated or gives a credential."""
    with_result: object = None
    try:
        with_result = parse(header)
    except Unauthenticated:
        return
    assert isinstance(with_result, (Basic, Bearer))


@given(st.binary())
def test_any_bytes_behind_basic_are_a_credential_or_unauthenticated(data: bytes) -> None:
    """Bytes that are not UTF-8, have no colon or hold control characters are never a credential."""
    try:
        found = parse(f"Basic {encoded(data)}")
    except Unauthenticated:
        return
    assert isinstance(found, Basic)
    assert f"{found.client_id}:{found.secret.reveal()}".encode() == data


@given(
    st.sampled_from(["Basic ", "basic  ", "BASIC ", "Bearer ", "Basic", "Bearer", "Negotiate "]), st.text()
)
def test_any_text_behind_a_scheme_is_a_credential_or_unauthenticated(scheme: str, rest: str) -> None:
    """A scheme followed by anything never breaks the parser."""
    try:
        parse(scheme + rest)
    except Unauthenticated:
        return
    assert scheme.strip().lower() in {"basic", "bearer"}


@given(st.text(SAFE, min_size=1), st.text(SAFE, min_size=1))
def test_ids_and_secrets_of_ours_survive_the_round_trip(client_id: str, secret: str) -> None:
    """What a client encodes after RFC 7617 is what we read."""
    found = parse(f"bAsIc   {encoded(f'{client_id}:{secret}'.encode())} ")
    assert isinstance(found, Basic)
    assert (found.client_id, found.secret.reveal()) == (client_id, secret)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Basic",
        "Basic ",
        "Basic !!!!",
        "Basic YQ",  # base64 without its padding
        f"Basic {encoded(b'no colon')}",
        f"Basic {encoded(b':secret')}",
        f"Basic {encoded(b'id:')}",
        f"Basic {encoded(bytes([0xFF, 0xFE]) + b':x')}",
        f"Basic {encoded(b'id:se' + bytes([0]) + b'cret')}",
        f"Basic {encoded(b'id:secret')},Bearer abc",
        f"Basic {encoded(b'id:secret')}, Basic {encoded(b'id:secret')}",
        "Bearer",
        "Bearer a b",
        "Bearer ä",
        "Digest username=x",
        "Bearer " + "a" * LONGEST_HEADER,
    ],
)
def test_malformed_headers_all_look_alike(header: str | None) -> None:
    """No fault is told from another."""
    with pytest.raises(Unauthenticated) as caught:
        parse(header)
    assert caught.value.detail == Unauthenticated().detail


def test_a_secret_has_256_bits_in_url_safe_letters() -> None:
    """Ids and secrets need no quoting anywhere."""
    secret, client_id = new_secret().reveal(), new_client_id()
    assert len(secret) == 43
    assert set(secret + client_id) <= set(SAFE)
    assert looks_like_client_id(client_id)
    assert not looks_like_client_id(client_id + "x")
