"""HubSpot: one host for all accounts, credentials in the form body, and a refresh token that so far never
rotates.

Addresses carry a date, because HubSpot versions its APIs by date (developers.hubspot.com/changelog: "New
OAuth v3 API endpoints", "v1 OAuth API deprecation"). Each date can be moved by an option of the app without
touching this file.

A portal is one connection whoever installed the app, because HubSpot's tokens act for the account; only apps
that HubSpot calls user-level (option `user_level`) have one connection per user. What introspection tells of
people, the user's e-mail address and the customer's domain, is never kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

from marshmallow import fields, validate

from app.errors import InvalidRequest, ProviderMisconfigured, ProviderUnavailable
from app.http_client import Answer
from app.oauth2 import client, outcomes
from app.oauth2.causes import Cause, Remedy
from app.oauth2.client import Wire
from app.oauth2.outcomes import Granted, Misconfigured, Outcome, Refused, Unavailable, text_of
from app.oauth2.provider import (
    Account,
    App,
    Grant,
    Provider,
    ProviderOptions,
    RevokeResult,
    TokenRequest,
    claimed_id,
    redirect_uri,
    server_url,
)
from app.secret import Secret

if TYPE_CHECKING:
    from app.settings import Settings

__all__ = ["HubSpot", "HubSpotOptions"]

_DATED: Final = validate.Regexp(r"(v[0-9]+|20[0-9]{2}-[0-9]{2}(-beta)?)\Z", error="Must look like 2026-09.")

# HubSpot's `status` says more than `error`, and older bodies have nothing else. Neither list is published:
# what is missing here stays what `error` makes of it, and never more than Misconfigured without one.
_BY_STATUS: Final[Mapping[str, Outcome]] = MappingProxyType(
    {
        "BAD_REFRESH_TOKEN": Refused("bad_refresh_token"),
        "BAD_HUB": Refused("account_gone"),
        "BAD_AUTH_CODE": Refused("bad_code"),
        "EXPIRED_AUTH_CODE": Refused("expired_code"),
        "BAD_CLIENT_ID": Misconfigured("client_id_unknown"),
        "BAD_CLIENT_SECRET": Misconfigured("client_secret_refused"),
        "BAD_REDIRECT_URI": Misconfigured("redirect_uri_mismatch"),
        "BAD_CODE_VERIFIER": Misconfigured("code_verifier_refused", whole_app=False),
        "BAD_SCOPES": Misconfigured("invalid_scope", whole_app=False),
        "BAD_GRANT_TYPE": Misconfigured("unsupported_grant_type", whole_app=False),
        # Seen as a passing fault of the platform, and when a client id was swapped: the right id makes the
        # grant good again.
        "MISMATCH_REFRESH_TOKEN_CLIENT": Misconfigured("token_of_another_client", whole_app=False),
    }
)
_CODE_STATUSES: Final = frozenset({"BAD_AUTH_CODE", "EXPIRED_AUTH_CODE"})
# Errors that leave the last word to `status`.
_VAGUE_ERRORS: Final = frozenset({"", "invalid_grant", "access_denied"})
# HubSpot's own status for an account that is being moved to another data centre; Retry-After may say up to 24
# h.
_MIGRATING: Final = 477


class HubSpotOptions(ProviderOptions):
    """What an operator may set on a HubSpot app."""

    app_id = fields.String(
        validate=validate.Regexp(r"[0-9]{1,20}\Z"),
        metadata={"help": "Numeric app id; a token of another app is then refused at connect."},
    )
    api_url = fields.String(
        validate=server_url, metadata={"help": "API host. Default https://api.hubapi.com."}
    )
    authorize_url = fields.String(
        validate=server_url,
        metadata={"help": "Install page. Default https://app.hubspot.com/oauth/authorize."},
    )
    oauth_version = fields.String(
        validate=_DATED, metadata={"help": "Date of the OAuth API. Default 2026-03."}
    )
    api_version = fields.String(
        validate=_DATED, metadata={"help": "Date of the other APIs. Default 2026-09."}
    )
    pkce = fields.Boolean(metadata={"help": "Send a PKCE pair, beside the client secret. Default yes."})
    user_level = fields.Boolean(
        metadata={"help": "The app is user-level: one connection per portal and user. Default no."}
    )


class HubSpot(Provider):
    """HubSpot as an authorization server (developers.hubspot.com/docs, OAuth 2026-03)."""

    name = "hubspot"
    can_uninstall = True
    title = "HubSpot"
    grant_types = ("authorization_code",)
    client_auth = "body"
    # Every refresh seen so far gave the same refresh token back; HubSpot reserves the right to change that.
    rotation_at_start = "not_seen"
    options_schema = HubSpotOptions
    option_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "api_url": "https://api.hubapi.com",
            "authorize_url": "https://app.hubspot.com/oauth/authorize",
            "oauth_version": "2026-03",
            "api_version": "2026-09",
            "pkce": True,
            "user_level": False,
        }
    )
    explanations = MappingProxyType(
        {
            "account_gone": "HubSpot does not know the account any more: deleted, disconnected or moved.",
            "bad_code": "HubSpot does not know the code that came back; begin again.",
            "bad_refresh_token": (
                "HubSpot says that the refresh token is invalid, expired or revoked, as after an uninstall."
            ),
            "code_verifier_refused": "HubSpot refuses the PKCE verifier; switch the option pkce off.",
            "expired_code": "The code that came back had expired; begin again.",
            "migrating": (
                "HubSpot is moving the account to another data centre; it answers again when that is done."
            ),
            "token_of_another_client": (
                "The refresh token was issued to another client id; look whether the app's was changed."
            ),
            "wrong_hublet": "HubSpot answered from a region the account does not live in; it is asked again.",
        }
    )
    account_admin = "the HubSpot account's admin"
    causes = MappingProxyType(
        {
            # An uninstall, a revocation and a token that never was look the same from outside.
            "bad_refresh_token": (
                Cause.APP_UNINSTALLED,
                Cause.GRANT_REVOKED,
                Cause.USED_ELSEWHERE,
                Cause.LOST_ANSWER,
                Cause.APP_TOKENS_REVOKED,
            ),
            "account_gone": (Cause.ACCOUNT_GONE, Cause.ACCOUNT_MOVED),
            "token_of_another_client": (Cause.OTHER_CLIENT, Cause.CLIENT_SWAPPED),
            "migrating": (Cause.ACCOUNT_MOVING,),
            "wrong_hublet": (Cause.ACCOUNT_MOVING,),
        }
    )
    remedies = MappingProxyType(
        {
            Cause.APP_UNINSTALLED: Remedy(
                "The app was uninstalled from the HubSpot account; one user's uninstall ends it for all users.",
                "{admin} (a Super Admin, or somebody with Marketplace access)",
                "Look under Connected Apps in the account, then install it again: on the admin page, or with "
                "a link made with `drawbridge connection link`.",
            ),
            Cause.ACCOUNT_GONE: Remedy(
                "HubSpot does not know the account (hub) any more: it was deleted or disconnected.",
                "{admin}",
                "If the account still exists, connect it again; if not, `drawbridge connection disconnect`.",
            ),
            Cause.ACCOUNT_MOVED: Remedy(
                "The HubSpot account was moved to another region and its tokens did not move with it.",
                "{admin}",
                "Connect the account again: on the admin page, or with a link made with "
                "`drawbridge connection link`.",
            ),
            Cause.ACCOUNT_MOVING: Remedy(
                "HubSpot is moving the account to another data centre, or answered from the wrong region.",
                "HubSpot",
                "Nothing needs doing: it is asked again by itself; such a move may take up to a day.",
            ),
            Cause.CLIENT_SECRET_REFUSED: Remedy(
                "HubSpot refuses every client secret we have: it was rotated on the app's Auth tab.",
                "you, in Drawbridge's app settings and on the app's Auth tab",
                "Copy the present secret from the Auth tab: `drawbridge app rotate`, or the setting "
                "HUBSPOT_CLIENT_SECRET. No connection is lost.",
            ),
        }
    )

    def from_settings(self, settings: Settings) -> App | None:
        """The app called `default` from the HUBSPOT_… settings, None without a client id."""
        if not settings.hubspot_client_id:
            return None
        options = {
            "api_url": settings.hubspot_api_url,
            "authorize_url": settings.hubspot_authorize_url,
            "oauth_version": settings.hubspot_oauth_version,
            "api_version": settings.hubspot_api_version,
            "pkce": settings.hubspot_pkce,
            "app_id": settings.hubspot_app_id,
        }
        return App(
            id=f"{self.name}.default",
            provider=self.name,
            name="default",
            client_id=settings.hubspot_client_id,
            secrets=settings.hubspot_client_secret,
            scopes=settings.hubspot_scopes,
            optional_scopes=settings.hubspot_optional_scopes,
            options=self.options_from_settings(options),
            redirect_uri=redirect_uri(settings.public_url, self.name),
        )

    def endpoint(self, app: App, which: str) -> str:
        """The address of an endpoint: all but the install page are dated and lie at the API host."""
        given = super().endpoint(app, which)
        if given or which == "userinfo":
            return given
        if which == "authorize":
            return str(self.option(app, "authorize_url"))
        tail = {"token": "", "introspect": "/introspect", "revoke": "/revoke"}[which]
        return f"{self._api(app)}/oauth/{self.option(app, 'oauth_version')}/token{tail}"

    def hosts(self, app: App) -> tuple[str, ...]:
        """As every provider's, and the API host, where the app is uninstalled."""
        return tuple(dict.fromkeys((*super().hosts(app), self._api(app))))

    def scope_query(self, scopes: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, str]:
        """Required scopes in `scope`, those the account may lack in `optional_scope`; HubSpot blocks an
        install otherwise.
        """
        query = {"scope": " ".join(dict.fromkeys(scopes))}
        extra = [scope for scope in dict.fromkeys(optional) if scope not in scopes]
        return query | ({"optional_scope": " ".join(extra)} if extra else {})

    def uses_pkce(self, app: App) -> bool:
        """Unless the operator switched it off: HubSpot's pages promise PKCE for the token endpoint alone."""
        return bool(self.option(app, "pkce"))

    def classify(self, answer: Answer, *, request: TokenRequest = "refresh_token") -> Outcome:
        """As RFC 6749, and HubSpot's 477 for an account on the move; scopes come as the list `scopes`."""
        if answer.status == _MIGRATING:
            return Unavailable("migrating", outcomes.retry_after(answer), whole_app=False)
        outcome = super().classify(answer, request=request)
        return _with_scopes(outcome) if isinstance(outcome, Granted) else outcome

    def classify_error(
        self, data: Mapping[str, object] | None, *, request: TokenRequest = "refresh_token"
    ) -> Outcome:
        """Decide on `error` first; `status` refines it, but can never turn a refused client into a refused
        grant.
        """
        if "correctHublet" in (data or {}):
            return Unavailable("wrong_hublet", whole_app=False)
        status = text_of(data, "status").upper()
        # A complaint about a code cannot be about a refresh token: do not let it kill one.
        if status in _CODE_STATUSES and request != "authorization_code":
            return Misconfigured("unrecognised_error", whole_app=False)
        by_status = _BY_STATUS.get(status)
        if by_status and (outcomes.error_of(data) in _VAGUE_ERRORS or isinstance(by_status, Misconfigured)):
            return by_status
        return super().classify_error(data, request=request)

    def identify(self, app: App, granted: Granted, *, wire: Wire) -> Account:
        """Ask introspection who the token acts for, and check that it is a live token of this very app."""
        claims = self.introspect(app, granted.access_token, wire=wire)
        if claims.get("active") is not True:
            raise ProviderUnavailable("HubSpot does not know the token it has just given.")
        self._check_owner(app, claims)
        account = self._account(app, granted, claims)
        if account is None:
            raise ProviderUnavailable("HubSpot did not name the account of the token.")
        told = self.account_told(app, granted)
        if told is not None and told.identity != account.identity:
            raise ProviderMisconfigured("HubSpot named two accounts for one token; nothing was stored.")
        return account

    def identity_of(self, app: App, account_id: str, user_id: str) -> str:
        """The portal, and for a user-level app the user in it."""
        if not account_id.isdecimal():
            raise InvalidRequest("account_id of a HubSpot connection is the portal's number (hub id).")
        if not self.option(app, "user_level"):
            return account_id
        if not user_id.isdecimal():
            raise InvalidRequest("A user-level HubSpot app needs user_id, the user's number.")
        return f"{account_id}:{user_id}"

    def uninstall(self, app: App, access_token: Secret, *, wire: Wire) -> RevokeResult:
        """Remove the app from the whole portal (DELETE external-install); HubSpot mails its admins."""
        url = f"{self._api(app)}/appinstalls/{self.option(app, 'api_version')}/external-install"
        try:
            answer = client.fetch(wire, "DELETE", url=url, bearer=access_token)
        except ProviderUnavailable:
            return "retry"
        if 200 <= answer.status < 300:
            return "done"
        later = answer.status in (408, 429, _MIGRATING) or not 400 <= answer.status < 500
        return "retry" if later else "impossible"

    def revoke(self, app: App, grant: Grant, *, wire: Wire) -> RevokeResult:
        """Delete the refresh token; access tokens cannot be taken back and run out by themselves within half
        an hour.
        """
        if grant.refresh_token is None:
            return "impossible"
        return super().revoke(app, grant, wire=wire)

    def _api(self, app: App) -> str:
        return str(self.option(app, "api_url")).rstrip("/")

    def _check_owner(self, app: App, claims: Mapping[str, object]) -> None:
        expected, actual = self.option(app, "app_id"), claimed_id(claims, "app_id")
        if expected is not None and actual is not None and actual != str(expected):
            raise ProviderMisconfigured(
                f"The token belongs to HubSpot app {actual}, but app {expected} is configured; "
                "compare app id and client id."
            )
        client_id = claimed_id(claims, "client_id")
        if client_id is not None and client_id != app.client_id:
            raise ProviderMisconfigured(
                "The token belongs to another HubSpot client id than the configured one."
            )
        if _signed(claims).get("isUserLevel") is True and not self.option(app, "user_level"):
            raise ProviderMisconfigured("This HubSpot app is user-level: set the app's option user_level.")

    def _account(self, app: App, granted: Granted, claims: Mapping[str, object]) -> Account | None:
        portal, user = claimed_id(claims, "hub_id"), claimed_id(claims, "user_id")
        user_level = bool(self.option(app, "user_level"))
        if portal is None or (user_level and user is None):
            return None
        scopes = _scope_list(claims)
        return Account(
            account_id=portal,
            user_id=user if user_level and user else "",
            identity=f"{portal}:{user}" if user_level else portal,
            scopes=scopes if scopes is not None else app.scopes if granted.scopes is None else granted.scopes,
            details=_details(claims),
        )


def _with_scopes(granted: Granted) -> Granted:
    scopes = _scope_list(granted.extras)
    if scopes is None:
        return granted
    return Granted(
        granted.access_token,
        granted.refresh_token,
        expires_in=granted.expires_in,
        scopes=scopes,
        sent_at=granted.sent_at,
        extras=granted.extras,
    )


def _scope_list(claims: Mapping[str, object]) -> tuple[str, ...] | None:
    scopes = claims.get("scopes")
    if not isinstance(scopes, list):
        return None
    return tuple(scope for scope in scopes if isinstance(scope, str))


def _signed(claims: Mapping[str, object]) -> Mapping[str, object]:
    signed = claims.get("signed_access_token")
    return signed if isinstance(signed, dict) else {}


def _details(claims: Mapping[str, object]) -> dict[str, Any]:
    """Facts about the install; names and addresses of people and the customer's domain stay out."""
    signed = _signed(claims)
    found: dict[str, Any] = {
        "app_id": claimed_id(claims, "app_id"),
        "app_install_id": claimed_id(signed, "appInstallId"),
        "hublet": claimed_id(signed, "hublet"),
        "private_distribution": claims.get("is_private_distribution"),
    }
    return {name: value for name, value in found.items() if isinstance(value, str | bool)}
