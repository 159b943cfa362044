"""The hand-out path: GET and POST /v1/connections/{name}/token.

Everything here runs for every token anybody asks for. The answer's bytes are composed once for each connection and
generation; a request adds the seconds left.

Decision: a GET is answered in front of Flask, by `Shortcut`. Matching a route, making and tearing down contexts and building
a response object take about 50 µs, more than deciding does. The price is a second place that knows the path; what fails
there is handed to Flask, so that errors still have one place alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from flask import Flask, Response, request
from werkzeug.exceptions import MethodNotAllowed

from app.access.callers import Caller
from app.bootstrap import Services
from app.broker.issue import HandOut, Ready
from app.errors import DrawbridgeError, NotFound, RefreshInProgress
from app.telemetry import metrics
from app.web.arguments import NAME_PATTERN, read_query, read_wishes, read_wishes_body
from app.web.asking import client_address
from app.web.envelope import Envelope
from app.web.health import MetricsListener

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["EXPRESS", "PATH", "Express", "Shortcut", "TokenViews"]

EXPRESS: Final = "drawbridge.express"
"""Where an application of ours keeps its `Express` among its extensions."""

PATH: Final = "/v1/connections/<name:name>/token"
_PATH: Final = re.compile(f"/v1/connections/({NAME_PATTERN})/token")
_FAILED: Final = "drawbridge.failed"
_MANY: Final = 20_000  # connections whose answer is kept; about 1 KiB each
_HEADERS: Final = (
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("Pragma", "no-cache"),
)


class TokenViews:
    """The two views and the composed answers they share."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._clock = services.clock
        self._authenticate = services.authentication.authenticate
        self._issue = services.issuer.issue
        self._composed: dict[str, tuple[HandOut, bytes, bytes]] = {}
        self.answered: deque[int] = deque()
        """Status of each request answered in front of Flask; appended to by many threads, emptied by `count`."""

    def register(self, app: Flask) -> None:
        """Put the views on their path, not through a blueprint, whose hooks would be looked for at each request."""
        # flask-smorest, which describes the path, expects `defaults` to be there as blueprints leave it.
        app.add_url_rule(PATH, "token_get", self.get, methods=["GET"], defaults={})
        app.add_url_rule(PATH, "token_post", self.post, methods=["POST"], defaults={})

    def get(self, name: str) -> Response:
        """A token; `min_ttl` and `max_wait` in the query."""
        environ = request.environ
        if environ["REQUEST_METHOD"] != "GET":
            # HEAD would record a hand-out of which nothing arrives.
            raise MethodNotAllowed(valid_methods=["GET", "POST"])
        failed: Exception | None = environ.pop(_FAILED, None)
        if failed is not None:
            raise failed
        return Response(self.answer(environ, name), headers=list(_HEADERS))

    def answer(self, environ: WSGIEnvironment, name: str) -> bytes:
        """The body for a GET; raises what went wrong."""
        caller = self._caller(environ)
        wishes = read_wishes(environ.get("QUERY_STRING", ""))
        return self.body(self._issue(caller, name, min_ttl=wishes.min_ttl, max_wait=wishes.max_wait))

    def post(self, name: str) -> Response:
        """The same with a JSON body, which may name a token the provider refused."""
        environ = request.environ
        caller = self._caller(environ)
        read_query(environ.get("QUERY_STRING", ""), allowed=())
        wishes = read_wishes_body(request.get_data(), environ.get("CONTENT_TYPE"))
        token = self._issue(
            caller, name, min_ttl=wishes.min_ttl, max_wait=wishes.max_wait, rejected=wishes.rejected
        )
        return Response(self.body(token), headers=list(_HEADERS))

    def count(self) -> None:
        """Count what was answered in front of Flask since the last call; counting one by one would cost each dearly."""
        statuses: Counter[int] = Counter()
        while self.answered:
            statuses[self.answered.popleft()] += 1
        for status, number in statuses.items():
            metrics.requests.labels(PATH, str(status)).inc(number)

    def _caller(self, environ: WSGIEnvironment) -> Caller:
        address = client_address(environ, self._settings)
        return self._authenticate(environ.get("HTTP_AUTHORIZATION"), address=address)

    def body(self, token: HandOut) -> bytes:
        """The answer's bytes; raises `RefreshInProgress` for a token that has died."""
        composed = self._composed.get(token.connection)
        if composed is None or composed[0] is not token:
            composed = self._compose(token)
        left = token.expires - self._clock.timestamp()
        if left <= 0:
            raise RefreshInProgress  # it died between the last look and this line
        _, head, tail = composed
        return b"%b%d%b" % (head, left, tail)

    def _compose(self, token: HandOut) -> tuple[HandOut, bytes, bytes]:
        if token.access_token is None or token.expires_at is None:
            raise NotFound("The connection holds no token.")
        first = {
            "access_token": token.access_token.reveal(),
            "token_type": "Bearer",
            "expires_at": token.expires_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        second: dict[str, object] = {
            "scopes": list(token.scopes),
            "connection": token.connection,
            "provider": token.provider,
            "account_id": token.account_id,
            "generation": token.generation,
        }
        if token.instance_url is not None:
            second["instance_url"] = token.instance_url
        head = f'{json.dumps(first)[:-1]}, "expires_in": '.encode()
        tail = f", {json.dumps(second)[1:]}".encode()
        if len(self._composed) >= _MANY:
            self._composed.clear()
        composed = self._composed[token.connection] = (token, head, tail)
        return composed


class Express:
    """Hand-outs in company: what only lacks its record is decided one by one, recorded together and answered.

    For a server that has several requests in hand at once (`express_worker`). It never waits but for the record, and
    leaves everything else, refusals included, to the usual way.
    """

    def __init__(
        self, services: Services, views: TokenViews, envelope: Envelope, metrics: MetricsListener | None
    ) -> None:
        self._settings = services.settings
        self._authentication = services.authentication
        self._issuer = services.issuer
        self._views = views
        self._envelope = envelope
        self._metrics = metrics

    def begin(self, environ: WSGIEnvironment) -> Ready | None:
        """The hand-out a GET asks for; None when it has to go the usual way, and nothing has happened then."""
        found = _PATH.fullmatch(environ["PATH_INFO"])
        header = environ.get("HTTP_AUTHORIZATION")
        if found is None or header is None or (self._metrics and self._metrics.arrived_here(environ)):
            return None
        caller = self._authentication.recall(header)
        if caller is None:
            return None
        try:
            wishes = read_wishes(environ["QUERY_STRING"])
        except DrawbridgeError:
            return None
        ready = self._issuer.ready(caller, found[1], min_ttl=wishes.min_ttl)
        if ready is None:
            return None
        admitted = self._authentication.admits(caller, address=client_address(environ, self._settings))
        return ready if admitted else None

    def finish(self, those: Sequence[tuple[WSGIEnvironment, Ready]]) -> list[tuple[bytes, bytes] | None]:
        """Headers (without status line, Date and the like) and body of each; None for what has to go the usual way."""
        try:
            handed = self._issuer.hand_out([ready for _, ready in those])
        except DrawbridgeError:  # each is asked for again the usual way, which says what is wrong
            handed = [None] * len(those)
        answers = [self._answer(environ, token) for (environ, _), token in zip(those, handed, strict=True)]
        for (_, ready), answer in zip(those, answers, strict=True):
            if answer is None:
                self._authentication.readmit(ready.caller)
        return answers

    def _answer(self, environ: WSGIEnvironment, token: HandOut | None) -> tuple[bytes, bytes] | None:
        if token is None:
            return None
        try:
            body = self._views.body(token)
        except DrawbridgeError:
            return None
        self._views.answered.append(200)
        headers = (*_HEADERS, ("Content-Length", str(len(body))), *self._envelope.stamp(environ))
        return "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1"), body


class Shortcut:
    """A WSGI application in front of Flask's that answers GETs of tokens itself and leaves the rest to it."""

    def __init__(self, app: WSGIApplication, views: TokenViews) -> None:
        self._app = app
        self._answer = views.answer
        self._answered = views.answered

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "GET" and (found := _PATH.fullmatch(environ["PATH_INFO"])):
            try:
                body = self._answer(environ, found[1])
            except Exception as error:  # noqa: BLE001 - the view raises it again, and `problems` answers it
                environ[_FAILED] = error
            else:
                self._answered.append(200)
                start_response("200 OK", [*_HEADERS, ("Content-Length", str(len(body)))])
                return [body]
        return self._app(environ, start_response)
