"""Salesforce: host-bound endpoints, tokens that do not say how long they live, refresh tokens that may
rotate.

Everything happens at the app's login URL: the customer's My Domain, or the shared login and test hosts. Three
ways lead to an access token: a person's consent (code with PKCE, then refresh), a signed assertion for a user
who is pre-authorised (JWT bearer), or the app's own run-as user (client credentials, My Domain only). The
last two have no refresh token and are minted anew.

Where an org has rotation on, presenting a refresh token that was already replaced revokes the whole family,
and without it two refreshes at once still turn one another away (help.salesforce.com, Refresh Token Rotation;
Summer '24 release). That second answer looks like a refusal and is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from joserfc import jwt
from joserfc.jwk import RSAKey
from marshmallow import ValidationError, fields

from app.errors import InvalidRequest, ProviderMisconfigured, ProviderUnavailable
from app.oauth2 import outcomes
from app.oauth2.causes import Cause, Remedy
from app.oauth2.client import Form, Wire
from app.oauth2.outcomes import Granted, Misconfigured, Outcome, Refused, Unavailable, text_of
from app.oauth2.provider import (
    LOOPBACK,
    Account,
    App,
    Grant,
    Provider,
    ProviderOptions,
    TokenRequest,
    redirect_uri,
    server_url,
)
from app.secret import Secret

if TYPE_CHECKING:
    from app.settings import Settings

__all__ = ["Salesforce", "SalesforceOptions", "full_id", "instance_url", "login_url"]

_JWT_BEARER: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"  # RFC 7523 §2.1
# Salesforce speaks of three minutes; half a minute less leaves room for clocks that disagree.
_ASSERTION_LIFE: Final = 150
_REFRESH_SCOPES: Final = frozenset({"refresh_token", "offline_access"})
_SHARED_HOSTS: Final = frozenset({"login.salesforce.com", "test.salesforce.com"})
_DOMAINS: Final = (".salesforce.com", ".salesforce.mil")
_LIGHTNING: Final = ".lightning.force.com"
_MIN_RSA_BITS: Final = 2048

_IDENTITY_PATH: Final = re.compile(r"/id/([0-9A-Za-z]{15,18})/([0-9A-Za-z]{15,18})/?")
_CHECK_CHARACTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ012345"

_TOO_LATE: Final = Refused("expired_code")
# `invalid_grant` means many things here; the lower-cased description tells them apart, by how it begins. What
# is not listed is a refusal of the grant.
_INVALID_GRANT: Final[Mapping[str, Outcome]] = MappingProxyType(
    {
        "token request is already being processed": Unavailable("busy", whole_app=False),
        "expired access/refresh token": Refused("expired_token"),
        "authentication failure": Refused("authentication_failure"),
        "audience validation failed": Misconfigured("wrong_audience", whole_app=False),
        "user hasn't approved this consumer": Misconfigured("user_not_approved", whole_app=False),
        "ip restricted": Misconfigured("ip_restricted", whole_app=False),
        "inactive user": Misconfigured("inactive_user", whole_app=False),
        "inactive org": Misconfigured("inactive_org", whole_app=False),
    }
)
# What a refusal in words we do not know is called, by what was asked with.
_IN_OTHER_WORDS: Final[Mapping[TokenRequest, Refused]] = MappingProxyType(
    {
        "authorization_code": Refused("invalid_grant"),
        "refresh_token": Refused("unrecognised_refusal"),
        "jwt_bearer": Refused("assertion_refused"),
        "client_credentials": Refused("run_as_refused"),
    }
)
_BY_ERROR: Final[Mapping[str, Outcome]] = MappingProxyType(
    {
        "invalid_client_id": Misconfigured("client_id_unknown"),
        "inactive_user": Misconfigured("inactive_user", whole_app=False),
        "inactive_org": Misconfigured("inactive_org", whole_app=False),
        "oauth_app_blocked": Misconfigured("app_blocked", whole_app=False),
        "rate_limit_exceeded": Unavailable("rate_limited", rate_limited=True),
        # The revoke endpoint's word for a token that is already dead.
        "invalid_token": Refused("invalid_token"),
    }
)


# "Expired access/refresh token" is said of all of these (help.salesforce.com, OAuth Authorization Errors).
_EXPIRED: Final = (
    Cause.GRANT_REVOKED,
    Cause.APPROVALS_EXCEEDED,
    Cause.IDLE_EXPIRED,
    Cause.TOKEN_POLICY,
    Cause.USED_ELSEWHERE,
    Cause.LOST_ANSWER,
    Cause.APP_TOKENS_REVOKED,
    Cause.CREDENTIALS_CHANGED,
)


def login_url(value: str) -> None:
    """Refuse what cannot be a login URL: a host that is not Salesforce's (or local), Lightning, a path."""
    server_url(value)
    parts = urlsplit(value)
    host = parts.hostname or ""
    if host.endswith(_LIGHTNING):
        raise ValidationError("Is a Lightning address; use the My Domain address (….my.salesforce.com).")
    if host not in LOOPBACK and not host.endswith(_DOMAINS):
        raise ValidationError("Must be My Domain (….my.salesforce.com), or the login or test host.")
    if parts.path.strip("/") or parts.query:
        raise ValidationError("Must be scheme and host alone.")


