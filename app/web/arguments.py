"""What clients send, read strictly: what is unknown, repeated or malformed is refused with a sentence, never ignored.

A misspelt parameter that is ignored becomes a token that dies too early or a filter that does not filter. Nothing here knows
Flask; text goes in, plain values come out, faults are `InvalidRequest`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Final, NoReturn
from urllib.parse import unquote_to_bytes

from app.errors import InvalidRequest, TooLarge

__all__ = [
    "LARGEST_BODY",
    "LONGEST_MIN_TTL",
    "NAME_PATTERN",
    "UnsupportedMediaType",
    "Wishes",
    "read_form",
    "read_json",
    "read_query",
    "read_wishes",
    "read_wishes_body",
]

LARGEST_BODY: Final = 64 * 1024
"""Bytes of a request body; the largest honest one, a form with a signed assertion, has about 4 KiB."""

NAME_PATTERN: Final = "[a-z0-9][a-z0-9._-]{0,62}"
"""What connection names look like."""

LONGEST_MIN_TTL: Final = 86_400.0
LONGEST_MAX_WAIT: Final = 30.0
_LONGEST_VALUE: Final = 4096
_NUMBER: Final = re.compile(
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
)  # RFC 8259 §6, so no NaN or inf
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_MEDIA_TYPE: Final = re.compile(
    r'application/json([ \t]*;[ \t]*charset[ \t]*=[ \t]*"?utf-?8"?)?[ \t]*', re.IGNORECASE
)
_FORM: Final = "application/x-www-form-urlencoded"


class UnsupportedMediaType(InvalidRequest):
    """The body is not in the format this endpoint reads."""

    status = 415


class Wishes:
    """What a caller asks of a token: seconds it must live, seconds to wait, the digest of one that was refused."""

    __slots__ = ("max_wait", "min_ttl", "rejected")

    def __init__(
        self, min_ttl: float | None = None, max_wait: float | None = None, rejected: str | None = None
    ) -> None:
        self.min_ttl = min_ttl
        self.max_wait = max_wait
        self.rejected = rejected


_NO_WISHES: Final = Wishes()


def read_wishes(query: str) -> Wishes:
    """The query of the hand-out path."""
    if not query:
        return _NO_WISHES
    given = read_query(query, allowed=("min_ttl", "max_wait"))
    return Wishes(
        min_ttl=_number(given, "min_ttl", most=LONGEST_MIN_TTL),
        max_wait=_number(given, "max_wait", most=LONGEST_MAX_WAIT),
    )


def read_wishes_body(body: bytes, content_type: str | None) -> Wishes:
    """The JSON body of the hand-out path."""
    given = read_json(body, content_type, allowed=("min_ttl", "max_wait", "rejected"))
    rejected = given.get("rejected")
    if "rejected" in given and not (isinstance(rejected, str) and _DIGEST.fullmatch(rejected)):
        raise InvalidRequest(
            "rejected is the SHA-256 of the refused access token in 64 lower-case hex digits."
        )
    return Wishes(
        min_ttl=_json_number(given, "min_ttl", most=LONGEST_MIN_TTL),
        max_wait=_json_number(given, "max_wait", most=LONGEST_MAX_WAIT),
        rejected=rejected,
    )


def read_query(query: str, *, allowed: Collection[str] | None) -> dict[str, str]:
    """The parameters of a raw query string, each at most once; with `allowed` None others are let through.

    `query` is WSGI's, bytes as latin-1.
    """
    if not query:
        return {}
    return _pairs(query, allowed=allowed, what="parameter")


def read_form(body: bytes, content_type: str | None, *, allowed: Collection[str]) -> dict[str, str]:
    """The fields of an HTML form, each at most once."""
    _check_size(body)
    if not body:
        return {}
    if (content_type or "").partition(";")[0].strip().lower() != _FORM:
        raise UnsupportedMediaType(f"The body must be {_FORM}.")
    return _pairs(body.decode("latin-1"), allowed=allowed, what="field")


def read_json(body: bytes, content_type: str | None, *, allowed: Collection[str]) -> dict[str, Any]:
    """A JSON object in UTF-8 with none but the allowed members, each at most once (RFC 8259 leaves repeats open)."""
    if _MEDIA_TYPE.fullmatch(content_type or "") is None:
        raise UnsupportedMediaType("The body must be application/json.")
    _check_size(body)
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except InvalidRequest:
        raise
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not JSON in UTF-8.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    unknown = [name for name in value if name not in allowed]
    if unknown:
        raise InvalidRequest(f"The body has a member that is not known; known are: {', '.join(allowed)}.")
    return value


def _check_size(body: bytes) -> None:
    if len(body) > LARGEST_BODY:
        raise TooLarge(f"The body may have at most {LARGEST_BODY} bytes.")


def _pairs(text: str, *, allowed: Collection[str] | None, what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split("&"):
        raw_name, equals, raw_value = part.partition("=")
        if not equals:
            raise InvalidRequest(f"Each {what} is written name=value.")
        name, value = _decoded(raw_name), _decoded(raw_value)
        if allowed is not None and name not in allowed:
            known = f"known are: {', '.join(allowed)}" if allowed else "none is known here"
            raise InvalidRequest(f"There is a {what} that is not known; {known}.")
        if name in found:
            raise InvalidRequest(f"A {what} is repeated.")
        if len(value) > _LONGEST_VALUE:
            raise InvalidRequest(f"A {what} is longer than {_LONGEST_VALUE} characters.")
        found[name] = value
    return found


def _decoded(text: str) -> str:
    """One name or value of a form or query (WHATWG URL, application/x-www-form-urlencoded), in strict UTF-8."""
    try:
        decoded = unquote_to_bytes(text.replace("+", " ").encode("latin-1")).decode("utf-8")
    except ValueError:
        raise InvalidRequest("Something is not UTF-8.") from None
    if "\0" in decoded:
        raise InvalidRequest("Something has U+0000 in it.")  # no name has; PostgreSQL stores no such text
    return decoded


def _number(given: Mapping[str, str], name: str, *, most: float) -> float | None:
    text = given.get(name)
    if text is None:
        return None
    return _bounded(float(text) if _NUMBER.fullmatch(text) else math.nan, name, most=most)


def _json_number(given: Mapping[str, Any], name: str, *, most: float) -> float | None:
    if name not in given:
        return None
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _bounded(math.nan, name, most=most)
    # Compared before it becomes a float: an integer may be too large for one.
    return _bounded(float(value) if abs(value) <= most else math.nan, name, most=most)


def _bounded(value: float, name: str, *, most: float) -> float:
    if not 0 <= value <= most:
        raise InvalidRequest(f"{name} is a number of seconds from 0 to {most:.0f}.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidRequest("A member of the body is repeated.")
    return found


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not JSON.")
