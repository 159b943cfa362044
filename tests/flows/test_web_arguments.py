"""What clients send is read strictly: one spelling, once each, nothing unknown."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest, TooLarge
from app.web.arguments import (
    LARGEST_BODY,
    LONGEST_MAX_WAIT,
    LONGEST_MIN_TTL,
    UnsupportedMediaType,
    read_form,
    read_json,
    read_query,
    read_wishes,
    read_wishes_body,
)

JSON = "application/json"


def seconds(most: float) -> st.SearchStrategy[float]:
    """Numbers of seconds that may be asked for."""
    return st.floats(0, most, allow_nan=False) | st.integers(0, int(most)).map(float)


@given(seconds(LONGEST_MIN_TTL), seconds(LONGEST_MAX_WAIT))
def test_whatever_number_may_be_asked_for_arrives_unchanged(min_ttl: float, max_wait: float) -> None:
    """Query and body give the same wishes."""
    query = read_wishes(urlencode({"max_wait": repr(max_wait), "min_ttl": repr(min_ttl)}))
    body = read_wishes_body(json.dumps({"min_ttl": min_ttl, "max_wait": max_wait}).encode(), JSON)
    assert (query.min_ttl, query.max_wait) == (min_ttl, max_wait) == (body.min_ttl, body.max_wait)


@given(st.text(st.characters(codec="ascii"), max_size=200))
def test_any_query_is_read_or_refused_with_a_sentence(query: str) -> None:
    """No query makes the parser fail in another way, and what it lets through is within bounds."""
    try:
        wishes = read_wishes(query)
    except InvalidRequest as error:
        said = error.detail
    else:
        said = "."
        assert wishes.min_ttl is None or 0 <= wishes.min_ttl <= LONGEST_MIN_TTL
        assert wishes.max_wait is None or 0 <= wishes.max_wait <= LONGEST_MAX_WAIT
    assert said.endswith(".")


@given(st.binary(max_size=300))
def test_any_body_is_read_or_refused_with_a_sentence(body: bytes) -> None:
    """Bytes of any kind end in wishes or in `InvalidRequest`."""
    said = "."
    try:
        read_wishes_body(body, JSON)
    except InvalidRequest as error:
        said = error.detail
    assert said.endswith(".")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_any_json_is_read_or_refused_with_a_sentence(value: Any) -> None:
    """Only an object of known members of the right types gets through."""
    for body in (value, {"min_ttl": value}, {"rejected": value}, {"max_wait": value}):
        try:
            wishes = read_wishes_body(json.dumps(body).encode(), JSON)
        except InvalidRequest:
            continue
        assert isinstance(body, dict)
        assert wishes.min_ttl == body.get("min_ttl")
        assert wishes.rejected == body.get("rejected")


@given(
    st.dictionaries(
        st.sampled_from(["token", "name", "csrf"]),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50),
    )
)
def test_a_form_comes_back_as_it_was_written(fields: dict[str, str]) -> None:
    """Whatever a browser encodes is decoded to the same, once."""
    body = urlencode(fields).encode()
    assert read_form(body, "application/x-www-form-urlencoded", allowed=("token", "name", "csrf")) == fields
    assert read_query(body.decode(), allowed=None) == fields


@pytest.mark.parametrize(
    "query",
    [
        "min_ttl=nan",
        "min_ttl=NaN",
        "min_ttl=inf",
        "min_ttl=Infinity",
        "min_ttl=-1",
        "min_ttl=1e999",
        "min_ttl=",
        "min_ttl",
        "min_ttl=0x10",
        "min_ttl=1_000",
        "min_ttl=+5",
        "min_ttl=%205",
        "min_ttl=٣",
        "min_ttl=86401",
        "max_wait=31",
        "min_ttl=1&min_ttl=1",
        "min_ttl=1&min%5Fttl=2",
        "ttl=5",
        "min_ttl=5&",
        "min_ttl=%ff",
        "rejected=" + "0" * 64,
    ],
)
def test_a_query_that_is_not_plainly_right_is_refused(query: str) -> None:
    """Unknown, repeated, half and odd numbers are all `InvalidRequest`."""
    with pytest.raises(InvalidRequest):
        read_wishes(query.encode().decode("latin-1"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"1",
        b"null",
        b"{",
        b'{"min_ttl": "5"}',
        b'{"min_ttl": true}',
        b'{"min_ttl": null}',
        b'{"min_ttl": NaN}',
        b'{"min_ttl": Infinity}',
        b'{"min_ttl": 1e400}',
        b'{"min_ttl": 1' + b"0" * 5000 + b"}",
        b'{"min_ttl": 1, "min_ttl": 2}',
        b'{"ttl": 1}',
        b'{"rejected": "abc"}',
        b'{"rejected": "' + b"A" * 64 + b'"}',
        b'{"min_ttl": 1}\xff',
        b"\xef\xbb\xbf{}",
        b"[" * 50_000,
    ],
)
def test_a_body_that_is_not_plainly_right_is_refused(body: bytes) -> None:
    """Other types, repeats, constants that are not JSON, other encodings and endless nesting are refused."""
    with pytest.raises(InvalidRequest):
        read_wishes_body(body, JSON)


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/json; charset=latin-1", "application/jsonp"]
)
def test_a_body_of_another_kind_is_415(kind: str | None) -> None:
    """The content type says JSON in UTF-8, or nothing is read."""
    with pytest.raises(UnsupportedMediaType) as caught:
        read_json(b"{}", kind, allowed=())
    assert caught.value.status == 415


def test_a_body_that_is_too_large_is_not_parsed() -> None:
    """More than the limit is `TooLarge`, whatever it holds."""
    with pytest.raises(TooLarge):
        read_json(b" " * (LARGEST_BODY + 1), JSON, allowed=())


@pytest.mark.parametrize("query", ["name=%00", "name=a%00b", "%00=a", "name=\0"])
def test_u_0000_is_refused(query: str) -> None:
    """Neither a name nor a value has it, escaped or bare, in a query or in a form."""
    with pytest.raises(InvalidRequest, match=r"U\+0000"):
        read_query(query, allowed=None)
    with pytest.raises(InvalidRequest, match=r"U\+0000"):
        read_form(query.encode(), "application/x-www-form-urlencoded", allowed=("name",))


def test_a_value_that_is_too_long_is_refused() -> None:
    """A parameter of several kilobytes is nobody's."""
    with pytest.raises(InvalidRequest):
        read_query(f"state={quote('x' * 5000)}", allowed=None)
