"""Whether this process lives, may be sent requests, and what is the matter with the installation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from flask import Response, current_app, request

from app.access.audit import Trail
from app.access.permissions import Action
from app.bootstrap import VERSION, Services
from app.broker import findings, installation
from app.errors import DatabaseUnavailable, DrawbridgeError, NotFound, Unauthenticated
from app.secret import Secret
from app.telemetry import metrics
from app.web.api import ApiBlueprint
from app.web.asking import ask_caller, require_somewhere, services, signed_in
from app.web.schemas import HealthReport, NoQuery

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["READINESS", "MetricsListener", "Readiness", "blueprint"]

READINESS: Final = "drawbridge.readiness"
_LARGEST_SKEW: Final = 5.0  # seconds; far below any token's life, far above any clock that is kept
_WORST: Final = ("pass", "warn", "fail")

blueprint: Final = ApiBlueprint("health", __name__, description="How this installation is.")


class Readiness:
    """Whether requests should come here: the database answers and the keys open its data.

    The keys are proved again whenever the "access" epoch moves, which it does when keys change. While the database is away
    the answer stays yes for the grace, because living tokens are handed out that long.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._proved = -1

    def __call__(self) -> bool:
        try:
            epoch = self._services.epochs.look().access  # goes on with the last epochs during the grace
            if epoch != self._proved:
                installation.unlock(self._services.database, self._services.keyring)
                self._proved = epoch
        except DrawbridgeError:
            return False
        return True


@blueprint.on("GET", "/livez")
@blueprint.open_to_all
@blueprint.answers(200, description="This process answers.", content_type="text/plain")
def live() -> Response:
    """Answer, and look at nothing."""
    return _bare(200)


@blueprint.on("GET", "/readyz")
@blueprint.open_to_all
@blueprint.answers(200, description="Send requests here.", content_type="text/plain")
@blueprint.may_answer(503, description="Send none for now.", content_type="text/plain")
def ready() -> Response:
    """Say whether database and keys are there; never asks a provider, never tells why."""
    response = _bare(200 if _readiness()() else 503)
    if response.status_code == 503:
        response.headers["Retry-After"] = "5"
    return response


@blueprint.on("GET", "/health")
@blueprint.query(NoQuery)
@blueprint.answers(200, HealthReport, content_type="application/health+json", description="Serving.")
@blueprint.may_answer(
    503, schema=HealthReport, content_type="application/health+json", description="Not serving."
)
@blueprint.may_answer(
    503,
    schema="Problem",
    content_type="application/problem+json",
    description="Not serving; as a problem where the database is gone and nobody can be known.",
)
@blueprint.errors(400, 401, 403, 429)
def health(query: dict[str, Any]) -> Response:
    """Tell a signed-in admin, or a caller with connection:read, how things are."""
    if signed_in() is None:
        require_somewhere(ask_caller(), Action.CONNECTION_READ)
    report = _report(services())
    status = 503 if report["status"] == "fail" else 200
    return Response(json.dumps(report), status, content_type="application/health+json", headers=_NO_STORE)


@blueprint.on("GET", "/metrics")
@blueprint.open_to_all
@blueprint.answers(200, description="Prometheus text format.", content_type="text/plain")
@blueprint.errors(401, 404)
def show_metrics() -> Response:
    """The numbers, for whoever has METRICS_TOKEN; where none is set there is nothing here."""
    token = services().settings.metrics_token
    if token is None:
        raise NotFound("There is nothing at this path.")
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or Secret(given.strip()) != token:
        raise Unauthenticated("The metrics need the bearer token of METRICS_TOKEN.")
    return Response(metrics.expose(), content_type=metrics.CONTENT_TYPE, headers=_NO_STORE)


