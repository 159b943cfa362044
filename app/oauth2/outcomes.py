"""The ways a token request can end, and the table that tells them apart.

    Granted          a complete token answer
    Refused          the provider refuses *this grant*; the only ending that may ever kill a connection
    Unavailable      the provider answered that it will not do it now; nothing was spent, ask again
    Misconfigured    the provider refuses *us* or the request; an operator must act, the grant is kept
    Unknown          sent, but no complete, understood answer came back: the refresh token may be spent
    NotSent          not a byte of the body left: nothing can have been spent

When in doubt the table prefers the ending that keeps the grant: an unknown 4xx is Misconfigured, an
unreadable answer is Unknown. And it prefers the ending that keeps trouble where it was seen: what need not be
about our client is about this one connection. `code` is a short stable machine word of ours (never a vendor's
sentence, which may name people); `EXPLANATIONS` says what each means, `causes` what may stand behind it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from app.secret import Secret

if TYPE_CHECKING:
    from app.http_client import Answer

__all__ = [
    "CLIENT_REFUSED",
    "EXPLANATIONS",
    "MAX_RETRY_AFTER",
    "Granted",
    "Misconfigured",
    "NotSent",
    "Outcome",
    "OutcomeKind",
    "Refused",
    "Unavailable",
    "Unknown",
    "by_error",
    "classify",
    "early",
    "error_of",
    "granted_from",
    "json_object",
    "retry_after",
    "text_of",
]

OutcomeKind = Literal["granted", "refused", "unavailable", "misconfigured", "unknown", "not_sent"]


@dataclass(frozen=True, slots=True)
class Granted:
    """A complete answer with an access token (RFC 6749 §5.1).

    `expires_in` is in seconds, None where the answer does not say; it counts from `sent_at`, when the request
    was sent. `scopes` None means: not told, so as asked (§5.1). `extras` are the other fields of the answer,
    for the provider file; tokens are never among them.
    """

    access_token: Secret
    refresh_token: Secret | None = None
    _: KW_ONLY
    expires_in: float | None = None
    scopes: tuple[str, ...] | None = None
    sent_at: datetime
    extras: Mapping[str, object] = field(default_factory=dict, repr=False, hash=False)

    kind: ClassVar[OutcomeKind] = "granted"


@dataclass(frozen=True, slots=True)
class Refused:
    """The provider refuses this very grant (RFC 6749 §5.2 `invalid_grant`); `code` says how it put it."""

    code: str

    kind: ClassVar[OutcomeKind] = "refused"


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A complete answer that says: not now. `retry_after` is in seconds, None where the provider did not say.

    `then` is set where this answer excuses itself only once: coming again on the same generation, it means
    `then`. `whole_app` is false where only this grant or account has to wait, so that the app's other
    connections need not.
    """

    code: str
    retry_after: float | None = None
    _: KW_ONLY
    rate_limited: bool = False
    then: Refused | None = None
    whole_app: bool = True

    kind: ClassVar[OutcomeKind] = "unavailable"


@dataclass(frozen=True, slots=True)
class Misconfigured:
    """The provider refuses our client or what we asked; the grant is not to blame.

    `whole_app` is true only where nothing but our client can be meant, so that no other connection of the app
    would fare better. It is false where one account's settings at the provider may stand in the way (a user
    switched off, an address not allowed), or one request (a scope, a kind of grant, a word nobody knows): the
    app's other connections need not back off, and if they fail alike, the broker sees the crowd.
    """

    code: str
    _: KW_ONLY
    whole_app: bool = True

    kind: ClassVar[OutcomeKind] = "misconfigured"


@dataclass(frozen=True, slots=True)
class Unknown:
    """The request may have been carried out, but no complete and understood answer says so."""

    code: str

    kind: ClassVar[OutcomeKind] = "unknown"


@dataclass(frozen=True, slots=True)
class NotSent:
    """Nothing of the request's body left this machine; trying again costs nothing."""

    code: str

    kind: ClassVar[OutcomeKind] = "not_sent"


Outcome = Granted | Refused | Unavailable | Misconfigured | Unknown | NotSent

