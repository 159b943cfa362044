"""One door for every request: count it, let faults strike, let the vendor work, damage the answer as asked.

The order is fixed: waiting and answering faults marked `before` come first and leave the request unprocessed;
then the vendor works; then faults marked `after` spoil an answer whose effects have already happened.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

from flask import Response, g, request

from emulator.faults import Fault
from emulator.ledger import TokenRequest
from emulator.vendor import RefusedError, Vendor

# Long enough for any client's deadline; a hang without `delay` ends when it is released or the server stops.
LONGEST_HANG = 3600.0
OVERSIZED_DEFAULT = 8 * 1024 * 1024
CHUNK = 64 * 1024

View = TypeVar("View", bound=Callable[..., Response])


def staged(vendor: Vendor, endpoint: str) -> Callable[[View], View]:
    """Decorate a view so that it runs on the stage of `endpoint`."""

    def decorate(view: View) -> View:
        @wraps(view)
        def run(*args: Any, **kwargs: Any) -> Response:
            return _perform(vendor, endpoint, work=lambda: view(*args, **kwargs))

        return run  # type: ignore[return-value]  # same signature as `view`

    return decorate


def _perform(vendor: Vendor, endpoint: str, *, work: Callable[[], Response]) -> Response:
    subject = vendor.subject(endpoint)
    vendor.ledger.count(endpoint)
    faults = vendor.faults.take(endpoint, subject)
    g.faults = faults
    entry = vendor.ledger.begin(request.path, subject) if endpoint == "token" else None
    g.entry = entry
    if entry is not None:
        entry.faults = [fault.kind for fault in faults]
    response: Response | None = None
    try:
        response = _act(vendor, endpoint, subject=subject, faults=faults, work=work)
    finally:
        if entry is not None:
            answered = response is not None and not getattr(g, "dropped", False)
            vendor.ledger.end(entry, response.status_code if answered and response is not None else None)
    return response


def _act(
    vendor: Vendor,
    endpoint: str,
    *,
    subject: dict[str, str | None],
    faults: list[Fault],
    work: Callable[[], Response],
) -> Response:
    before = [fault for fault in faults if fault.moment == "before"]
    verdict = next((fault for fault in before if fault.answers), None)
    if verdict is not None:
        _linger(before)
        _mark(f"fault:{verdict.kind}")
        return _answer(vendor, verdict, response=None)
    response = _process(vendor, endpoint, subject=subject, before=before, work=work)
    for fault in faults:
        if fault.moment == "after":
            response = _spoil(vendor, fault, response=response)
    return response


def _process(
    vendor: Vendor,
    endpoint: str,
    *,
    subject: dict[str, str | None],
    before: list[Fault],
    work: Callable[[], Response],
) -> Response:
    try:
        with vendor.processing(endpoint, subject):
            if g.entry is not None:
                g.entry.outcome = "processing"
            # Slow work happens inside, so that a second request meets the first one still in hand.
            _linger(before)
            response = work()
            _mark("granted" if response.status_code < 400 else "refused")
    except RefusedError as refused:
        _mark(refused.name)
        response = vendor.problem(refused.name, refused.detail)
    return response


def _mark(outcome: str) -> None:
    entry: TokenRequest | None = g.entry
    if entry is not None:
        entry.outcome = outcome
        entry.processed = not outcome.startswith("fault:")


def _linger(faults: list[Fault]) -> None:
    for fault in faults:
        if fault.kind == "latency":
            fault.released.wait(float(fault.options.get("delay", 1.0)))


def _spoil(vendor: Vendor, fault: Fault, *, response: Response) -> Response:
    if fault.kind == "latency":
        _linger([fault])
        return response
    return _answer(vendor, fault, response=response)


def _answer(vendor: Vendor, fault: Fault, *, response: Response | None) -> Response:
    options = fault.options
    whole = response if response is not None else json_response({"status": "ok"})
    match fault.kind:
        case "status":
            return _plain_status(options)
        case "html":
            return Response(HTML_PAGE, int(options.get("status", 503)), mimetype="text/html")
        case "redirect":
            return _redirect(vendor, options)
        case "error":
            return vendor.problem(str(options["error"]), options.get("description"))
        case "drop":
            return _drop()
        case "hang":
            fault.released.wait(float(options.get("delay", LONGEST_HANG)))
            return _drop()
        case "truncated":
            return _truncate(whole, str(options.get("mode", "length")))
        case "no_access_token":
            return edited(whole, set_fields={}, omit=["access_token"])
        case "edit":
            return edited(whole, set_fields=options.get("set", {}), omit=options.get("omit", []))
        case "inactive":
            return json_response({"active": False})
        case "drip":
            return _drip(whole, fault)
        case "oversized":
            return _inflate(whole, int(options.get("size", OVERSIZED_DEFAULT)))
    raise AssertionError(f"no answer for {fault.kind}")


HTML_PAGE = """<!DOCTYPE html>
<html><head><title>Temporarily unavailable</title></head>
<body><h1>We are down for maintenance</h1><p>Please come back later.</p></body></html>
"""


def json_response(data: Any, status: int = 200) -> Response:
    """Answer with JSON that no cache may keep (RFC 6749 section 5.1)."""
    response = Response(json.dumps(data), status, mimetype="application/json")
    response.headers["Cache-Control"] = "no-store"
    response.headers["Pragma"] = "no-cache"
    return response


def edited(response: Response, *, set_fields: dict[str, Any], omit: list[str]) -> Response:
    """Return the JSON answer with fields changed or left out; another body is returned as it is."""
    data = response.get_json(silent=True)
    if not isinstance(data, dict):
        return response
    kept = {name: value for name, value in data.items() if name not in omit}
    return json_response({**kept, **set_fields}, response.status_code)


def _plain_status(options: dict[str, Any]) -> Response:
    status = int(options.get("status", 500))
    body = options.get("body", {"status": "error", "message": f"emulated {status}"})
    response = json_response(body, status) if not isinstance(body, str) else Response(body, status)
    for name, value in options.get("headers", {}).items():
        response.headers[name] = str(value)
    if options.get("retry_after") is not None:
        response.headers["Retry-After"] = str(options["retry_after"])
    return response


def _redirect(vendor: Vendor, options: dict[str, Any]) -> Response:
    response = Response("", int(options.get("status", 302)))
    response.headers["Location"] = str(options.get("location", f"{vendor.url}/elsewhere"))
    return response


def _drop() -> Response:
    """Close the connection under the server's feet; what it writes afterwards goes nowhere."""
    g.dropped = True
    connection: socket.socket = request.environ["werkzeug.socket"]
    # A client that gave up first has closed its end, and then there is nothing left to shut.
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    return Response("")


def _truncate(response: Response, mode: str) -> Response:
    body = response.get_data()
    cut = Response(body[: len(body) // 2], response.status_code, mimetype=response.mimetype)
    if mode == "length":
        cut.headers["Content-Length"] = str(len(body))
    return cut


def _drip(response: Response, fault: Fault) -> Response:
    body = response.get_data()
    pause = float(fault.options.get("delay", 5.0)) / max(1, len(body))

    def pour() -> Iterator[bytes]:
        for index in range(len(body)):
            yield body[index : index + 1]
            if not fault.released.is_set():
                time.sleep(pause)

    dripping = Response(pour(), response.status_code, mimetype=response.mimetype)
    dripping.headers["Content-Length"] = str(len(body))
    return dripping


def _inflate(response: Response, size: int) -> Response:
    body = response.get_data().rstrip()
    head = body[:-1] + b', "padding": "'

    def pour() -> Iterator[bytes]:
        yield head
        for start in range(0, size, CHUNK):
            yield b"x" * min(CHUNK, size - start)
        yield b'"}'

    swollen = Response(pour(), response.status_code, mimetype=response.mimetype)
    swollen.headers["Content-Length"] = str(len(head) + size + 2)
    return swollen
