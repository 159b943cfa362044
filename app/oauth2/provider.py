"""The port between the broker and a vendor: what an authorization server can do, and who stands behind a
token.

`Provider` is complete in itself: a client of a plain RFC 6749 server. A vendor is a subclass in a file of its
own that names its endpoints and says where it differs. A provider holds no state: apps, grants and wires are
handed in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal
from urllib.parse import quote, urlencode, urlsplit

from marshmallow import Schema, ValidationError, fields, validate

from app.errors import (
    ConfigurationFault,
    InvalidRequest,
    ProviderMisconfigured,
    ProviderRateLimited,
    ProviderUnavailable,
)
from app.http_client import Answer
from app.oauth2 import causes, client, outcomes
from app.oauth2.causes import Cause, Remedy
from app.oauth2.client import ClientAuth, Credentials, Form, Wire
from app.oauth2.outcomes import Granted, Misconfigured, Outcome, Refused, Unavailable
from app.secret import Secret

if TYPE_CHECKING:
    from app.settings import Settings

__all__ = [
    "LOOPBACK",
    "Account",
    "App",
    "Grant",
    "GrantType",
    "Provider",
    "ProviderOptions",
    "RevokeResult",
    "Rotation",
    "TokenRequest",
    "claimed_id",
    "life_of",
    "redirect_uri",
    "server_url",
]

GrantType = Literal["authorization_code", "jwt_bearer", "client_credentials"]
RevokeResult = Literal["done", "retry", "impossible"]
Rotation = Literal["unknown", "seen", "not_seen"]
# What a token request asks with; `refresh_token` is the one that must never be sent twice.
TokenRequest = Literal["authorization_code", "refresh_token", "jwt_bearer", "client_credentials"]

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_EMPTY: Final[Mapping[str, Any]] = MappingProxyType({})
_ID: Final = re.compile(r"[!-~]{1,128}")
# Beyond these a number in an introspection answer is not seconds: 400 days, and the year 2286.
_LONGEST_LIFE: Final = 400 * 86_400.0
_LATEST: Final = 10_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """A registered OAuth client, opened for use; `secrets` newest first, `options` as the provider's schema
    left them.
    """

    id: str
    provider: str
    name: str
    client_id: str
    secrets: tuple[Secret, ...] = ()
    scopes: tuple[str, ...] = ()
    optional_scopes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    redirect_uri: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """What stands for one approval: a refresh token, or what a new access token is minted from."""

    grant_type: GrantType
    _: KW_ONLY
    refresh_token: Secret | None = None
    access_token: Secret | None = None
    subject: str | None = None
    private_key: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who a token acts for.

    `identity` is the provider's key of (account, user) within one app: two installs with the same identity
    are one connection. `user_id` is empty where the account alone is the identity. `details` holds provider
    facts without personal data.
    """

    account_id: str
    user_id: str = ""
    identity: str
    scopes: tuple[str, ...]
    instance_url: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)


def server_url(value: str) -> None:
    """Refuse what cannot be a server's address: https, or http on this machine, without credentials or
    fragment.

    Raises marshmallow's ValidationError, so that it stands as a field's validator.
    """
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValidationError("Not an address.") from error
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)):
        raise ValidationError("Must be an https address.")
    if parts.username is not None or parts.fragment:
        raise ValidationError("Must not hold credentials or a fragment.")


class ProviderOptions(Schema):
    """What an operator may set on an app of any provider: another address for each endpoint."""

    authorize_endpoint = fields.String(validate=server_url, metadata={"help": "Address of the consent page."})
    token_endpoint = fields.String(validate=server_url, metadata={"help": "Address of the token endpoint."})
    revoke_endpoint = fields.String(
        validate=server_url, metadata={"help": "RFC 7009 endpoint, if there is one."}
    )
    introspect_endpoint = fields.String(
        validate=server_url, metadata={"help": "RFC 7662 endpoint, if there is one: tells account and life."}
    )
    userinfo_endpoint = fields.String(
        validate=server_url,
        metadata={"help": "OpenID Connect UserInfo endpoint, if there is one: tells the account."},
    )

    max_refreshes_per_second = fields.Float(
        validate=validate.Range(0.1, 1000.0),
        metadata={"help": "How many refreshes a second all workers together send for this app (default 50)."},
    )