# Where a vendor's own word differs from these, its provider file adds to them.
EXPLANATIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "abandoned": "The right to refresh ran out before the request was sent; it is taken again.",
        "access_denied": "The provider denies access to this account; look at the app's settings there.",
        "account_changed": "The answer was for another account than the one connected here.",
        "address_not_allowed": "The provider's name stands for an address that must not be asked.",
        "bad_request": "The request cannot be written: a header or field holds what HTTP does not carry.",
        "bad_url": "The configured address is no address.",
        "busy": "The provider is already processing a request with this token; it is asked again.",
        "client_id_unknown": (
            "The provider does not know the client id; compare it with the app's page there."
        ),
        "client_secret_refused": (
            "The provider refuses every client secret we have; rotate them: drawbridge app rotate."
        ),
        "connect_timeout": "The provider could not be reached in time; nothing was sent.",
        "deadline": "The time for the whole request was up.",
        "dns": "The provider's name does not resolve; nothing was sent.",
        "host_not_allowed": "The address is not among those of the registered apps.",
        "http_error": "The provider answered with a server error after it had the request.",
        "invalid_client": "The provider refuses our client id and every client secret we have.",
        "invalid_grant": (
            "The provider says that the grant is invalid, expired or revoked; connect the account again."
        ),
        "invalid_request": "The provider finds the request malformed; look at the app's options.",
        "invalid_scope": "The provider does not give the app the scopes it asks for.",
        "internal": "A fault of this program; the log holds it as broker:refresh:crashed.",
        "loopback": "The address is on this machine; only ALLOW_LOOPBACK_PROVIDERS permits that.",
        "malformed": "The answer is not HTTP.",
        "no_answer": "The request was sent and no complete answer came back.",
        "no_token": "The provider answered 200 without an access token in it.",
        "no_refresh_token": "The connection has no refresh token; connect it again.",
        "not_json": "The provider, or something in front of it, answered with something that is not JSON.",
        "not_https": "The configured address is not https; credentials are not sent there.",
        "nothing_to_refresh": (
            "The connection has no refresh token and nothing to mint a token from; connect it again."
        ),
        "rate_limited": "The provider asks us to slow down.",
        "oversized": "The answer was larger than any token answer is.",
        "read_timeout": "The request was sent and the answer did not come in time.",
        "redirect": "The token endpoint answered with a redirect, which is never followed with credentials.",
        "redirect_uri_mismatch": (
            "The redirect address is not registered at the provider: PUBLIC_URL + /connect/…/callback."
        ),
        "refused": "Nobody listens at the provider's address; nothing was sent.",
        "reset": "The connection was closed in the middle.",
        "server_error": "The provider says that it failed inside.",
        "temporarily_unavailable": "The provider says that it is not available right now.",
        "tls": "No secure connection could be made; nothing was sent.",
        "tls_untrusted": "The certificate shown is not the provider's; nothing was sent.",
        "token_type": "The provider answered with a token that is not a bearer token.",
        "unauthorized_client": "The app may not use this grant type at the provider.",
        "truncated": "The answer ended before it was complete.",
        "unexpected_status": "The provider answered with a status that a token endpoint never gives.",
        "unreachable": "There is no way to the provider's address; nothing was sent.",
        "unrecognised_error": (
            "The provider refuses the request for a reason we do not know; nothing was marked dead."
        ),
        "unsupported_grant_type": (
            "The provider does not offer this grant type, or it is switched off for the app."
        ),
        "wrong_endpoint": "There is no token endpoint at the configured address.",
    }
)

# Another client secret may help with these: the client was refused before the grant was looked at (RFC 6749
# §5.2).
CLIENT_REFUSED: Final = frozenset({"invalid_client", "client_id_unknown", "client_secret_refused"})

# However long a provider asks us to stay away, we look again after this many seconds: 1 h.
MAX_RETRY_AFTER: Final = 3600.0

# An access token that lives longer is a mistake in the answer; ten years: 10 × 365 × 86,400 s.
_LONGEST_LIFE: Final = 315_360_000.0
# "0" or less says: already dead. One second keeps it from being handed out for any sensible `min_ttl`.
_SHORTEST_LIFE: Final = 1.0
_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{1,9})?")
_NEVER_EXTRAS: Final = frozenset({"access_token", "refresh_token", "id_token"})

# What RFC 6749 §5.2 says of the client itself is the whole app's. Of the others `invalid_scope` may exceed what
# one owner granted, `invalid_request` may be about one token, and an app may hold grants of several types.
_BY_ERROR: Final[Mapping[str, Outcome]] = MappingProxyType(
    {
        "invalid_grant": Refused("invalid_grant"),
        "invalid_client": Misconfigured("invalid_client"),
        "unauthorized_client": Misconfigured("unauthorized_client"),
        "unsupported_grant_type": Misconfigured("unsupported_grant_type", whole_app=False),
        "invalid_scope": Misconfigured("invalid_scope", whole_app=False),
        "invalid_request": Misconfigured("invalid_request", whole_app=False),
        "access_denied": Misconfigured("access_denied", whole_app=False),
        "redirect_uri_mismatch": Misconfigured("redirect_uri_mismatch"),
        "temporarily_unavailable": Unavailable("temporarily_unavailable"),
        "server_error": Unknown("server_error"),
    }
)


