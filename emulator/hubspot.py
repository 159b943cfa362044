"""HubSpot's rules: scopes at install, the token endpoint's verdicts, introspection, revocation, uninstall.

One choice: an install is remembered apart from its grants, because re-authorising keeps earlier scopes that
the app's settings still declare; the price is a second place that uninstalling has to clear.
"""

from __future__ import annotations

import base64
import ipaddress
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from flask import Response, request

from emulator.clock import ShiftedClock
from emulator.hubspot_answers import API_PROBLEMS, VERDICTS, ErrorStyle, api_problem, token_problem
from emulator.ledger import TokenRequest
from emulator.minting import Minter, sha256
from emulator.model import Access, Account, App, Code, FromMapping, Grant, SetUpError, User
from emulator.vendor import RefusedError, Subject, Vendor, secret_index, verifier_fits

JOURNAL_SCOPES = "developer.webhooks_journal."


@dataclass(slots=True)
class HubSpotSettings(FromMapping):
    """Vendor-wide switches. Times in seconds; `code_lifetime` is not published, so it is a guess to be
    varied.

    `token_requests_per_second` throttles the token endpoint; None leaves it open, as no number is published.
    `uninstall_grace` is how long access tokens outlive an uninstall.
    """

    error_style: ErrorStyle = "new"
    token_lifetime: int = 1800
    code_lifetime: int = 60
    deny_redirects: bool = False
    uninstall_grace: float = 0.0
    token_requests_per_second: int | None = None


