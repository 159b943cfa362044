"""What can go wrong, in our own words.

Foreign errors are turned into these once, at the border where they arise. Each class carries a stable `code`, the HTTP
`status` it answers with, whether the same request may be `retryable`, and a `hint` for whoever must act. Only
`web/problems.py` knows how they look on the wire and only `__main__` how they look on a terminal.

    DrawbridgeError
    ├── StartRefused                 exit 1: it will not start like this
    │   ├── ConfigurationFault       every fault of the settings at once
    │   ├── KeyringFault             the keys do not open the data
    │   └── DatabaseMismatch         the database is older, newer or not ours
    ├── Unauthenticated        401   unknown, expired or malformed credential
    ├── Forbidden              403   known caller, permission missing
    ├── NotFound               404
    ├── InvalidRequest         400
    │   ├── Unprocessable      422   well-formed, but not acceptable
    │   └── Conflict           409   the name or identity is taken
    ├── TooLarge               413
    ├── RateLimited            429
    ├── NeedsReconnect         409   the provider refused the grant: an admin must connect again
    ├── ConnectionDisabled     409
    ├── AccountMismatch        409   a reconnect brought back another account
    ├── ProviderUnavailable    503   the provider is down or unclear
    │   └── ProviderRateLimited 503
    ├── ProviderMisconfigured  503   our client registration is refused: an operator must act
    ├── RefreshInProgress      503   somebody refreshes right now; ask again
    ├── Overloaded             503   this installation cannot answer now
    │   ├── DatabaseUnavailable
    │   ├── AuditUnavailable         nothing leaves that cannot be recorded
    │   └── RefreshHeld              a restored or copied database: `adopt` first
    └── Unopenable             500   a sealed record that does not open
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "AccountMismatch",
    "AuditUnavailable",
    "ConfigurationFault",
    "Conflict",
    "ConnectionDisabled",
    "DatabaseMismatch",
    "DatabaseUnavailable",
    "DrawbridgeError",
    "Forbidden",
    "InvalidRequest",
    "KeyringFault",
    "NeedsReconnect",
    "NotFound",
    "Overloaded",
    "ProviderMisconfigured",
    "ProviderRateLimited",
    "ProviderUnavailable",
    "RateLimited",
    "RefreshHeld",
    "RefreshInProgress",
    "StartRefused",
    "TooLarge",
    "Unauthenticated",
    "Unopenable",
    "Unprocessable",
]


class DrawbridgeError(Exception):
    """The root: something of ours failed and says so in one sentence.

    `detail` is the sentence for this case, `retry_after` the seconds after which asking again makes sense.
    Neither may hold a secret or anything that identifies a customer.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False
    hint: ClassVar[str] = "Look into the log for the event with this time; it names the cause."
    default_retry_after: ClassVar[float | None] = None

    def __init__(self, detail: str | None = None, *, retry_after: float | None = None) -> None:
        self.detail = detail or self.title
        self.retry_after = self.default_retry_after if retry_after is None else retry_after
        super().__init__(self.detail)


class StartRefused(DrawbridgeError):
    """The program will not start like this."""

    code = "start_refused"
    title = "Start refused"


class ConfigurationFault(StartRefused):
    """The settings are wrong; `faults` lists every one of them as a sentence."""

    code = "configuration"
    title = "Configuration fault"

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


class KeyringFault(StartRefused):
    """The key encryption keys are missing, malformed or not those the data was sealed with."""

    code = "keyring"
    title = "Keyring fault"


class DatabaseMismatch(StartRefused):
    """The database belongs to another version or has not been migrated."""

    code = "database_mismatch"
    title = "Database mismatch"


class Unauthenticated(DrawbridgeError):
    """The credential is missing, malformed, unknown or expired: always 401, never a reason why (RFC 9110 §15.5.2)."""

    code = "unauthenticated"
    status = 401
    title = "Authentication needed"
    hint = "Send a valid caller credential: Basic with client id and secret, or Bearer with a token from /oauth/token."


class Forbidden(DrawbridgeError):
    """The caller is known and may not do this; the same answer whether the target exists or not."""

    code = "forbidden"
    status = 403
    title = "Not permitted"
    hint = "An admin can grant it: drawbridge caller allow NAME ACTION@PATTERN."


