"""Keeps secrets and people out of text that leaves the program: by pattern for text, by type for values.

The patterns are a second fence. Our own events let out only registered fields; but libraries write URLs,
headers and SQL into their messages, and an error text may quote what it choked on. When in doubt a pattern
takes too much.

What may stay although it looks random: our own ids (32 lower-case hex digits) and long names made of plain
words (`ix_connections_next_refresh_at`). A 64-digit hex string goes: Salesforce consumer secrets look like
that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date, timedelta
from enum import Enum
from pathlib import PurePath
from types import TracebackType
from typing import Any, Final
from uuid import UUID

from app.errors import DrawbridgeError
from app.secret import Secret

__all__ = ["REDACTED", "presentable", "scrub"]

REDACTED: Final = "[redacted]"

_LONGEST: Final = 16_384
"""Characters of one text that are looked at; more than that in one log field is noise."""

_DEEPEST: Final = 4
_MOST_ITEMS: Final = 50
_MOST_FRAMES: Final = 30

# Words that name a secret at the end of a key: client_secret, refreshToken, code, client_assertion, …
_KEY: Final = (
    r"(?:secret|token|passw(?:or)?d|passphrase|pwd|assertion|verifier|code|api_?key|hapikey|private_?key"
    r"|signature|credentials?|jwt|saml_?response)"
)

_OUR_ID: Final = re.compile(r"[0-9a-f]{32}")
_WORDS: Final = re.compile(r"[a-z]{1,16}(?:[_-][a-z]{1,16}){2,}")
_RANDOM_LENGTH: Final = 32
"""From so many characters on a run is taken for random: 24 bytes are 32 characters of base64."""


def _run(match: re.Match[str]) -> str:
    """A run of base64 characters goes when it is long, unless it is one of our ids, a name or a path made
    of words.

    Standard base64 shares `/` with file paths: there only a run with all three kinds of character is taken
    for it.
    """
    run = match.group()
    bare = run.rstrip("=")
    if "/" in bare or "+" in bare or len(bare) < _RANDOM_LENGTH:
        padded = len(bare) < len(run) and _mixed(bare)
        long = len(bare) >= _RANDOM_LENGTH and _mixed(bare)
        return REDACTED if padded or long else re.sub(r"[^/+=]+", _word, run)
    return REDACTED if _random(bare) else run


def _word(match: re.Match[str]) -> str:
    return REDACTED if _random(match.group()) else match.group()


def _random(run: str) -> bool:
    return len(run) >= _RANDOM_LENGTH and not (_OUR_ID.fullmatch(run) or _WORDS.fullmatch(run))


def _mixed(run: str) -> bool:
    return any(map(str.isupper, run)) and any(map(str.islower, run)) and any(map(str.isdigit, run))


_Replacement = str | Callable[[re.Match[str]], str]

# The order matters: the forms with structure first, the catch-all for random runs last but one.
_RULES: Final[Sequence[tuple[re.Pattern[str], _Replacement]]] = (
    # PEM private keys, also when the end marker was cut off
    (
        re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}-----|\Z)", re.S),
        REDACTED,
    ),
    # whole header lines
    (re.compile(r"(?i)(authorization|cookie)(\\?[\"']?\s*[:=]\s*)[^\r\n]+"), rf"\1\2{REDACTED}"),
    # Authorization values wherever they stand (RFC 6750 §2.1, RFC 7617 §2)
    (
        re.compile(r"(?i)(bearer|basic|dpop)((?:\s|%20|\+|\\?[\"':=])+)[A-Za-z0-9._~+/%=\-]{4,}"),
        rf"\1\2{REDACTED}",
    ),
    # userinfo of a URL: postgresql://user:password@host
    (re.compile(r"(://)[^\s\"'<>]{0,1024}@"), rf"\1{REDACTED}@"),
    # keyed values in JSON and in Python's repr, also when the quotes are escaped
    (
        re.compile(
            rf"(?i)({_KEY}s?\\*[\"']\s*:\s*)(?:\\*\"(?:[^\"\\]|\\.)*\\*\"?|\\*'(?:[^'\\]|\\.)*\\*'?|[^\s,}}\]]+)"
        ),
        rf"\1{REDACTED}",
    ),
    # keyed values in forms, query strings and keyword lists, also when percent-encoded as a whole
    (
        re.compile(rf"(?i)({_KEY}s?\s*(?:=|%3d)\s*)(?:\"[^\"]*\"?|'[^']*'?|[^&\s\"'<>;,]+)"),
        rf"\1{REDACTED}",
    ),
    # JSON Web Tokens (RFC 7519): two or three parts, the first of which begins with {"
    (re.compile(r"eyJ[A-Za-z0-9_\-]{4,}(?:(?:\.|%2[eE])[A-Za-z0-9_\-]*)*"), REDACTED),
    # Salesforce: session ids and access tokens 00D…!…, refresh tokens 5Aep…
    (re.compile(r"00D[A-Za-z0-9]{12,15}(?:!|%21|\\u0021|\\x21)[A-Za-z0-9._\-]+"), REDACTED),
    (re.compile(r"5Aep[A-Za-z0-9._\-]{16,}"), REDACTED),
    # HubSpot: refresh tokens and codes na1-…, private app tokens pat-na1-…
    (re.compile(r"(?:pat-)?(?:na|eu|ap|ca|au|sa|me|us)\d{1,2}-[A-Za-z0-9][A-Za-z0-9\-]{7,}"), REDACTED),
    # HubSpot: older refresh tokens and client secrets are bare UUIDs
    (re.compile(r"(?i)[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), REDACTED),
    # anything random enough, such as a key encryption key or a caller's secret
    (re.compile(r"[A-Za-z0-9+/_\-]{20,}={0,2}"), _run),
    # e-mail addresses; 64 is the longest local part (RFC 5321 §4.5.3.1.1) and keeps the search linear
    (re.compile(r"[^\s@<>\"'(),;:=&?/\\\[\]]{1,64}(?:@|%40)[\w\-]+(?:\.[\w\-]+)+"), REDACTED),
)


def scrub(text: str) -> str:
    """The text without whatever looks like a token, a secret, a password or an e-mail address.

    Longer texts are cut, at white space so that no half of a token is left unrecognised. Idempotent; never
    raises.
    """
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rpartition(" ")[0] + " […]"
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def presentable(value: object, *, depth: int = 0) -> Any:
    """The value as JSON may carry it out: numbers as they are, text scrubbed, everything else by its type.

    Secrets and bytes show only that they are there. An exception shows its class, our own ones their code and
    detail too; a foreign message may quote SQL parameters or a URL, so it never shows.
    """
    match value:
        case Enum():
            return presentable(value.value, depth=depth + 1)
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float():
            return value
        case str():
            return scrub(value)
        case Secret():
            return repr(value)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case date():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case UUID():
            return value.hex
        case PurePath():
            return scrub(str(value))
        case BaseException():
            return fault(value)
    if depth >= _DEEPEST:
        return f"<{type(value).__name__}>"
    return _container(value, depth=depth)


def _container(value: object, *, depth: int) -> Any:
    if isinstance(value, Mapping):
        pairs = list(value.items())[:_MOST_ITEMS]
        return {_key(name): _member(name, member, depth=depth) for name, member in pairs}
    if isinstance(value, (Sequence, AbstractSet)):
        return [presentable(member, depth=depth + 1) for member in list(value)[:_MOST_ITEMS]]
    return f"<{type(value).__name__}>"


def _key(name: object) -> str:
    return scrub(name) if isinstance(name, str) else f"<{type(name).__name__}>"


_SECRET_NAME: Final = re.compile(rf"(?i){_KEY}s?\Z|authorization\Z|cookie\Z")


def _member(name: object, member: object, *, depth: int) -> Any:
    """In a mapping the name can give a short secret away that its own form does not."""
    if isinstance(name, str) and isinstance(member, str) and _SECRET_NAME.search(name):
        return REDACTED
    return presentable(member, depth=depth + 1)


def fault(error: BaseException) -> dict[str, Any]:
    """An exception as its class, where it arose, and what it arose from; without messages, source or
    locals.
    """
    told: dict[str, Any] = {"type": _class_name(error)}
    if isinstance(error, DrawbridgeError):
        told |= {"code": error.code, "detail": scrub(error.detail)}
    elif isinstance(error, OSError) and isinstance(error.errno, int):
        told["errno"] = error.errno
    told["at"] = frames(error.__traceback__)
    causes = [_class_name(one) for one in _causes(error)]
    if causes:
        told["from"] = causes
    return told


def frames(traceback: TracebackType | None) -> list[str]:
    """The path to where it happened, innermost last: file, line and function."""
    path = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        path.append(f"{_short(code.co_filename)}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return path[-_MOST_FRAMES:]


def _short(file: str) -> str:
    return "/".join(PurePath(file).parts[-3:])


def _class_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _cause(error: BaseException) -> BaseException | None:
    if error.__cause__ is not None:
        return error.__cause__
    return None if error.__suppress_context__ else error.__context__


def _causes(error: BaseException) -> list[BaseException]:
    """What it arose from, nearest first; a chain that bites its own tail ends."""
    chain: list[BaseException] = []
    cause = _cause(error)
    while cause is not None and cause not in chain and len(chain) < _MOST_ITEMS:
        chain.append(cause)
        cause = _cause(cause)
    return chain