class HubSpot(Vendor):
    """HubSpot as an authorization server."""

    name = "hubspot"

    def __init__(self, clock: ShiftedClock, minter: Minter, *, fault_ids: itertools.count[int]) -> None:
        super().__init__(clock, minter, fault_ids=fault_ids)
        self.settings = HubSpotSettings()
        self._installs: dict[tuple[str, str, str | None], set[str]] = {}
        self._uninstalled: dict[tuple[str, str, str | None], float] = {}
        self._recent: list[float] = []

    # -- set-up --

    def settings_data(self) -> dict[str, Any]:
        return asdict(self.settings)

    def change_settings(self, changes: Mapping[str, Any]) -> None:
        self.settings = HubSpotSettings.parse({**asdict(self.settings), **changes})

    def restore(self) -> None:
        super().restore()
        self.settings = HubSpotSettings()
        self._installs.clear()
        self._uninstalled.clear()

    def check_app(self, app: App) -> None:
        super().check_app(app)
        for uri in app.redirect_uris if not app.lenient_redirects else ():
            _check_redirect(uri)

    def new_account(self, data: Mapping[str, Any]) -> Account:
        account_id = str(data.get("id") or self.minter.number(10_000_000, 99_999_999))
        if not account_id.isdigit():
            raise SetUpError(f"{account_id}: a hub id is a number")
        domain = str(data.get("domain") or f"portal-{account_id}.example")
        users = [self.new_user(person) for person in data.get("users") or [{"name": f"admin@{domain}"}]]
        return Account.parse({**data, "id": account_id, "domain": domain, "users": users})

    def new_user(self, data: Mapping[str, Any]) -> User:
        user_id = str(data.get("id") or self.minter.number(1_000_000, 9_999_999))
        if not user_id.isdigit():
            raise SetUpError(f"{user_id}: a HubSpot user id is a number")
        return User.parse({**data, "id": user_id})

    def new_refresh_token(self, account: Account) -> str:
        return f"{account.hublet}-{self.minter.uuid()}-{self.minter.text(8)}.{self.minter.text(96)}"

    # -- authorising --

    def check_request(self, app: App, *, scopes: list[str], optional: list[str]) -> None:
        """Apply the scope rules of the authorize URL; RefusedError is for HubSpot's own page."""
        missing = sorted(set(app.scopes) - set(scopes))
        if missing:
            raise RefusedError("BAD_SCOPES", f"the install URL lacks required scopes: {' '.join(missing)}")
        undeclared = sorted(set(scopes) - {*app.scopes, *app.conditional_scopes})
        undeclared += sorted(set(optional) - set(app.optional_scopes))
        if undeclared:
            raise RefusedError("BAD_SCOPES", f"scopes not declared by the app: {' '.join(undeclared)}")

    def granted_scopes(
        self, app: App, account: Account, *, scopes: list[str], optional: list[str]
    ) -> list[str]:
        """Tell what the account can give: required scopes or RefusedError, optional ones if it has them."""
        available = app.declared if account.scopes is None else set(account.scopes)
        lacking = sorted(set(scopes) - available)
        if lacking:
            raise RefusedError("BAD_SCOPES", f"insufficient scopes, the account lacks {' '.join(lacking)}")
        return sorted({*scopes, *(set(optional) & available)})

    def issue_code(
        self,
        app: App,
        account: Account,
        *,
        user: User,
        scopes: list[str],
        redirect_uri: str,
        challenge: str | None,
    ) -> Code:
        """Mint a single-use authorization code."""
        value = f"{account.hublet}-{self.minter.uuid()}"
        expires = self.clock.now() + self.settings.code_lifetime
        code = Code(value, app.client_id, account.id, user.id, scopes, redirect_uri, challenge, expires)
        return self.store.add_code(code)

    def approve(self, app: App, account: Account, *, user: User, scopes: list[str], kind: str) -> Grant:
        """Install the app and open a grant; scopes of an earlier install stay if still declared."""
        key = _install_key(app, account.id, user.id)
        now = self.clock.now()
        with self.store.lock:
            kept = self._installs.get(key, set()) & app.declared
            self._installs[key] = {*kept, *scopes}
            self._uninstalled.pop(key, None)
            return self.store.open_grant(
                Grant(
                    id=f"hs-{self.minter.uuid()}",
                    client_id=app.client_id,
                    account_id=account.id,
                    user_id=user.id,
                    scopes=sorted(self._installs[key]),
                    kind=kind,
                    created_at=now,
                    last_used_at=now,
                    refresh=self.new_refresh_token(account),
                )
            )

    def mint_access(self, grant: Grant) -> Access:
        app = self.store.apps[grant.client_id]
        lifetime = app.token_lifetime if app.token_lifetime is not None else self.settings.token_lifetime
        # Real tokens are signed blobs of up to 512 characters that begin with C.
        token = "C" + base64.urlsafe_b64encode(self.minter.text(210).encode()).rstrip(b"=").decode()
        return self.store.add_access(grant, token, lifetime=lifetime)

    # -- token endpoint --

    def authenticate(self, fields: Mapping[str, str]) -> tuple[App, int]:
        """Check client id and secret, from form fields alone; return the app and which secret it was."""
        app = self.store.apps.get(fields.get("client_id", ""))
        if app is None:
            raise RefusedError("BAD_CLIENT_ID")
        index = secret_index(app, fields.get("client_secret"))
        if index is None:
            raise RefusedError("BAD_CLIENT_SECRET")
        return app, index

    def throttle(self) -> None:
        """Refuse the request when the token endpoint has had its fill within the last second."""
        limit = self.settings.token_requests_per_second
        if limit is None:
            return
        now = self.clock.now()
        with self.store.lock:
            self._recent = [moment for moment in self._recent if moment > now - 1.0]
            if len(self._recent) >= limit:
                raise RefusedError("RATE_LIMIT")
            self._recent.append(now)

    def exchange_code(self, app: App, fields: Mapping[str, str]) -> tuple[Grant, Access]:
        """Redeem an authorization code; any answer but success leaves a fresh code usable."""
        with self.store.lock:
            code = self.store.code(fields.get("code", ""))
            if code is None or code.used or code.client_id != app.client_id:
                raise RefusedError("BAD_AUTH_CODE")
            if code.expires_at <= self.clock.now():
                raise RefusedError("EXPIRED_AUTH_CODE")
            if fields.get("redirect_uri") != code.redirect_uri:
                raise RefusedError("BAD_REDIRECT_URI")
            if code.challenge is not None and not verifier_fits(code.challenge, fields.get("code_verifier")):
                raise RefusedError("BAD_CODE_VERIFIER")
            account = self._open_hub(code.account_id)
            user = account.user(code.user_id)
            if user is None:
                raise RefusedError("BAD_AUTH_CODE")
            code.used = True
            grant = self.approve(app, account, user=user, scopes=code.scopes, kind="code")
            return grant, self.mint_access(grant)

    def refresh(self, app: App, token: str, *, entry: TokenRequest) -> tuple[Grant, Access]:
        """Refresh a grant. The same refresh token comes back unless the app rotates."""
        with self.store.lock:
            digest = sha256(token)
            grant = self.store.grant_of_refresh(digest)
            if grant is None:
                raise RefusedError("BAD_REFRESH_TOKEN")
            if grant.client_id != app.client_id:
                raise RefusedError("MISMATCH_REFRESH_TOKEN_CLIENT")
            if digest in grant.voided:
                entry.reuse = True
                if app.reuse_revokes:
                    self.store.revoke(grant, "reuse", with_access=True)
                raise RefusedError("BAD_REFRESH_TOKEN")
            account = self._open_hub(grant.account_id)
            if not grant.live:
                raise RefusedError("BAD_REFRESH_TOKEN")
            if app.rotation:
                self.store.rotate(grant, self.new_refresh_token(account))
            grant.last_used_at = self.clock.now()
            return grant, self.mint_access(grant)

    def _open_hub(self, account_id: str) -> Account:
        account = self.store.accounts.get(account_id)
        if account is None or not account.active:
            raise RefusedError("BAD_HUB")
        return account

    def app_token(self, app: App, scopes: list[str]) -> tuple[Grant, Access]:
        """Issue an app-level token: no account, no refresh token, webhooks-journal scopes only."""
        if not scopes or not all(scope.startswith(JOURNAL_SCOPES) for scope in scopes):
            raise RefusedError("BAD_SCOPES")
        now = self.clock.now()
        with self.store.lock:
            grant = self.store.open_grant(
                Grant(
                    f"hs-{self.minter.uuid()}", app.client_id, "", "", scopes, "client_credentials", now, now
                )
            )
            return grant, self.mint_access(grant)

    def token_answer(self, grant: Grant, access: Access) -> dict[str, Any]:
        """Write the answer of the token endpoint."""
        answer: dict[str, Any] = {
            "token_type": "bearer",
            "token_use": "access_token",
            "access_token": access.token,
            "expires_in": int(access.lifetime),
            "scopes": grant.scopes,
        }
        if grant.kind == "client_credentials":
            return {**answer, "token_use": "client_credentials"}
        return {
            **answer,
            "refresh_token": grant.refresh,
            "hub_id": int(grant.account_id),
            "user_id": int(grant.user_id),
        }

    # -- after the token --

    def access_state(self, access: Access | None) -> str:
        """Tell live, expired, revoked (killed or uninstalled) or unknown."""
        if access is None:
            return "unknown"
        if access.expires_at <= self.clock.now():
            return "expired"
        if access.revoked is not None or self._gone(self.store.grants[access.grant_id]):
            return "revoked"
        return "live"

    def _gone(self, grant: Grant) -> bool:
        app = self.store.apps.get(grant.client_id)
        if app is None:
            return True
        gone_at = self._uninstalled.get(_install_key(app, grant.account_id, grant.user_id))
        return gone_at is not None and gone_at + self.settings.uninstall_grace <= self.clock.now()

    def introspect(self, app: App, token: str) -> dict[str, Any]:
        """Describe a token of this app; anything else is merely not active."""
        access = self.store.access(token)
        if access is not None and self.access_state(access) == "live":
            grant = self.store.grants[access.grant_id]
            if grant.client_id == app.client_id:
                return self.access_description(access, grant=grant)
        found = self.store.grant_of_refresh(sha256(token))
        if found is not None and found.live and found.refresh == token and found.client_id == app.client_id:
            return {"active": True, "token_use": "refresh_token", **self._identity(found), "token": token}
        return {"active": False}

    def access_description(self, access: Access, *, grant: Grant) -> dict[str, Any]:
        """Describe a live access token as introspection does."""
        return {
            "active": True,
            "token_use": "access_token",
            **self._identity(grant),
            "token": access.token,
            "expires_in": max(0, int(access.expires_at - self.clock.now())),
            "is_private_distribution": False,
            "signed_access_token": self._signed(access, grant=grant),
        }

    def _identity(self, grant: Grant) -> dict[str, Any]:
        app = self.store.apps[grant.client_id]
        account = self.store.accounts.get(grant.account_id)
        user = account.user(grant.user_id) if account is not None else None
        return {
            "token_type": "Bearer",
            "hub_id": int(grant.account_id or 0),
            "user_id": int(grant.user_id or 0),
            "app_id": app.app_id,
            "client_id": app.client_id,
            "user": user.name if user is not None else "",
            "hub_domain": account.domain if account is not None else "",
            "scopes": grant.scopes,
        }

    def _signed(self, access: Access, *, grant: Grant) -> dict[str, Any]:
        app = self.store.apps[grant.client_id]
        account = self.store.accounts.get(grant.account_id)
        opaque = base64.b64encode(json.dumps(grant.scopes).encode()).decode()
        return {
            "appId": app.app_id, "appInstallId": app.app_id + 1, "audience": None,
            "expiresAt": int(access.expires_at * 1000), "hubId": int(grant.account_id or 0),
            "hublet": account.hublet if account is not None else "na1",
            "installingUserId": int(grant.user_id or 0), "isPrivateDistribution": False,
            "isServiceAccount": False, "isUserLevel": app.user_level, "newSignature": access.sha256,
            "signature": access.sha256[:32], "scopeToScopeGroupPks": opaque, "scopes": opaque,
            "trialScopes": "", "trialScopeToScopeGroupPks": "", "userId": int(grant.user_id or 0),
        }  # fmt: skip

    def revoke(self, token: str, *, client_id: str | None = None) -> None:
        """Delete a refresh token; access tokens live on, unknown ones are no error (RFC 7009 2.2)."""
        grant = self.store.grant_of_refresh(sha256(token))
        if grant is not None and client_id in (None, grant.client_id):
            self.store.revoke(grant, "revoked", with_access=False)

    def uninstall(self, grant: Grant) -> None:
        """End an install for everybody in the account, or for the one user of a user-level app."""
        app = self.store.apps[grant.client_id]
        key = _install_key(app, grant.account_id, grant.user_id)

        def same(other: Grant) -> bool:
            return other.client_id == app.client_id and key == _install_key(
                app, other.account_id, other.user_id
            )

        with self.store.lock:
            self._uninstalled[key] = self.clock.now()
            self._installs.pop(key, None)
            for each in self.store.matching(same):
                self.store.revoke(each, "uninstalled", with_access=False)

    # -- answers and subjects --

    def knows_problem(self, name: str) -> bool:
        return name in VERDICTS or name in API_PROBLEMS

    def problem(self, name: str, detail: str | None) -> Response:
        if name in VERDICTS:
            return token_problem(name, detail, style=self.settings.error_style)
        return api_problem(name, detail, now=self.clock.now())

    def subject(self, endpoint: str) -> Subject:
        fields = request.values if request.path.startswith("/oauth/v1/") else request.form
        refresh = fields.get("refresh_token")
        grant = self.store.grant_of_refresh(sha256(refresh)) if refresh else None
        if grant is None:
            grant = self._grant_of_other(fields.get("token") or bearer())
        code = self.store.code(fields.get("code", "")) if fields.get("code") else None
        subject: Subject = {
            "grant_type": fields.get("grant_type"),
            "app": fields.get("client_id")
            or request.args.get("client_id")
            or (grant.client_id if grant is not None else None),
            "refresh_sha256": sha256(refresh) if refresh else None,
            **self.subject_of_grant(grant),
        }
        if code is not None:
            subject = {**subject, "account": code.account_id, "user": code.user_id}
        return subject

    def _grant_of_other(self, token: str | None) -> Grant | None:
        if token is None:
            return None
        access = self.store.access(token)
        if access is not None:
            return self.store.grants.get(access.grant_id)
        return self.store.grant_of_refresh(sha256(token))


def bearer() -> str | None:
    """Return the bearer token of the current request (RFC 6750 section 2.1)."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _install_key(app: App, account_id: str, user_id: str) -> tuple[str, str, str | None]:
    return app.client_id, account_id, user_id if app.user_level else None


def _check_redirect(uri: str) -> None:
    parts = urlsplit(uri)
    host = parts.hostname or ""
    if parts.scheme != "https" and not (parts.scheme == "http" and host == "localhost"):
        raise SetUpError(f"{uri}: HubSpot takes https, or http for localhost (lenient_redirects lifts this)")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return
    raise SetUpError(f"{uri}: HubSpot takes a domain name, not an address (lenient_redirects lifts this)")