class NotFound(DrawbridgeError):
    """The thing named does not exist."""

    code = "not_found"
    status = 404
    title = "Not found"
    hint = "Check the name; `drawbridge connection list` shows what exists."


class InvalidRequest(DrawbridgeError):
    """The request is malformed."""

    code = "invalid_request"
    status = 400
    title = "Invalid request"
    hint = "Correct the request as the detail says; the API is described at /openapi.json."


class Unprocessable(InvalidRequest):
    """The request is well-formed but asks for something that cannot be."""

    status = 422


class Conflict(InvalidRequest):
    """The name or identity is already taken."""

    status = 409
    code = "conflict"
    title = "Conflict"
    hint = "Choose another name, or change the existing entry."


class TooLarge(DrawbridgeError):
    """The request body or a header is larger than anything we accept."""

    code = "too_large"
    status = 413
    title = "Request too large"
    hint = "Send a smaller request."


class RateLimited(DrawbridgeError):
    """The caller asked more often than its limit allows."""

    code = "rate_limited"
    status = 429
    title = "Too many requests"
    retryable = True
    hint = "Wait as long as Retry-After says; keep a token until shortly before it expires."
    default_retry_after = 1.0


class NeedsReconnect(DrawbridgeError):
    """The provider has refused the grant for good; only connecting again helps."""

    code = "needs_reconnect"
    status = 409
    title = "Connection needs to be reconnected"
    hint = "An admin opens the connect page (or a link from `drawbridge connection link`) and connects the account again."


class ConnectionDisabled(DrawbridgeError):
    """An admin has switched the connection off or is disconnecting it."""

    code = "connection_disabled"
    status = 409
    title = "Connection disabled"
    hint = "An admin can switch it on again: drawbridge connection enable NAME."


class AccountMismatch(DrawbridgeError):
    """The account that came back from the provider is not the one this connection stands for."""

    code = "account_mismatch"
    status = 409
    title = "Another account was connected"
    hint = "Nothing was stored. Sign in to the right account at the provider and connect again."


class ProviderUnavailable(DrawbridgeError):
    """The provider did not answer usefully and no valid token is left to hand out."""

    code = "provider_unavailable"
    status = 503
    title = "Provider unavailable"
    retryable = True
    hint = "Nothing needs doing here: it is retried by itself."
    default_retry_after = 5.0


class ProviderRateLimited(ProviderUnavailable):
    """The provider asks us to slow down and no valid token is left to hand out."""

    code = "provider_rate_limited"
    title = "Provider rate limit"


class ProviderMisconfigured(DrawbridgeError):
    """The provider refuses our client registration; no connection is to blame."""

    code = "provider_misconfigured"
    status = 503
    title = "Client registration refused by the provider"
    retryable = True
    hint = "An operator checks client id, client secrets and grant types of the app: drawbridge app list, app rotate."
    default_retry_after = 60.0


class RefreshInProgress(DrawbridgeError):
    """The token is being refreshed by somebody else and did not arrive in time."""

    code = "refresh_in_progress"
    status = 503
    title = "Refresh in progress"
    retryable = True
    hint = "Ask again; the new token will be there."
    default_retry_after = 1.0


class Overloaded(DrawbridgeError):
    """This installation cannot answer right now."""

    code = "overloaded"
    status = 503
    title = "Temporarily unable to answer"
    retryable = True
    hint = "Ask again shortly; if it stays, look at /readyz, the disk and the database."
    default_retry_after = 2.0


class DatabaseUnavailable(Overloaded):
    """The database cannot be reached, refuses, or cannot write."""

    title = "Database unavailable"


class AuditUnavailable(Overloaded):
    """The hand-out cannot be recorded, so it does not happen."""

    title = "Audit trail unavailable"


class RefreshHeld(Overloaded):
    """The database looks like a restored backup or a copy: nothing is refreshed until `drawbridge adopt`."""

    title = "Refreshing is held until this database is adopted"
    hint = "If no other installation uses this data any more, run: drawbridge adopt."
    default_retry_after = 60.0


class Unopenable(DrawbridgeError):
    """A sealed record does not open: wrong key, another row's record, or edited bytes."""

    title = "A sealed record does not open"
    hint = "The database was edited or the keyring is not the one it was sealed with."