def classify(answer: Answer) -> Outcome:
    """Judge a complete HTTP answer of a plain RFC 6749 token endpoint; never raises, whatever the bytes."""
    return early(answer) or by_error(json_object(answer))


def early(answer: Answer) -> Outcome | None:
    """Judge what needs no vendor's words: success, "not now", server errors, redirects, and 4xx that are not
    JSON.

    None is left for a 4xx with a JSON object in it: an error answer (RFC 6749 §5.2), whose words decide.
    """
    status = answer.status
    if 200 <= status < 300:
        return granted_from(answer)
    if status in (429, 503):
        code = "rate_limited" if status == 429 else "temporarily_unavailable"
        return Unavailable(code, retry_after(answer), rate_limited=status == 429)
    if 300 <= status < 400:
        return Unknown("redirect")
    if not 400 <= status < 500:
        return Unknown("http_error" if status >= 500 else "unexpected_status")
    # 408: the server, or a proxy, gave up on a request it had begun to read.
    if status == 408:
        return Unknown("no_answer")
    if json_object(answer) is not None:
        return None
    return Misconfigured("wrong_endpoint") if status in (404, 405, 410) else Unknown("not_json")


def by_error(data: Mapping[str, object] | None) -> Outcome:
    """Judge an error answer by its RFC 6749 §5.2 `error`; one we do not know never costs the grant, nor
    does it hold up the app's other connections.
    """
    return _BY_ERROR.get(error_of(data), Misconfigured("unrecognised_error", whole_app=False))


def error_of(data: Mapping[str, object] | None) -> str:
    """The `error` of an error answer in lower case, empty where it has none."""
    return text_of(data, "error").strip().lower()


def text_of(data: Mapping[str, object] | None, name: str) -> str:
    """A text field of an answer, empty where it is absent or something else."""
    value = (data or {}).get(name)
    return value if isinstance(value, str) else ""


def granted_from(answer: Answer) -> Granted | Unknown:
    """Read a success answer (RFC 6749 §5.1).

    Only a missing token spoils it: a life or scopes that make no sense count as not told, because throwing
    the answer away would throw a rotated refresh token away with it.
    """
    data = json_object(answer)
    if data is None:
        return Unknown("not_json")
    access_token = _token(data, "access_token")
    if access_token is None:
        return Unknown("no_token")
    if "token_type" in data and text_of(data, "token_type").lower() != "bearer":
        return Unknown("token_type")
    return Granted(
        access_token,
        _token(data, "refresh_token"),
        expires_in=_life(data.get("expires_in")),
        scopes=_scopes(data),
        sent_at=answer.sent_at,
        extras=MappingProxyType({name: data[name] for name in data.keys() - _NEVER_EXTRAS}),
    )


def _token(data: Mapping[str, object], name: str) -> Secret | None:
    """A token is printable ASCII (RFC 6749 §A.12, §A.17); anything else could not be sent back anyway."""
    text = text_of(data, name)
    return Secret(text) if text.strip() and text.isascii() and text.isprintable() else None


def _life(value: object) -> float | None:
    """Seconds from a JSON number or a numeric string, inside sane bounds; None when unusable."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(min(max(value, _SHORTEST_LIFE), _LONGEST_LIFE))


def _scopes(data: Mapping[str, object]) -> tuple[str, ...] | None:
    scope = data.get("scope")
    return tuple(scope.split()) if isinstance(scope, str) else None


def json_object(answer: Answer) -> dict[str, object] | None:
    """The JSON object in a body, None where the body is anything else."""
    try:
        data = json.loads(answer.body)
    except (
        ValueError,
        RecursionError,
    ):  # not JSON, not UTF-8, a number of a million digits, or nested without end
        return None
    return data if isinstance(data, dict) else None


def retry_after(answer: Answer) -> float | None:
    """Seconds to stay away as `Retry-After` says, a number or a date (RFC 9110 §10.2.3), never above
    MAX_RETRY_AFTER.
    """
    raw = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,9})?", raw):
        return min(float(raw), MAX_RETRY_AFTER)
    until = _http_date(raw)
    if until is None:
        return None
    # The provider's own clock is the fair start; without it, ours when the request went out.
    since = _http_date(answer.headers.get("Date", "")) or answer.sent_at
    return min(max((until - since).total_seconds(), 0.0), MAX_RETRY_AFTER)


def _http_date(raw: str) -> datetime | None:
    try:
        when = parsedate_to_datetime(raw)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)