class Provider:
    """A plain RFC 6749 authorization server; a vendor overrides what it does differently.

    The least a subclass gives is `name`, `title`, `authorize_endpoint` and `token_endpoint`. Everything that
    goes over the network takes a `Wire`; token requests answer with an `Outcome` and never raise, the others
    raise ProviderUnavailable when there is no usable answer and ProviderMisconfigured when the answer shows
    that the app is set up wrongly.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    authorize_endpoint: ClassVar[str] = ""
    token_endpoint: ClassVar[str] = ""
    revoke_endpoint: ClassVar[str] = ""
    introspect_endpoint: ClassVar[str] = ""
    userinfo_endpoint: ClassVar[str] = ""

    grant_types: ClassVar[tuple[GrantType, ...]] = ("authorization_code", "client_credentials")
    client_auth: ClassVar[ClientAuth] = "basic"
    # What a connection believes of refresh-token rotation until it has seen a refresh; "unknown" counts as
    # rotating.
    rotation_at_start: ClassVar[Rotation] = "unknown"
    # Seconds an access token is taken to live where neither the answer nor introspection says: 15 min.
    assumed_life: ClassVar[float] = 900.0
    # The claim that names the account in token, introspection and UserInfo answers (RFC 7662 §2.2, OpenID
    # Connect §5.3).
    account_claim: ClassVar[str] = "sub"
    # Domains under which an `instance_url` of this vendor may lie.
    allowed_instance_hosts: ClassVar[tuple[str, ...]] = ()

    # Whether `uninstall` exists here: removing the app from a whole account.
    can_uninstall: ClassVar[bool] = False

    options_schema: ClassVar[type[Schema]] = ProviderOptions
    option_defaults: ClassVar[Mapping[str, Any]] = _EMPTY
    explanations: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # Which causes stand behind this vendor's own codes, the likeliest first, and its own words on what to do.
    causes: ClassVar[Mapping[str, tuple[Cause, ...]]] = MappingProxyType({})
    remedies: ClassVar[Mapping[Cause, Remedy]] = MappingProxyType({})
    # Who administers a customer's account, in a sentence: "the account's admin".
    account_admin: ClassVar[str] = "the account's admin"
    # Days after which a refresh token that nobody used may die, and how many approvals of one user for one
    # app may stand at a time; None where the vendor has no such limit.
    idle_days: ClassVar[float | None] = None
    approvals_limit: ClassVar[int | None] = None

    # --- the app and its options ---

    def from_settings(self, settings: Settings) -> App | None:
        """The app called `default` as the settings define it, None where they do not.

        Raises ConfigurationFault for options this provider does not take.
        """
        return None

    def load_options(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Check what an operator gave as options; text is turned into each option's type, defaults are not
        filled in.

        Raises InvalidRequest naming every fault.
        """
        try:
            loaded: dict[str, Any] = self.options_schema().load(raw)
        except ValidationError as error:
            faults = "; ".join(
                f"{name}: {_first(said)}" for name, said in sorted(error.messages_dict.items())
            )
            raise InvalidRequest(f"Options of a {self.title} app: {faults}") from error
        return loaded

    def options_from_settings(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """As `load_options`, for options that stand in the settings; unset ones are left out."""
        try:
            return self.load_options({name: value for name, value in raw.items() if value not in (None, "")})
        except InvalidRequest as error:
            raise ConfigurationFault([error.detail]) from error

    def describe_options(self) -> Mapping[str, str]:
        """Every option with a sentence on it, for `app add --help` and the docs."""
        return {
            name: str(item.metadata.get("help", "")) for name, item in self.options_schema().fields.items()
        }

    def option(self, app: App, name: str) -> Any:
        """An option of the app, or the default this version of the provider file has for it."""
        return app.options.get(name, self.option_defaults.get(name))

    def check_grant(self, app: App, grant: Grant) -> None:
        """Refuse, with InvalidRequest, a grant that this provider or app can never refresh."""
        if grant.grant_type not in self.grant_types:
            raise InvalidRequest(
                f"{self.title} offers {', '.join(self.grant_types)}, not {grant.grant_type}."
            )
        if grant.grant_type == "client_credentials" and not app.secrets:
            raise InvalidRequest("client_credentials needs a client secret.")

    def explain(self, code: str) -> str | None:
        """What an outcome's `code` means, in a sentence for the operator."""
        return self.explanations.get(code) or outcomes.EXPLANATIONS.get(code)

    def causes_of(self, error: str) -> tuple[Cause, ...]:
        """What may stand behind an error (`kind:code`, as a connection keeps it), the likeliest first; never
        empty.
        """
        kind, _, code = error.partition(":")
        for known in (self.causes, causes.BEHIND):
            found = known.get(error) or known.get(code or kind)
            if found:
                return found
        return causes.BEHIND.get(f"{kind}:", (Cause.UNRECOGNISED,))

    def remedy(self, cause: Cause) -> Remedy:
        """What this vendor's customers are told of a cause: what is wrong, who mends it and how."""
        remedy = self.remedies.get(cause) or causes.REMEDIES[cause]
        return remedy.named(title=self.title, admin=self.account_admin)

    # --- the browser's way ---

    def authorize_url(
        self,
        app: App,
        *,
        state: str,
        challenge: str,
        scopes: tuple[str, ...] | None = None,
        optional: tuple[str, ...] | None = None,
    ) -> str:
        """The consent page's address for one trip (RFC 6749 §4.1.1, RFC 7636 §4.3); scopes default to the
        app's.
        """
        query = {
            "response_type": "code",
            "client_id": app.client_id,
            "redirect_uri": app.redirect_uri,
            "state": state,
            **self.scope_query(
                app.scopes if scopes is None else scopes,
                app.optional_scopes if optional is None else optional,
            ),
        }
        if self.uses_pkce(app):
            query |= {"code_challenge": challenge, "code_challenge_method": "S256"}
        address = self.endpoint(app, "authorize")
        return address + ("&" if "?" in address else "?") + urlencode(query, quote_via=quote, safe="")

    def scope_query(self, scopes: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, str]:
        """The part of the authorize query that asks for scopes; RFC 6749 knows no optional ones, so all are
        asked for.
        """
        wanted = " ".join(dict.fromkeys((*scopes, *optional)))
        return {"scope": wanted} if wanted else {}

    def uses_pkce(self, app: App) -> bool:
        """Whether authorize and exchange carry a PKCE pair."""
        return True

    # --- token requests ---

    def exchange(self, app: App, *, code: Secret, verifier: Secret | None, wire: Wire) -> Outcome:
        """Turn an authorization code into tokens (RFC 6749 §4.1.3)."""
        form: dict[str, str | Secret] = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": app.redirect_uri,
        }
        if verifier is not None and self.uses_pkce(app):
            form["code_verifier"] = verifier
        return self.request_token(app, form, request="authorization_code", wire=wire)

    def refresh(self, app: App, grant: Grant, *, wire: Wire) -> Outcome:
        """Get the next access token: with the refresh token (RFC 6749 §6), or minted anew where the grant has
        none.
        """
        if grant.grant_type == "client_credentials":
            form: Form = {"grant_type": "client_credentials", **self.scope_query(app.scopes, ())}
            return self.request_token(app, form, request="client_credentials", wire=wire)
        if grant.grant_type != "authorization_code" or grant.refresh_token is None:
            return Misconfigured("nothing_to_refresh", whole_app=False)
        form = {"grant_type": "refresh_token", "refresh_token": grant.refresh_token}
        return self.request_token(app, form, request="refresh_token", wire=wire)

    def request_token(self, app: App, form: Form, *, request: TokenRequest, wire: Wire) -> Outcome:
        """Send one kind of token request as this app and judge the answer."""
        return client.request_token(
            wire,
            self.endpoint(app, "token"),
            form=form,
            credentials=self.credentials(app),
            classify=lambda answer: self.classify(answer, request=request),
        )

    def classify(self, answer: Answer, *, request: TokenRequest = "refresh_token") -> Outcome:
        """Judge a complete answer of the token endpoint; never raises."""
        return outcomes.early(answer) or self.classify_error(outcomes.json_object(answer), request=request)

    def classify_error(
        self, data: Mapping[str, object] | None, *, request: TokenRequest = "refresh_token"
    ) -> Outcome:
        """Judge the error object of a 4xx by its words."""
        return outcomes.by_error(data)

    # --- who and how long ---

    def account_told(self, app: App, granted: Granted) -> Account | None:
        """Who the token acts for as far as the token answer itself says, None where it does not; asks nobody.

        Compare its `identity` with the stored one after each refresh, and take `instance_url` from it.
        """
        return self._account(app, granted, granted.extras)

    def identify(self, app: App, granted: Granted, *, wire: Wire) -> Account:
        """Find out who a fresh access token acts for.

        In this order: the token answer, introspection, UserInfo. A server with none of them cannot tell its
        accounts apart, so there the app stands for one account, under the app's name.
        """
        told = self.account_told(app, granted)
        if told is not None:
            return told
        claims: Mapping[str, object] = {}
        if self.endpoint(app, "introspect"):
            claims = self.introspect(app, granted.access_token, wire=wire)
            if claims.get("active") is not True:
                raise ProviderUnavailable(f"{self.title} does not know the token it has just given.")
        elif self.endpoint(app, "userinfo"):
            claims = self.read(wire, self.endpoint(app, "userinfo"), bearer=granted.access_token)
        found = self._account(app, granted, claims)
        return found or Account(account_id=app.name, identity=app.name, scopes=_granted_scopes(app, granted))

    def _account(self, app: App, granted: Granted, claims: Mapping[str, object]) -> Account | None:
        account_id = claimed_id(claims, self.account_claim)
        if account_id is None:
            return None
        return Account(account_id=account_id, identity=account_id, scopes=_granted_scopes(app, granted))

    def identity_of(self, app: App, account_id: str, user_id: str) -> str:
        """The `Account.identity` of an account known by its ids alone, as when connections are imported.

        Raises InvalidRequest when an id that counts is missing or malformed.
        """
        return account_id

    def learn_life(self, app: App, granted: Granted, *, wire: Wire) -> float | None:
        """How many seconds a fresh access token lives from the moment it was asked for; None where nobody
        says.

        Asks introspection where the answer had no `expires_in`. Never raises: not knowing is an answer, and
        `active: false` proves nothing.
        """
        if granted.expires_in is not None:
            return granted.expires_in
        if not self.endpoint(app, "introspect"):
            return None
        try:
            claims = self.introspect(app, granted.access_token, wire=wire)
        except (ProviderUnavailable, ProviderMisconfigured):
            return None
        return life_of(claims, granted=granted)

    def introspect(self, app: App, token: Secret, *, wire: Wire) -> Mapping[str, object]:
        """Ask what the server knows of an access token (RFC 7662)."""
        form: Form = {"token": token, "token_type_hint": "access_token"}
        return self._usable(self._ask(app, "introspect", form, wire=wire))

    def read(self, wire: Wire, url: str, *, bearer: Secret) -> Mapping[str, object]:
        """GET a JSON object from the provider with an access token."""
        return self._usable(client.fetch(wire, "GET", url=url, bearer=bearer))

    def _usable(self, answer: Answer) -> Mapping[str, object]:
        data = outcomes.json_object(answer)
        if answer.status == 200 and data is not None:
            return data
        match self.classify(answer):
            case Unavailable(retry_after=seconds, rate_limited=True):
                raise ProviderRateLimited(retry_after=seconds)
            case Misconfigured(code):
                raise ProviderMisconfigured(f"{self.title} does not say whose token this is: {code}.")
            case Unavailable(retry_after=seconds):
                raise ProviderUnavailable(retry_after=seconds)
        raise ProviderUnavailable

    # --- the end ---

    def revoke(self, app: App, grant: Grant, *, wire: Wire) -> RevokeResult:
        """Give the grant back (RFC 7009): the refresh token, which takes its access tokens along, else the
        access token.
        """
        token = grant.refresh_token or grant.access_token
        if token is None or not self.endpoint(app, "revoke"):
            return "impossible"
        hint = "access_token" if grant.refresh_token is None else "refresh_token"
        try:
            answer = self._ask(app, "revoke", {"token": token, "token_type_hint": hint}, wire=wire)
        except ProviderUnavailable:
            return "retry"
        return self.revoked(answer)

    def revoked(self, answer: Answer) -> RevokeResult:
        """Judge a revocation answer: 2xx is done (RFC 7009 §2.2), and so is a token refused as invalid.

        Impossible is only what the server says it will never do (RFC 7009 §2.2.1). A refused client, a missing
        endpoint or a word nobody knows comes right when somebody corrects it, and the grant lives until then.
        """
        if 200 <= answer.status < 300 or isinstance(self.classify(answer), Refused):
            return "done"
        never = outcomes.error_of(outcomes.json_object(answer)) == "unsupported_token_type"
        return "impossible" if never and 400 <= answer.status < 500 else "retry"

    def uninstall(self, app: App, access_token: Secret, *, wire: Wire) -> RevokeResult:
        """Remove the app from the account, where a vendor knows such a thing; this one does not."""
        return "impossible"

    # --- for subclasses ---

    def endpoint(self, app: App, which: str) -> str:
        """The address of `authorize`, `token`, `revoke`, `introspect` or `userinfo`, empty where there is
        none.
        """
        name = f"{which}_endpoint"
        return str(self.option(app, name) or getattr(self, name))

    def hosts(self, app: App) -> tuple[str, ...]:
        """The origins that requests of this app go to, for the HTTP client's list of where it may go."""
        addresses = [self.endpoint(app, which) for which in ("token", "revoke", "introspect", "userinfo")]
        parts = [urlsplit(address) for address in addresses if address]
        return tuple(dict.fromkeys(f"{part.scheme}://{part.netloc}" for part in parts))

    def credentials(self, app: App) -> Credentials:
        """Who we are to this provider."""
        return Credentials(app.client_id, app.secrets, self.client_auth)

    def _ask(self, app: App, which: str, form: Form, *, wire: Wire) -> Answer:
        return client.ask(
            wire,
            self.endpoint(app, which),
            form=form,
            credentials=self.credentials(app),
            classify_error=self.classify_error,
        )