class SalesforceOptions(ProviderOptions):
    """What an operator may set on a Salesforce app."""

    login_url = fields.String(
        validate=login_url,
        metadata={
            "help": (
                "My Domain (advised), https://login.salesforce.com (default) or https://test.salesforce.com."
            )
        },
    )
    jwt_audience = fields.String(
        validate=server_url,
        metadata={
            "help": "aud of JWT bearer assertions. Default: the login or test host behind the login URL."
        },
    )


class Salesforce(Provider):
    """Salesforce as an authorization server (help.salesforce.com, OAuth Authorization Flows)."""

    name = "salesforce"
    title = "Salesforce"
    grant_types = ("authorization_code", "jwt_bearer", "client_credentials")
    client_auth = "body"
    # Rotation is a switch of the app that nothing in the answers shows until the first refresh.
    rotation_at_start = "unknown"
    # Session timeouts of 15 min exist; the default is two hours of inactivity.
    assumed_life = 900.0
    allowed_instance_hosts = _DOMAINS
    options_schema = SalesforceOptions
    option_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"login_url": "https://login.salesforce.com"}
    )
    explanations = MappingProxyType(
        {
            "app_blocked": (
                "The org's admin has blocked the app, or never installed it: Setup, Connected Apps OAuth "
                "Usage."
            ),
            "assertion_refused": (
                "Salesforce refuses the signed assertion; look at the certificate at the app and at the user."
            ),
            "assertion_failed": (
                "No assertion could be signed: the connection lacks its user or a usable RSA private key."
            ),
            "authentication_failure": "The user's password changed or expired, or the user is switched off.",
            "expired_code": "The code that came back had expired; begin again.",
            "expired_token": (
                "Salesforce says that the refresh token is expired: revoked, replaced, unused for too long, or "
                "pushed out by later approvals."
            ),
            "expired_authorization_code": (
                "Salesforce speaks of an expired code on a refresh, as it did in 2024 for two at once."
            ),
            "inactive_org": "The org is inactive or locked; an admin there must act.",
            "inactive_user": "The user who connected is inactive; reactivate him or connect with another.",
            "invalid_token": "Salesforce does not know the token any more.",
            "ip_restricted": (
                "Our address is not allowed in that org: IP ranges of profile, app or refresh tokens."
            ),
            "my_domain_required": (
                "client_credentials works at My Domain only; set the app's option login_url to it."
            ),
            "run_as_refused": (
                "Salesforce gives the app's run-as user no token; look at the app's client credentials policy."
            ),
            "unrecognised_refusal": "Salesforce refuses the grant in words we do not know.",
            "user_not_approved": (
                "The user is not pre-authorised for the app: permission set or profile in the app's policies."
            ),
            "wrong_audience": (
                "Salesforce refuses the assertion's audience; set the app's option jwt_audience."
            ),
        }
    )

    account_admin = "the customer's Salesforce admin"
    # The sliding window of the partner policy (help.salesforce.com, Limit Idle Refresh Token TTL).
    idle_days = 30.0
    # Per user and app; the sixth approval revokes the oldest.
    approvals_limit = 5
    causes = MappingProxyType(
        {
            "expired_token": _EXPIRED,
            "expired_code": _EXPIRED,
            "invalid_token": _EXPIRED,
            "unrecognised_refusal": (*_EXPIRED, Cause.USER_INACTIVE),
            "expired_authorization_code": (Cause.BUSY, Cause.USED_ELSEWHERE),
            "authentication_failure": (Cause.CREDENTIALS_CHANGED, Cause.USER_INACTIVE),
            "inactive_user": (Cause.USER_INACTIVE,),
            "inactive_org": (Cause.ACCOUNT_INACTIVE,),
            "ip_restricted": (Cause.ADDRESS_NOT_ALLOWED, Cause.EGRESS_CHANGED),
            "app_blocked": (Cause.APP_BLOCKED,),
            "user_not_approved": (Cause.USER_NOT_APPROVED,),
            "run_as_refused": (Cause.RUN_AS_USER, Cause.GRANT_TYPE_OFF),
            "assertion_refused": (
                Cause.CERTIFICATE_REFUSED,
                Cause.USER_INACTIVE,
                Cause.USER_NOT_APPROVED,
                Cause.CLOCK_WRONG,
            ),
            "wrong_audience": (Cause.WRONG_AUDIENCE,),
            "my_domain_required": (Cause.MY_DOMAIN_REQUIRED,),
        }
    )
    remedies = MappingProxyType(
        {
            Cause.APPROVALS_EXCEEDED: Remedy(
                "A sixth approval of the same user for the same app pushed this one out: Salesforce keeps five.",
                "{admin}",
                "Give each installation (development, staging, production) an integration user or an app of its "
                "own, then connect the account again.",
            ),
            Cause.IDLE_EXPIRED: Remedy(
                "The refresh token was not used for 30 days, which ends it under Salesforce's partner policy.",
                "{admin}",
                "Connect the account again, and keep a worker running: it uses idle connections in time.",
            ),
            Cause.TOKEN_POLICY: Remedy(
                "The app's refresh token policy in that org ended the token: at once, after a fixed time or idle.",
                "{admin}",
                "Set the app's refresh token policy to 'valid until revoked', or to a long idle time, then "
                "connect the account again.",
            ),
            Cause.ACCOUNT_CHANGED: Remedy(
                "Another org answers with this grant, as after a sandbox was refreshed; its token was not stored.",
                "{admin}",
                "Connect the org as a new connection and disconnect this one: all its record ids changed as well.",
            ),
            Cause.ADDRESS_NOT_ALLOWED: Remedy(
                "The org does not allow this installation's address: IP ranges of profile, app or refresh tokens.",
                "{admin}",
                "Allow this installation's outgoing address there; the connection then goes on by itself.",
            ),
            Cause.APP_BLOCKED: Remedy(
                "The org's admin has blocked the app, or never installed it.",
                "{admin}",
                "Setup, Connected Apps OAuth Usage: install or unblock the app; the connection then goes on.",
            ),
            Cause.APP_TOKENS_REVOKED: Remedy(
                "All tokens of the app were revoked at once, as when its consumer key and secret are rotated.",
                "you, on the app's page at Salesforce",
                "Put the new consumer secret in: `drawbridge app rotate`; then connect every account again.",
            ),
            Cause.CLIENT_UNKNOWN: Remedy(
                "Salesforce does not know the consumer key: mistyped, deleted, or the app is minutes old.",
                "you, in Drawbridge's app settings and on the app's page at Salesforce",
                "A new app takes up to ten minutes to be known; else compare the key with the app's page.",
            ),
            Cause.USER_NOT_APPROVED: Remedy(
                "The user this connection acts for is not pre-authorised for the app.",
                "{admin}",
                "Name the user's profile or a permission set in the app's policies; the connection then goes on.",
            ),
            Cause.RUN_AS_USER: Remedy(
                "The app has no usable run-as user for client credentials in that org.",
                "{admin}",
                "Set an active user to run as in the app's client credentials policy.",
            ),
            Cause.MY_DOMAIN_REQUIRED: Remedy(
                "Client credentials work at the org's My Domain only, not at a shared login host.",
                "you, in Drawbridge's app settings",
                "Set the app's option login_url to https://<name>.my.salesforce.com.",
            ),
        }
    )

    def from_settings(self, settings: Settings) -> App | None:
        """The app called `default` from the SALESFORCE_… settings, None without a client id."""
        if not settings.salesforce_client_id:
            return None
        return App(
            id=f"{self.name}.default",
            provider=self.name,
            name="default",
            client_id=settings.salesforce_client_id,
            secrets=settings.salesforce_client_secret,
            scopes=settings.salesforce_scopes,
            options=self.options_from_settings({"login_url": settings.salesforce_login_url}),
            redirect_uri=redirect_uri(settings.public_url, self.name),
        )

    def endpoint(self, app: App, which: str) -> str:
        """The address of an endpoint: all lie under the login URL."""
        return super().endpoint(app, which) or f"{self._login(app)}/services/oauth2/{which}"

    def scope_query(self, scopes: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, str]:
        """All scopes in one list; without `refresh_token` or its twin Salesforce gives no refresh token, so
        it is added.
        """
        wanted = dict.fromkeys((*scopes, *optional))
        if not _REFRESH_SCOPES & set(wanted):
            wanted["refresh_token"] = None
        return {"scope": " ".join(wanted)}

    def check_grant(self, app: App, grant: Grant) -> None:
        """Refuse client credentials away from My Domain, and assertions without a user or a usable key."""
        super().check_grant(app, grant)
        if grant.grant_type == "client_credentials" and self._shared_host(app):
            raise InvalidRequest(
                "Salesforce gives client_credentials tokens at My Domain only, not at a login host: "
                "set the app's option login_url to https://<name>.my.salesforce.com."
            )
        if grant.grant_type == "jwt_bearer":
            if not grant.subject or grant.private_key is None:
                raise InvalidRequest("jwt_bearer needs a subject (a Salesforce username) and a private key.")
            _rsa_key(grant.private_key)

    def refresh(self, app: App, grant: Grant, *, wire: Wire) -> Outcome:
        """Refresh, or mint anew by assertion or client credentials."""
        if grant.grant_type == "jwt_bearer":
            return self._mint_by_assertion(app, grant, wire=wire)
        if grant.grant_type == "client_credentials":
            if self._shared_host(app):
                return Misconfigured("my_domain_required")
            # Salesforce removes and ignores scopes here: the app's own settings decide.
            form: Form = {"grant_type": "client_credentials"}
            return self.request_token(app, form, request="client_credentials", wire=wire)
        return super().refresh(app, grant, wire=wire)

    def classify_error(
        self, data: Mapping[str, object] | None, *, request: TokenRequest = "refresh_token"
    ) -> Outcome:
        """Decide on `error`, then for `invalid_grant` on the lower-cased description."""
        error = outcomes.error_of(data)
        if error != "invalid_grant":
            return _BY_ERROR.get(error) or super().classify_error(data, request=request)
        description = text_of(data, "error_description").strip().lower().replace("’", "'")
        if description.startswith("expired authorization code"):
            if request == "authorization_code":
                return _TOO_LATE
            # In mid-2024 this was how Salesforce said "busy": it excuses itself once.
            return Unavailable("expired_authorization_code", then=_TOO_LATE, whole_app=False)
        found = (outcome for start, outcome in _INVALID_GRANT.items() if description.startswith(start))
        return next(found, _IN_OTHER_WORDS[request])

    def account_told(self, app: App, granted: Granted) -> Account | None:
        """Org, user and API host from the token answer, which names them each time.

        Raises ProviderMisconfigured when the answer names an API host that may not get a token.
        """
        ids = _IDENTITY_PATH.fullmatch(_path(text_of(granted.extras, "id")))
        if ids is None:
            return None
        org, user = full_id(ids[1]), full_id(ids[2])
        if org is None or user is None:
            return None
        return Account(
            account_id=org,
            user_id=user,
            identity=f"{org}:{user}",
            scopes=app.scopes if granted.scopes is None else granted.scopes,
            instance_url=instance_url(
                text_of(granted.extras, "instance_url"), loopback=self._login_host(app) in LOOPBACK
            ),
        )

    def identify(self, app: App, granted: Granted, *, wire: Wire) -> Account:
        """Read org and user from the answer's identity URL; without one the token cannot be placed."""
        account = self.account_told(app, granted)
        if account is None:
            raise ProviderUnavailable("Salesforce did not name the org and user of the token.")
        return account

    def identity_of(self, app: App, account_id: str, user_id: str) -> str:
        """Org and user by their 18-character ids."""
        org, user = full_id(account_id), full_id(user_id)
        if org is None or user is None:
            raise InvalidRequest(
                "A Salesforce connection needs account_id (00D…) and user_id (005…), 15 or 18 characters."
            )
        return f"{org}:{user}"

    def _mint_by_assertion(self, app: App, grant: Grant, *, wire: Wire) -> Outcome:
        try:
            assertion = self._assertion(app, grant, now=wire.clock.timestamp())
        except InvalidRequest:
            return Misconfigured("assertion_failed", whole_app=False)
        form: Form = {"grant_type": _JWT_BEARER, "assertion": assertion}
        return self.request_token(app, form, request="jwt_bearer", wire=wire)

    def _assertion(self, app: App, grant: Grant, *, now: float) -> Secret:
        if not grant.subject or grant.private_key is None:
            raise InvalidRequest("jwt_bearer needs a subject and a private key.")
        claims = {
            "iss": app.client_id,
            "sub": grant.subject,
            "aud": self._audience(app),
            "exp": int(now) + _ASSERTION_LIFE,
        }
        return Secret(jwt.encode({"alg": "RS256", "typ": "JWT"}, claims, _rsa_key(grant.private_key)))

    def _audience(self, app: App) -> str:
        """The login host that stands behind a login URL; `jwt_audience` settles the cases that cannot be
        derived.
        """
        configured = self.option(app, "jwt_audience")
        if configured:
            return str(configured)
        host = self._login_host(app)
        if host == "test.salesforce.com" or host.endswith(".sandbox.my.salesforce.com"):
            return "https://test.salesforce.com"
        return "https://login.salesforce.com" if host.endswith(_DOMAINS) else self._login(app)

    def _login(self, app: App) -> str:
        return str(self.option(app, "login_url")).rstrip("/")

    def _login_host(self, app: App) -> str:
        return urlsplit(self._login(app)).hostname or ""

    def _shared_host(self, app: App) -> bool:
        return self._login_host(app) in _SHARED_HOSTS


