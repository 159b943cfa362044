"""Sending a request as a registered client: credentials, the next secret when one is refused, and what a
failure means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote_plus

from app import http_client
from app.clock import Clock
from app.errors import ProviderUnavailable
from app.http_client import Answer, Deadlines, HttpClient, Purpose
from app.oauth2.outcomes import (
    CLIENT_REFUSED,
    Misconfigured,
    NotSent,
    Outcome,
    Unknown,
    by_error,
    json_object,
)
from app.secret import Secret

__all__ = ["ClientAuth", "Credentials", "Form", "Wire", "ask", "fetch", "request_token"]

ClientAuth = Literal["body", "basic"]
Form = Mapping[str, str | Secret]

_NO_SECRET: Final = (None,)
_JSON: Final = {"Accept": "application/json"}


@dataclass(frozen=True, slots=True)
class Wire:
    """How to reach a provider: the HTTP client, the deadlines, and a last check before the first body byte.

    `before_body` raises `http_client.Abandoned` when the lease no longer covers the request; it is asked
    again for each request that carries a client secret. `clock` stamps the assertions we sign.
    """

    http: HttpClient
    deadlines: Deadlines
    clock: Clock
    before_body: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who we are to an authorization server: the client id and every secret that may be valid, newest first.

    No secret makes a public client, which sends its id alone (RFC 6749 §3.2.1).
    """

    client_id: str
    secrets: tuple[Secret, ...]
    auth: ClientAuth = "basic"


def request_token(
    wire: Wire, url: str, *, form: Form, credentials: Credentials, classify: Callable[[Answer], Outcome]
) -> Outcome:
    """Ask for a token and say how it ended; never raises for anything the network or the provider does.

    Each client secret is tried in turn while the provider refuses the *client*: such a refusal comes before
    the grant is looked at, so nothing is spent. Any other ending stands as it is and is never retried here.
    """
    outcome: Outcome = Misconfigured("invalid_client")
    for secret in credentials.secrets or _NO_SECRET:
        outcome = _one_request(
            wire, url, form=form, credentials=credentials, secret=secret, classify=classify
        )
        if not (isinstance(outcome, Misconfigured) and outcome.code in CLIENT_REFUSED):
            return outcome
    return outcome


def _one_request(
    wire: Wire,
    url: str,
    *,
    form: Form,
    credentials: Credentials,
    secret: Secret | None,
    classify: Callable[[Answer], Outcome],
) -> Outcome:
    try:
        answer = _post(wire, url, form=form, credentials=credentials, secret=secret)
    except http_client.NotSent as fault:
        return NotSent(fault.reason)
    except http_client.Unfinished as fault:
        return Unknown(fault.reason)
    return classify(answer)


def ask(
    wire: Wire,
    url: str,
    *,
    form: Form,
    credentials: Credentials,
    classify_error: Callable[[Mapping[str, object] | None], Outcome] = by_error,
) -> Answer:
    """POST a form that changes no token we keep (introspection, revocation) and return the complete answer.

    Each client secret is tried in turn, as above. Raises ProviderUnavailable when no complete answer comes.
    """
    for secret in credentials.secrets or _NO_SECRET:
        try:
            answer = _post(wire, url, form=form, credentials=credentials, secret=secret)
        except http_client.WireFault as error:
            raise ProviderUnavailable("The provider did not answer.") from error
        if not _client_refused(answer, classify_error):
            break
    return answer


def _client_refused(answer: Answer, classify_error: Callable[[Mapping[str, object] | None], Outcome]) -> bool:
    if answer.status not in (400, 401, 403):
        return False
    outcome = classify_error(json_object(answer))
    return isinstance(outcome, Misconfigured) and outcome.code in CLIENT_REFUSED


def fetch(wire: Wire, method: str, *, url: str, bearer: Secret) -> Answer:
    """Call a protected endpoint of the provider with an access token and return the complete answer.

    Raises ProviderUnavailable when no complete answer comes.
    """
    try:
        return wire.http.send(
            method,
            url,
            purpose=Purpose.PROVIDER,
            deadlines=wire.deadlines,
            bearer=bearer,
            headers=_JSON,
        )
    except http_client.WireFault as error:
        raise ProviderUnavailable("The provider did not answer.") from error


def _post(wire: Wire, url: str, *, form: Form, credentials: Credentials, secret: Secret | None) -> Answer:
    body: dict[str, str | Secret] = dict(form)
    basic: tuple[str, Secret] | None = None
    if secret is not None and credentials.auth == "basic":
        # RFC 6749 §2.3.1: both halves are form-encoded before they are joined by the colon.
        basic = (quote_plus(credentials.client_id), Secret(quote_plus(secret.reveal())))
    else:
        body["client_id"] = credentials.client_id
        if secret is not None:
            body["client_secret"] = secret
    return wire.http.send(
        "POST",
        url,
        purpose=Purpose.PROVIDER,
        deadlines=wire.deadlines,
        form=body,
        basic=basic,
        headers=_JSON,
        before_body=wire.before_body,
    )