def claimed_id(claims: Mapping[str, object], name: str) -> str | None:
    """An identifier among an answer's fields, a number or a short printable text, as text; None where there
    is none.
    """
    value = claims.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and _ID.fullmatch(value):
        return value
    return None


def life_of(claims: Mapping[str, object], *, granted: Granted) -> float | None:
    """The life an introspection answer shows (RFC 7662 §2.2), in seconds from when the token was asked for.

    Of the two readings, end less our sending and end less the server's own `iat`, the shorter one holds: that
    way neither clock being off can make a token seem to outlive itself.
    """
    end = _seconds(claims.get("exp"))
    if claims.get("active") is not True or end is None:
        return None
    issued = _seconds(claims.get("iat"))
    life = end - granted.sent_at.timestamp()
    if issued is not None:
        life = min(life, end - issued)
    return life if 0 < life <= _LONGEST_LIFE else None


def redirect_uri(public_url: str, provider: str) -> str:
    """The callback address of this installation for a provider."""
    return f"{public_url.rstrip('/')}/connect/{provider}/callback"


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < _LATEST else None


def _granted_scopes(app: App, granted: Granted) -> tuple[str, ...]:
    return app.scopes if granted.scopes is None else granted.scopes


def _first(messages: Any) -> str:
    return str(messages[0]) if isinstance(messages, list) else str(messages)
