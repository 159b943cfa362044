"""POST /oauth/token: callers exchange their credential for a short token of ours (RFC 6749 §4.4, RFC 9068).

Authlib's framework-independent classes carry the endpoint, grants and error shapes. What we make stricter:
exactly one way of client authentication in a request, every parameter once, a scope beyond the permissions
is an error instead of less, one answer for unknown and wrong, and our own verification of assertions. Other
grants are plugged in by whoever owns what they hand out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl

from authlib.oauth2.rfc6749 import AuthorizationServer as Endpoint
from authlib.oauth2.rfc6749 import ClientMixin, OAuth2Error, OAuth2Payload, OAuth2Request
from authlib.oauth2.rfc6749.errors import InvalidClientError, InvalidRequestError
from authlib.oauth2.rfc6749.grants import ClientCredentialsGrant
from authlib.oauth2.rfc6750.token import BearerTokenGenerator

from app.access.assertions import ASSERTION_TYPE, Assertions
from app.access.audit import Entry, Trail
from app.access.authentication import Authentication
from app.access.callers import Caller, Callers
from app.access.credentials import Basic, parse
from app.access.denials import Denials
from app.access.permissions import Action
from app.access.signing import TOKEN_LIFE, AccessTokens
from app.errors import DrawbridgeError, Unauthenticated
from app.secret import Secret
from app.telemetry import Event, metrics

__all__ = ["AuthorizationServer", "Client", "GrantRequest", "TokenRequest", "TokenResponse"]

_METHODS: Final = ("client_secret_basic", "client_secret_post", "private_key_jwt")
_FORM: Final = "application/x-www-form-urlencoded"
_LARGEST_BODY: Final = 65_536
_MOST_FIELDS: Final = 50
_REPEATABLE: Final = frozenset({"resource", "audience"})  # RFC 8693 §2.1, RFC 8707 §2
_NO_STORE: Final = (
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("Pragma", "no-cache"),
)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What the endpoint needs of an HTTP request; header names in any case, `address` is the client's."""

    method: str
    headers: Mapping[str, str]
    body: bytes
    address: str | None = None

    def header(self, name: str) -> str | None:
        """One header's value by its lower-case name."""
        return next((value for key, value in self.headers.items() if key.lower() == name), None)


@dataclass(frozen=True, slots=True)
class TokenResponse:
    """Status, headers and body to send."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class GrantRequest(OAuth2Request):  # type: ignore[misc]
    """The request as grants see it: `payload.data` is the form, `client` the caller once it has proved
    itself.
    """

    def __init__(self, request: TokenRequest, form: Mapping[str, list[str]], uri: str) -> None:
        # The library insists on https in the URI. Where TLS ends is judged once, with PUBLIC_URL, not for
        # each request.
        super().__init__(request.method, "https:" + uri.partition(":")[2], headers=dict(request.headers))
        self.payload = _Payload(form)
        self.received = request

    @property
    def form(self) -> dict[str, str]:
        """The form with each parameter's first value."""
        fields: dict[str, str] = self.payload.data
        return fields


class Client(ClientMixin):  # type: ignore[misc]
    """A caller as the library wants it."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    def get_client_id(self) -> str:
        """Its public id."""
        return self.caller.client_id

    def check_grant_type(self, grant_type: str) -> bool:
        """Every caller may use what the endpoint offers; what it gets is decided by its permissions."""
        return True

    def get_allowed_scope(self, scope: str | None) -> str | None:
        """The scopes asked for, or all it has when none are; None, which is an error, for one it does not
        have.
        """
        held = {permission.action.value for permission in self.caller.permissions}
        wanted = held if not scope else set(scope.split())
        return " ".join(sorted(wanted)) if wanted <= held else None


class AuthorizationServer:
    """The token endpoint; safe for threads. `grants` are further grant classes of the library, see
    `GrantRequest`.
    """

    def __init__(
        self,
        callers: Callers,
        authentication: Authentication,
        assertions: Assertions,
        tokens: AccessTokens,
        *,
        denials: Denials,
        trail: Trail,
        grants: Sequence[type] = (),
    ) -> None:
        self._endpoint = _Endpoint(callers, authentication, assertions, tokens, denials, trail)
        for grant in (_ClientCredentials, *grants):
            self._endpoint.register_grant(grant)

    def respond(self, request: TokenRequest) -> TokenResponse:
        """Answer one request; every error has the shape of RFC 6749 §5.2, our own faults are 5xx."""
        try:
            response = self._endpoint.create_token_response(request)
        except OAuth2Error as error:
            response = self._endpoint.handle_response(*error())
        except DrawbridgeError as error:
            response = _failure(error)
        assert isinstance(response, TokenResponse)
        return response


class _ClientCredentials(ClientCredentialsGrant):  # type: ignore[misc]
    """RFC 6749 §4.4. The library's own version would write the token into its debug log."""

    def create_token_response(self) -> tuple[int, dict[str, Any], Sequence[tuple[str, str]]]:
        token = self.generate_token(scope=self.request.payload.scope, include_refresh_token=False)
        self.save_token(token)
        return 200, token, _NO_STORE