def instance_url(raw: str, *, loopback: bool = False) -> str:
    """The API address of an org as scheme and host, without a trailing slash.

    Raises ProviderMisconfigured unless it is https under a domain of Salesforce's: whoever can choose this
    address gets every access token of the org. `loopback` also allows this machine, where the login URL is on
    it too.
    """
    try:
        parts = urlsplit(raw)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise ProviderMisconfigured("Salesforce named an API host that is no address.") from error
    if host.endswith(_LIGHTNING):
        raise ProviderMisconfigured("Salesforce named a Lightning host, which has no API.")
    local = loopback and host in LOOPBACK
    if parts.username is not None or parts.query or parts.fragment or parts.path.strip("/"):
        raise ProviderMisconfigured("Salesforce named an API host with more than scheme and host.")
    if not local and (parts.scheme != "https" or not host.endswith(_DOMAINS) or port not in (None, 443)):
        raise ProviderMisconfigured("Salesforce named an API host outside its domains; no token goes there.")
    if local and parts.scheme not in ("http", "https"):
        raise ProviderMisconfigured("Salesforce named an API host that is no web address.")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + (f":{port}" if local and port is not None else "")


def full_id(identifier: str) -> str | None:
    """The 18-character form of a record id; None for another length or check characters that do not fit.

    The three last characters say which letters among the first 15 are capital, five to a character, so that
    ids survive programs that ignore case.
    """
    if not re.fullmatch(r"[0-9A-Za-z]{15}([0-9A-Za-z]{3})?", identifier):
        return None
    stem = identifier[:15]
    full = stem + "".join(_check_character(stem[start : start + 5]) for start in (0, 5, 10))
    return full if identifier in (stem, full) else None


def _check_character(block: str) -> str:
    return _CHECK_CHARACTERS[sum(1 << place for place, letter in enumerate(block) if "A" <= letter <= "Z")]


def _path(address: str) -> str:
    try:
        return urlsplit(address).path
    except ValueError:
        return ""


def _rsa_key(private_key: Secret) -> RSAKey:
    try:
        key = load_pem_private_key(private_key.reveal().encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidRequest("The private key is not an unencrypted RSA private key in PEM.") from None
    if not isinstance(key, RSAPrivateKey):
        raise InvalidRequest("The private key is not an RSA key; Salesforce takes RS256 alone.")
    if key.key_size < _MIN_RSA_BITS:
        raise InvalidRequest(f"The RSA key is shorter than {_MIN_RSA_BITS} bits.")
    return RSAKey.import_key(key)
