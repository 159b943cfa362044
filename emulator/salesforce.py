"""Salesforce's rules: flows, rotation that punishes reuse, one refresh at a time, five approvals per user.

One choice: the busy lock is per refresh token and can be widened to the app by a setting, because reports
disagree about its scope.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flask import Response, request

from emulator import assertions
from emulator.clock import ShiftedClock
from emulator.ledger import TokenRequest
from emulator.minting import SESSION_ALPHABET, Minter, sha256, with_checksum
from emulator.model import Access, Account, App, Code, FromMapping, Grant, SetUpError, User
from emulator.salesforce_answers import API_PROBLEMS, PROBLEMS, api_problem, oauth_problem
from emulator.vendor import RefusedError, Subject, Vendor, secret_index, verifier_fits

JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
REFRESH_SCOPES = {"refresh_token", "offline_access"}
# Client credentials never carry these, whatever the app declares.
NOT_FOR_SERVICES = {"full", "web", *REFRESH_SCOPES}


@dataclass(slots=True)
class SalesforceSettings(FromMapping):
    """Vendor-wide switches, times in seconds.

    `processing_seconds` is how long a refresh is in hand, the window in which a second one is turned away.
    `my_domain` false makes this a login host, where client credentials are refused. `instance_url` overrides
    what token answers say. `deny_error` is the spelling of a refusal at the callback. `jwt_ceiling` bounds
    exp, None not.
    """

    token_lifetime: int = 7200
    code_lifetime: int = 900
    processing_seconds: float = 0.01
    busy_scope: Literal["token", "app", "off"] = "token"
    busy_error: Literal["busy", "busy_2024"] = "busy"
    approval_cap: int | None = 5
    my_domain: bool = True
    instance_url: str | None = None
    deny_error: Literal["access_denied", "access-denied"] = "access_denied"
    audiences: list[str] = field(
        default_factory=lambda: ["https://login.salesforce.com", "https://test.salesforce.com"]
    )
    jwt_ceiling: int | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """An app that has shown who it is; `secret` signs its answers, `index` tells which secret it used."""

    app: App
    secret: str
    index: int | None


class Salesforce(Vendor):
    """Salesforce as an authorization server."""

    name = "salesforce"
    scopes_of_grants = ("refresh_token",)

    def __init__(self, clock: ShiftedClock, minter: Minter, *, fault_ids: itertools.count[int]) -> None:
        super().__init__(clock, minter, fault_ids=fault_ids)
        self.settings = SalesforceSettings()
        self._in_hand: set[str] = set()
        self._in_hand_lock = threading.Lock()
        self._pause = threading.Event()

    # -- set-up --

    def settings_data(self) -> dict[str, Any]:
        return asdict(self.settings)

    def change_settings(self, changes: Mapping[str, Any]) -> None:
        self.settings = SalesforceSettings.parse({**asdict(self.settings), **changes})

    def restore(self) -> None:
        super().restore()
        self.settings = SalesforceSettings()

    def check_app(self, app: App) -> None:
        super().check_app(app)
        if app.jwt_public_key is not None:
            assertions.public_key(app.jwt_public_key)

    def new_account(self, data: Mapping[str, Any]) -> Account:
        account_id = _record_id(str(data.get("id") or self.minter.salesforce_id("00D")), prefix="00D")
        domain = str(data.get("domain") or f"org-{account_id[8:15].lower()}.example")
        users = [self.new_user(person) for person in data.get("users") or [{"name": f"admin@{domain}"}]]
        return Account.parse({**data, "id": account_id, "domain": domain, "users": users})

    def new_user(self, data: Mapping[str, Any]) -> User:
        user_id = _record_id(str(data.get("id") or self.minter.salesforce_id("005")), prefix="005")
        return User.parse({**data, "id": user_id})

    def find_account(self, account_id: str) -> Account | None:
        return self.store.accounts.get(_record_id(account_id, prefix="00D"))

    def new_refresh_token(self, account: Account) -> str:
        return "5Aep861" + self.minter.text(80, SESSION_ALPHABET)

    # -- authorising --

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
        value = "aPrx" + self.minter.text(60, SESSION_ALPHABET)
        expires = self.clock.now() + self.settings.code_lifetime
        code = Code(value, app.client_id, account.id, user.id, scopes, redirect_uri, challenge, expires)
        return self.store.add_code(code)

    def approve(self, app: App, account: Account, *, user: User, scopes: list[str], kind: str) -> Grant:
        """Record an approval; the one beyond the cap revokes the oldest of this user and app."""
        wants_refresh = bool(REFRESH_SCOPES & set(scopes)) and kind in ("code", "control")
        now = self.clock.now()
        with self.store.lock:
            grant = Grant(
                id=f"sf-{self.minter.uuid()}",
                client_id=app.client_id,
                account_id=account.id,
                user_id=user.id,
                scopes=scopes,
                kind=kind,
                created_at=now,
                last_used_at=now,
                refresh=self.new_refresh_token(account) if wants_refresh else None,
            )
            self.store.open_grant(grant)
            if wants_refresh:
                self._apply_cap(grant)
            return grant

    def _apply_cap(self, newest: Grant) -> None:
        if self.settings.approval_cap is None:
            return
        key = (newest.client_id, newest.account_id, newest.user_id)
        approvals = self.store.approvals(key)
        for oldest in approvals[: max(0, len(approvals) - self.settings.approval_cap)]:
            self.store.revoke(oldest, "approval cap", with_access=True)

    def mint_access(self, grant: Grant) -> Access:
        app = self.store.apps[grant.client_id]
        lifetime = app.token_lifetime if app.token_lifetime is not None else self.settings.token_lifetime
        token = f"{grant.account_id[:15]}!{self.minter.text(96, SESSION_ALPHABET)}"
        return self.store.add_access(grant, token, lifetime=lifetime)

    # -- token endpoint --

    @contextmanager
    def _held(self, key: str) -> Iterator[None]:
        with self._in_hand_lock:
            if key in self._in_hand:
                raise RefusedError(self.settings.busy_error)
            self._in_hand.add(key)
        try:
            self._pause.wait(self.settings.processing_seconds)
            yield
        finally:
            with self._in_hand_lock:
                self._in_hand.discard(key)

    def processing(self, endpoint: str, subject: Subject) -> AbstractContextManager[None]:
        """Let one refresh per token (or app) through at a time; the others are told to come back."""
        token, scope = subject["refresh_sha256"], self.settings.busy_scope
        if endpoint != "token" or token is None or subject["grant_type"] != "refresh_token" or scope == "off":
            return nullcontext()
        return self._held(token if scope == "token" else f"app:{subject['app']}")

    def authenticate(self, *, needs_secret: bool) -> Client:
        """Check the client by Basic header or body; a public client must not send a secret."""
        client_id, secret = client_credentials()
        app = self.store.apps.get(client_id or "")
        if app is None:
            raise RefusedError("invalid_client_id")
        if not app.secrets:
            if secret:
                raise RefusedError("invalid_client")
            return Client(app, "", None)
        if secret is None and not needs_secret:
            return Client(app, app.secrets[0], None)
        index = secret_index(app, secret)
        if index is None:
            raise RefusedError("invalid_client")
        return Client(app, app.secrets[index], index)

    def exchange_code(self, app: App, fields: Mapping[str, str]) -> tuple[Grant, Access]:
        """Redeem an authorization code."""
        with self.store.lock:
            code = self.store.code(fields.get("code", ""))
            if code is None or code.client_id != app.client_id:
                raise RefusedError("invalid_code")
            if code.used or code.expires_at <= self.clock.now():
                raise RefusedError("expired_code")
            if fields.get("redirect_uri") != code.redirect_uri:
                raise RefusedError("redirect_uri_mismatch")
            if code.challenge is not None and not verifier_fits(code.challenge, fields.get("code_verifier")):
                raise RefusedError("bad_verifier")
            account, user = self._usable(code.account_id, code.user_id)
            code.used = True
            grant = self.approve(app, account, user=user, scopes=code.scopes, kind="code")
            return grant, self.mint_access(grant)

    def refresh(self, app: App, token: str, *, entry: TokenRequest) -> tuple[Grant, Access, bool]:
        """Refresh a grant and say whether it rotated; a voided token takes the whole grant down."""
        with self.store.lock:
            digest = sha256(token)
            grant = self.store.grant_of_refresh(digest)
            if grant is None or grant.client_id != app.client_id:
                raise RefusedError("expired")
            if digest in grant.voided:
                entry.reuse = True
                if app.reuse_revokes:
                    self.store.revoke(grant, "reuse", with_access=True)
                raise RefusedError("expired")
            if not grant.live or self._lapsed(app, grant):
                raise RefusedError("expired")
            account, _ = self._usable(grant.account_id, grant.user_id)
            if app.rotation:
                self.store.rotate(grant, self.new_refresh_token(account))
            grant.last_used_at = self.clock.now()
            return grant, self.mint_access(grant), app.rotation

    def _lapsed(self, app: App, grant: Grant) -> bool:
        now = self.clock.now()
        match app.refresh_policy:
            case "zero":
                return True
            case "lifetime":
                return now - grant.created_at > app.refresh_lifetime
            case "inactivity":
                return now - grant.last_used_at > app.refresh_lifetime
        return False

    def bearer_grant(self, assertion_text: str) -> tuple[Client, Grant, Access]:
        """Exchange a JWT assertion for an access token; there is never a refresh token."""
        try:
            assertion = assertions.read(assertion_text)
            app = self.store.apps.get(assertion.issuer)
            if app is None:
                raise RefusedError("invalid_client_id")
            if app.jwt_public_key is None:
                raise RefusedError("bad_assertion")
            assertions.verify(assertion, app.jwt_public_key)
        except assertions.BadAssertionError as error:
            raise RefusedError("bad_assertion") from error
        self._check_claims(assertion)
        account, user = self._person(assertion.username)
        if not app.preauthorized and not self._has_approved(app, account, user=user):
            raise RefusedError("not_approved")
        self._usable(account.id, user.id)
        grant = self.approve(
            app, account, user=user, scopes=sorted(app.declared - REFRESH_SCOPES), kind="jwt"
        )
        return Client(app, app.secrets[0] if app.secrets else "", None), grant, self.mint_access(grant)

    def _check_claims(self, assertion: assertions.Assertion) -> None:
        accepted = {each.rstrip("/") for each in [*self.settings.audiences, self.url]}
        if not accepted & {aud.rstrip("/") for aud in assertion.audiences}:
            raise RefusedError("audience")
        expires_at, now, ceiling = assertion.expires_at, self.clock.now(), self.settings.jwt_ceiling
        if expires_at is None or expires_at <= now or (ceiling is not None and expires_at > now + ceiling):
            raise RefusedError("expired_assertion")

    def _person(self, username: str) -> tuple[Account, User]:
        for account, user_id in self.store.users():
            user = account.user(user_id)
            if user is not None and user.name == username:
                return account, user
        raise RefusedError("not_approved")

    def _has_approved(self, app: App, account: Account, *, user: User) -> bool:
        return bool(self.store.approvals((app.client_id, account.id, user.id)))

    def service_grant(self, app: App) -> tuple[Grant, Access]:
        """Issue a client-credentials token for the app's run-as user."""
        if not self.settings.my_domain:
            raise RefusedError("not_my_domain")
        if app.run_as is None:
            raise RefusedError("no_run_as")
        account, user = self._person(app.run_as)
        self._usable(account.id, user.id)
        scopes = sorted(app.declared - NOT_FOR_SERVICES)
        grant = self.approve(app, account, user=user, scopes=scopes, kind="client_credentials")
        return grant, self.mint_access(grant)

    def _usable(self, account_id: str, user_id: str) -> tuple[Account, User]:
        account = self.store.accounts.get(account_id)
        if account is None or not account.active:
            raise RefusedError("inactive_org")
        user = account.user(user_id)
        if user is None or not user.active:
            raise RefusedError("inactive_user")
        if account.ip_blocked:
            raise RefusedError("ip_restricted")
        return account, user

    def token_answer(
        self, client: Client, grant: Grant, *, access: Access, refresh: str | None
    ) -> dict[str, Any]:
        """Write the answer of the token endpoint: no expires_in, issued_at as a string of milliseconds."""
        identity, issued_at = self.identity_url(grant), str(int(access.issued_at * 1000))
        mac = hmac.new(client.secret.encode(), (identity + issued_at).encode(), hashlib.sha256)
        answer: dict[str, Any] = {
            "access_token": access.token,
            "signature": base64.b64encode(mac.digest()).decode(),
            "scope": " ".join(grant.scopes),
            "instance_url": self.instance_url(grant),
            "id": identity,
            "token_type": "Bearer",
            "issued_at": issued_at,
        }
        return answer if refresh is None else {**answer, "refresh_token": refresh}

    def instance_url(self, grant: Grant) -> str:
        """Tell where the org's API is: the account's setting, else the vendor's, else this server."""
        account = self.store.accounts.get(grant.account_id)
        own = account.instance_url if account is not None else None
        return own or self.settings.instance_url or self.url

    def identity_url(self, grant: Grant) -> str:
        """Return the identity URL of the user behind a grant."""
        return f"{self.url}/id/{grant.account_id}/{grant.user_id}"

    # -- after the token --

    def access_state(self, access: Access | None) -> str:
        """Tell live, expired, revoked or unknown."""
        if access is None:
            return "unknown"
        if access.revoked is not None:
            return "revoked"
        return "expired" if access.expires_at <= self.clock.now() else "live"

    def use(self, token: str | None) -> tuple[Access, Grant] | None:
        """Present an access token at a protected resource; None when it does not open the door."""
        access = self.store.access(token) if token else None
        state = self.access_state(access)
        self.ledger.note_call(state)
        if access is None or state != "live":
            return None
        grant = self.store.grants[access.grant_id]
        app = self.store.apps.get(grant.client_id)
        if app is not None and app.sliding:
            access.expires_at = self.clock.now() + access.lifetime
        return access, grant

    def revoke(self, token: str) -> None:
        """Revoke an access token alone, or a refresh token with its access tokens."""
        access = self.store.access(token)
        if access is not None and self.access_state(access) == "live":
            access.revoked, access.revoked_at = "revoked", self.clock.now()
            return
        grant = self.store.grant_of_refresh(sha256(token))
        if grant is None or not grant.live or grant.refresh != token:
            raise RefusedError("invalid_token")
        self.store.revoke(grant, "revoked", with_access=True)

    def introspect(self, app: App, token: str) -> dict[str, Any]:
        """Describe a token (RFC 7662); another app's token is not active unless this app may see all."""
        access = self.store.access(token)
        if access is not None and self.access_state(access) == "live":
            grant = self.store.grants[access.grant_id]
            times = {
                "exp": int(access.expires_at),
                "iat": int(access.issued_at),
                "nbf": int(access.issued_at),
            }
            return self._description(app, grant, kind="access_token", times=times)
        found = self.store.grant_of_refresh(sha256(token))
        if found is not None and found.live and found.refresh == token:
            start = int(found.created_at)
            return self._description(app, found, kind="refresh_token", times={"iat": start, "nbf": start})
        return {"active": False}

    def _description(self, app: App, grant: Grant, *, kind: str, times: dict[str, int]) -> dict[str, Any]:
        if grant.client_id != app.client_id and not app.introspect_all:
            return {"active": False}
        account = self.store.accounts.get(grant.account_id)
        user = account.user(grant.user_id) if account is not None else None
        return {
            "active": True,
            "scope": " ".join(grant.scopes),
            "client_id": grant.client_id,
            "username": user.name if user is not None else "",
            "sub": self.identity_url(grant),
            "token_type": kind,
            **times,
        }

    # -- answers and subjects --

    def knows_problem(self, name: str) -> bool:
        return name in PROBLEMS or name in API_PROBLEMS

    def problem(self, name: str, detail: str | None) -> Response:
        return oauth_problem(name, detail) if name in PROBLEMS else api_problem(name, detail)

    def subject(self, endpoint: str) -> Subject:
        fields, client_id = request.values, client_credentials()[0]
        refresh = fields.get("refresh_token") if endpoint == "token" else None
        grant = self.store.grant_of_refresh(sha256(refresh)) if refresh else self._grant_of_other(fields)
        subject: Subject = {
            "grant_type": fields.get("grant_type"),
            "app": client_id or (grant.client_id if grant is not None else None),
            "refresh_sha256": sha256(refresh) if refresh else None,
            **self.subject_of_grant(grant),
        }
        code = self.store.code(fields.get("code", "")) if grant is None else None
        if code is not None:
            subject |= {"account": code.account_id, "user": code.user_id}
        return subject

    def _grant_of_other(self, fields: Mapping[str, str]) -> Grant | None:
        token = fields.get("token") or session_token()
        if not token:
            return None
        access = self.store.access(token)
        return (
            self.store.grants.get(access.grant_id) if access else self.store.grant_of_refresh(sha256(token))
        )


def client_credentials() -> tuple[str | None, str | None]:
    """Return client id and secret of the current request, from the Basic header or else the form."""
    basic = request.authorization
    if basic is not None and basic.type == "basic":
        return basic.username, basic.password
    return request.values.get("client_id"), request.form.get("client_secret")


def session_token() -> str | None:
    """Return the session of the current request, sent as `Bearer` or in the older `OAuth` scheme."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() in ("bearer", "oauth") and token.strip() else None


def _record_id(identifier: str, *, prefix: str) -> str:
    try:
        canonical = with_checksum(identifier)
    except ValueError as error:
        raise SetUpError(str(error)) from error
    if not canonical.startswith(prefix):
        raise SetUpError(f"{identifier}: an id of this kind begins with {prefix}")
    return canonical