class _Endpoint(Endpoint):  # type: ignore[misc]
    def __init__(
        self,
        callers: Callers,
        authentication: Authentication,
        assertions: Assertions,
        tokens: AccessTokens,
        denials: Denials,
        trail: Trail,
    ) -> None:
        super().__init__(scopes_supported=[action.value for action in Action])
        self._callers = callers
        self._authentication = authentication
        self._assertions = assertions
        self._tokens = tokens
        self._denials = denials
        self._trail = trail
        generator = BearerTokenGenerator(self._mint, expires_generator=lambda *_: TOKEN_LIFE)
        self.register_token_generator("default", generator)

    def create_oauth2_request(self, request: TokenRequest) -> GrantRequest:
        """Read the form strictly: RFC 6749 §3.2 allows no parameter twice."""
        return GrantRequest(request, _form(request), f"{self._tokens.issuer}/oauth/token")

    def get_token_grant(self, request: GrantRequest) -> Any:
        """Find the grant; the library would repeat in its answer what the client sent."""
        if not request.payload.grant_type:
            raise InvalidRequestError("The parameter grant_type is missing.")
        for grant, _ in self._token_grants:
            if grant.check_token_endpoint(request):
                return grant(request, self)
        raise OAuth2Error("This grant type is not offered.", error="unsupported_grant_type")

    def authenticate_client(
        self, request: GrantRequest, methods: Sequence[str], endpoint: str = "token"
    ) -> Client:
        """The caller, by exactly one of the three ways; unknown, wrong, disabled and malformed look the
        same.
        """
        way = _way(request)
        try:
            caller = self._by(way, request)
        except Unauthenticated:
            self._denials.unknown(way)
            _refuse_client()
        metrics.authentications.labels(way, "accepted").inc()
        self._authentication.admit(caller, address=request.received.address)
        request.auth_method = way
        return Client(caller)

    def save_token(self, token: Mapping[str, Any], request: GrantRequest) -> None:
        """Put it on record before it leaves."""
        detail = {"way": request.auth_method, "seconds": int(token["expires_in"])}
        self._trail.record(Entry(request.client.caller.actor, Event.CALLER_TOKEN_ISSUED, detail=detail))

    def handle_response(self, status: int, body: Any, headers: Sequence[tuple[str, str]]) -> TokenResponse:
        """Turn the library's answer into ours; the scheme in the challenge is completed by a realm (RFC
        7617 §2).
        """
        kept = tuple(pair for pair in headers if pair[0] != "WWW-Authenticate")
        challenge = (
            (("WWW-Authenticate", 'Basic realm="drawbridge", charset="UTF-8"'),) if status == 401 else ()
        )
        return TokenResponse(status, (*kept, *challenge), json.dumps(body).encode())

    def send_signal(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Nobody listens: what the library announces is on record in the trail."""

    def _by(self, way: str, request: GrantRequest) -> Caller:
        form = request.form
        if way == "client_secret_basic":
            credential = parse(request.received.header("authorization"))
            if (
                not isinstance(credential, Basic)
                or form.get("client_id", credential.client_id) != credential.client_id
            ):
                raise Unauthenticated
            return self._callers.by_secret(credential.client_id, credential.secret)
        if way == "client_secret_post":
            return self._callers.by_secret(form.get("client_id", ""), Secret(form["client_secret"]))
        if way == "private_key_jwt" and form.get("client_assertion_type") == ASSERTION_TYPE:
            return self._assertions.verify(form.get("client_assertion", ""), client_id=form.get("client_id"))
        raise Unauthenticated

    def _mint(self, client: Client, grant_type: str, user: None, scope: str) -> str:
        scopes = frozenset(Action(word) for word in scope.split())
        return self._tokens.mint(client.caller, scopes).token.reveal()


class _Payload(OAuth2Payload):  # type: ignore[misc]
    def __init__(self, form: Mapping[str, list[str]]) -> None:
        self._lists = defaultdict(list, form)
        self._first = {name: values[0] for name, values in form.items()}

    @property
    def data(self) -> dict[str, str]:
        return self._first

    @property
    def datalist(self) -> defaultdict[str, list[str]]:
        return self._lists


def _form(request: TokenRequest) -> dict[str, list[str]]:
    if request.method != "POST":
        raise InvalidRequestError("The token endpoint takes POST.", status_code=405)
    content_type = (request.header("content-type") or "").partition(";")[0].strip().lower()
    if content_type != _FORM:
        raise InvalidRequestError(f"The body must be {_FORM}.")
    if len(request.body) > _LARGEST_BODY:
        raise InvalidRequestError("The body is too large.", status_code=413)
    try:
        pairs = parse_qsl(
            request.body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS
        )
    except ValueError:  # not ASCII, not UTF-8 behind the percent signs, or too many
        raise InvalidRequestError("The body is not a well-formed form in UTF-8.") from None
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        if value:  # RFC 6749 §3.2: a parameter without a value counts as omitted
            fields.setdefault(name, []).append(value)
    if any(len(values) > 1 and name not in _REPEATABLE for name, values in fields.items()):
        raise InvalidRequestError("A parameter is repeated.")
    return fields


def _way(request: GrantRequest) -> str:
    """Which client authentication was used; RFC 6749 §2.3 forbids more than one in a request."""
    form = request.form
    used = [
        request.received.header("authorization") is not None,
        "client_secret" in form,
        "client_assertion" in form or "client_assertion_type" in form,
    ]
    if sum(used) > 1:
        raise InvalidRequestError("More than one way of client authentication was used.")
    return next((way for way, is_used in zip(_METHODS, used, strict=True) if is_used), "none")


def _refuse_client() -> NoReturn:
    raise InvalidClientError("Client authentication failed.", status_code=401)


def _failure(error: DrawbridgeError) -> TokenResponse:
    """Faults of ours in the shape of RFC 6749 §5.2, with the word its §4.1.2.1 has for them."""
    word = "temporarily_unavailable" if error.retryable else "server_error"
    if error.status == 403:
        word = "unauthorized_client"
    body = {"error": word, "error_description": error.detail}
    headers: tuple[tuple[str, str], ...] = _NO_STORE
    if error.retry_after is not None:
        headers = (*_NO_STORE, ("Retry-After", str(max(1, ceil(error.retry_after)))))
    return TokenResponse(error.status, headers, json.dumps(body).encode())