class MetricsListener:
    """Gives what arrives on METRICS_BIND the metrics and nothing else, and the rest to the application.

    gunicorn listens on both addresses, so every worker serves both and none needs a server of its own.
    """

    def __init__(self, app: WSGIApplication, bind: str, *, beside: str) -> None:
        self._app = app
        self._here = bind.removeprefix("unix:")
        # The main address may have the same port on another interface; else the port alone tells, whatever was bound to.
        self._same_port = bind.rpartition(":")[2] == beside.rpartition(":")[2]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not self.arrived_here(environ):
            return self._app(environ, start_response)
        found = environ.get("PATH_INFO") == "/metrics" and environ["REQUEST_METHOD"] in ("GET", "HEAD")
        body = metrics.expose() if found else b""
        kind = metrics.CONTENT_TYPE if found else "text/plain; charset=utf-8"
        start_response(
            "200 OK" if found else "404 Not Found",
            [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")],
        )
        return [body if environ["REQUEST_METHOD"] != "HEAD" else b""]

    def arrived_here(self, environ: WSGIEnvironment) -> bool:
        """Whether a request came to METRICS_BIND.

        By the socket itself: over a unix socket SERVER_NAME and SERVER_PORT come from the Host header.
        """
        socket = environ.get("gunicorn.socket")
        if socket is None:
            return False
        address = socket.getsockname()
        if isinstance(address, str):
            return address == self._here
        host, _, port = self._here.rpartition(":")
        return str(address[1]) == port and (not self._same_port or address[0] == host.strip("[]"))


_NO_STORE: Final = {"Cache-Control": "no-store"}


def _bare(status: int) -> Response:
    return Response(b"", status, content_type="text/plain; charset=utf-8", headers=_NO_STORE)


def _readiness() -> Readiness:
    found: Readiness = current_app.extensions[READINESS]
    return found


def _report(ours: Services) -> dict[str, Any]:
    """The report after draft-inadarei-api-health-check-06; names no account and no connection."""
    try:
        checks = _checks(ours)
    except DatabaseUnavailable:
        ready = _readiness()()
        checks = {
            "database": [{"status": "warn" if ready else "fail", "output": "The database does not answer."}]
        }
    worst = max((entry["status"] for entries in checks.values() for entry in entries), key=_WORST.index)
    return {"status": worst, "version": VERSION, "description": "Drawbridge token broker", "checks": checks}


def _checks(ours: Services) -> dict[str, list[dict[str, Any]]]:
    now = ours.clock.now()
    alive = installation.alive(ours.database, now=now)
    told = ours.examiner.tell(findings.open_findings(ours.database))
    held = ours.adoption.disagreement()
    counts = sorted(ours.store.counts().items())
    return {
        "database": [{"status": "pass" if _readiness()() else "fail"}],
        "processes": [
            {
                "componentId": process.id,
                "componentType": process.kind,
                "observedValue": round(process.skew_seconds, 3),
                "observedUnit": "seconds of clock skew",
                "status": "warn" if abs(process.skew_seconds) > _LARGEST_SKEW else "pass",
            }
            for process in alive
        ],
        "worker": [_worker(alive)],
        "connections": [
            {
                "componentType": provider,
                "componentId": state,
                "observedValue": count,
                "observedUnit": "connections",
                "status": "warn" if state in _TROUBLED else "pass",
            }
            for (provider, state), count in counts
        ],
        "findings": [
            {
                "componentType": one.finding.kind,
                "componentId": one.finding.id,
                "observedValue": one.finding.count,
                "observedUnit": "times seen",
                "status": "warn",
                "output": f"{one.diagnosis.sentence} Who: {one.diagnosis.who}. {one.diagnosis.how}",
            }
            for one in told
        ],
        "refreshing": [
            {"status": "pass"}
            if held is None
            else {"status": "warn", "componentId": held.code, "output": held.says}
        ],
        "audit": [_audit(ours)],
    }


_TROUBLED: Final = frozenset({"needs_reconnect", "uncertain", "doubtful"})


def _worker(alive: Iterable[installation.ProcessRow]) -> dict[str, Any]:
    if any(process.kind == "worker" for process in alive):
        return {"status": "pass"}
    return {"status": "warn", "output": "No worker is alive: nothing is refreshed ahead of time or revoked."}


def _audit(ours: Services) -> dict[str, Any]:
    standing, answers = ours.trail.standing, _answers(ours.trail)
    if standing == "online" and answers:
        return {"status": "pass"}
    if standing == "behind" and answers:
        return {"status": "warn", "output": "The head of the trail cannot be moved; the log says why."}
    away = f"The audit database does not {'take rows' if answers else 'answer'}"
    if standing == "refusing":
        return {"status": "fail", "output": f"{away} and the reserve takes no more: nothing is handed out."}
    return {"status": "warn", "output": f"{away}; entries go to the reserve."}


def _answers(trail: Trail) -> bool:
    try:
        trail.search(limit=1)
    except DatabaseUnavailable:
        return False
    return True
