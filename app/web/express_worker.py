"""gunicorn's threaded worker with an express lane: token requests that arrive together are answered together.

gthread gives each request a thread, and each thread would wait by itself for the audit row to reach the disk. Blocking,
waking and queueing for the interpreter cost more than all the rest of a hand-out. So what the poller finds readable at one
moment goes to one thread: it reads the requests, decides them, waits once for all their records, and answers.

    readable ─► whole GET of a token, on a kept connection? ─► known in this process? ─► record all ─► answer all
                        └──────────── no ────────────┴─────── no ──────┴────── no ─────┴─► gthread's own way

Nothing in the lane waits for a client, a provider or, but for the record, a database: what is not complete, not remembered
or not allowed is put back unread for gthread. Other applications are served by gthread alone.

Nor does a thread of gthread's ever wait for a client of ours, else as many slow clients as there are threads would stop the
installation. The thread that polls gathers each request to its end and sends what a client does not take at once:

    accepted or kept ─► gathering ──whole──► a thread ─► answer ──taken──► kept, or closed
                            └─ ARRIVAL_SECONDS ─► 408      └──not yet──► sending ── ANSWER_SECONDS ─► closed

All that waits is counted: connections against the open files, bytes against `_MOST_HELD`; when there are too many, who has
waited longest goes. What ends a connection is told by the end of the connection, or by a problem as far as one can be read.

Decision: this leans on the insides of gunicorn's worker (`enqueue_req`, `finish_request`, the parser's `unreader`), which
may change with any release; `tests/flows/test_express_worker.py` and `test_slow_clients.py` hold them to what is used here.
With TLS, cleartext HTTP/2 or the PROXY protocol switched on in gunicorn itself, bytes are no requests yet; gthread waits.
"""

from __future__ import annotations

import errno
import re
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from gunicorn import SERVER, http, util
from gunicorn.http.errors import (
    ExpectationFailed,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.http.unreader import Unreader
from gunicorn.workers.gthread import TConn, ThreadWorker

from app.telemetry import Event, log
from app.web.arrival import Arrival
from app.web.problems import MEDIA_TYPE, unreadable
from app.web.tokens import EXPRESS

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from app.broker.issue import Ready
    from app.web.tokens import Express

__all__ = ["ANSWER_SECONDS", "ARRIVAL_SECONDS", "STOPPING_SECONDS", "WINDING_UP_SECONDS", "ExpressWorker"]

ARRIVAL_SECONDS: Final = (
    10.0  # from the accepted connection, or the first byte on a kept one, to the request's last byte
)
ANSWER_SECONDS: Final = 30.0  # for a client to take an answer that did not leave at once
STOPPING_SECONDS: Final = 5.0  # both, once the process was asked to stop
WINDING_UP_SECONDS: Final = (
    10  # of gunicorn's graceful_timeout that are not for requests but for ending in good order
)

_REQUEST: Final = re.compile(rb"GET /v1/connections/[^/? ]+/token(\?[^ ]*)? HTTP/1\.1\r\n")
_END: Final = b"\r\n\r\n"
_BODY: Final = frozenset({"CONTENT-LENGTH", "TRANSFER-ENCODING"})
_HEAD: Final = f"HTTP/1.1 200 OK\r\nServer: {SERVER}\r\nDate: %b\r\nConnection: keep-alive\r\n".encode()
_PROBLEM: Final = (
    f"HTTP/1.1 %d %b\r\nServer: {SERVER}\r\nDate: %b\r\nConnection: close\r\nContent-Type: {MEDIA_TYPE}\r\n"
    "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nContent-Length: %d\r\n\r\n"
).encode()
_UNREADABLE: Final = {
    LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG,
    LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    UnsupportedTransferCoding: HTTPStatus.NOT_IMPLEMENTED,
}
_HELD_UP: Final = 0.05  # seconds of one wait for the disk after which others go the usual way
_LINGER: Final = 2.0  # seconds for a client to close after us, as gunicorn has it
_LARGEST: Final = 16_384  # bytes of a request; gunicorn refuses longer fields
_TOGETHER: Final = 128  # requests answered at once
_MOST_HELD: Final = 16 * 2**20  # bytes of requests still coming and of answers not taken yet
_SURE_OF: Final = 1.0  # seconds a new connection has in any case, also when there are too many
_OTHER_FILES: Final = (
    200  # open files of everything but clients: databases, providers, journal, metrics, libraries
)
_MOST_FILES: Final = 65_536  # as many as are asked for where the limit is none
_SCARCE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# A connection that broke before it was taken; accept(2) reports that as its own failure.
_BROKEN: Final = frozenset(
    {
        *(errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED, errno.EPROTO, errno.ENOPROTOOPT, errno.EPERM),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EOPNOTSUPP),
    }
)
_BREATH: Final = 0.5  # seconds without accepting when files or memory are short
_TELL_AGAIN: Final = 60.0  # seconds between two words about the same
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_NOT_NOW: Final = socket.MSG_DONTWAIT


class _Asked:
    """One request in the lane, which can still be put back as if it had not been read."""

    __slots__ = ("_before", "_raw", "conn", "environ", "ready")

    def __init__(self, conn: TConn, raw: bytes) -> None:
        self.conn = conn
        self.environ: WSGIEnvironment = {}
        self.ready: Ready | None = None
        self._raw = raw
        self._before = conn.parser.mesg, conn.parser.req_count

    def parse(self) -> bool:
        """Read it with gunicorn's own parser; false for anything unusual."""
        self.conn.parser.unreader.unread(self._raw)
        try:
            request = next(self.conn.parser)
        except Exception:  # noqa: BLE001 - gthread reads it again, and answers what is wrong with it
            return False
        if request.should_close() or request._expected_100_continue:
            return False
        self.environ = {
            "REQUEST_METHOD": request.method,
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "REMOTE_ADDR": self.conn.client[0],
            "gunicorn.socket": self.conn.sock,
        }
        for field, value in request.headers:
            name = "HTTP_" + field.replace("-", "_")
            if name in self.environ or field in _BODY:
                return False
            self.environ[name] = value
        return True

    def put_back(self) -> None:
        """Leave the connection as it was before the request was read."""
        parser = self.conn.parser
        parser.mesg, parser.req_count = self._before
        parser.unreader.take_buffered()
        parser.unreader.unread(self._raw)


class _Ended:
    """What gthread expects of a finished request: whether its connection may be kept."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep

    def cancelled(self) -> bool:
        return False

    def result(self) -> bool:
        return self._keep


_KEEP: Final = _Ended(True)
_CLOSE: Final = _Ended(False)


class _Gathered(Unreader):  # type: ignore[misc]  # gunicorn has no types
    """What gthread's parser reads from: what has come and no more, so that it cannot wait."""

    def __init__(self) -> None:
        super().__init__()
        self.dry = False  # whether more was asked for: where the next request would begin is unknown then

    def chunk(self, size_hint: int | None = None) -> bytes:
        self.dry = True
        return b""


class _Outbox:
    """Stands for the socket while an answer is made, and keeps it together: it leaves as one, and without waiting."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def shutdown(self, how: int) -> None:
        """Send what there is of an answer that fails in the middle, before the end of it is told."""
        self.flush()
        self._sock.shutdown(how)

    def sendall(self, data: bytes) -> None:
        self._parts.append(data)

    def sendfile(self, file: Any, *, offset: int = 0, count: int | None = None) -> int:
        file.seek(offset)
        data = file.read(count)
        self.sendall(data)
        return len(data)

    def flush(self) -> bytes:
        """Send what the client takes at once; the rest is returned."""
        data = b"".join(self._parts)
        self._parts.clear()
        return _send_now(self._sock, data) if data else b""


class _Coming:
    """A connection whose next request is not whole yet."""

    __slots__ = ("arrival", "until")

    def __init__(self, arrival: Arrival, until: float) -> None:
        self.arrival = arrival
        self.until = until


class _Leaving:
    """A connection whose client has not taken all of its answer yet."""

    __slots__ = ("ended", "rest", "until")

    def __init__(self, rest: bytes, ended: Any, until: float) -> None:
        self.rest = memoryview(rest)
        self.ended = ended
        self.until = until


class ExpressWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """Serves an application of ours through its `Express` where it can, everything else like gthread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._readable: list[TConn] = []
        self._lane: SimpleQueue[list[TConn]] = SimpleQueue()
        self._express: Express | None = None
        self._thread: threading.Thread | None = None
        self._recording_since: float | None = None
        self._ours = False
        self._in_hand: dict[TConn, None] = {}  # connections the lane has taken and not given back
        # In each of these the first is the one whose time is up first: it goes by when they came, and they came in turn.
        self._closing: dict[socket.socket, float] = {}  # when we wait no longer for the client to close, too
        self._coming: dict[TConn, _Coming] = {}
        self._leaving: dict[TConn, _Leaving] = {}
        self._unsent: dict[TConn, bytes] = {}  # from a thread that made an answer to the one that polls
        self._held = 0  # bytes in `_coming` and `_leaving`
        self._gathers = False
        self._stop_by = float("inf")
        self._accept_again = 0.0
        self._told: dict[str, float] = {}

    def init_process(self) -> None:
        """Begin in the new process: with as many open files as it may have, and no more connections than they allow."""
        files = _raise_open_files()
        # The other half is for what their requests make us open: database, provider, file.
        self.worker_connections = max(1, min(self.cfg.worker_connections, (files - _OTHER_FILES) // 2))
        self.max_keepalived = self.worker_connections - self.cfg.threads
        super().init_process()

    def run(self) -> None:
        """Serve until asked to stop, and leave the rest of gunicorn's grace to what has to be done at the end.

        gunicorn gives the worker and whoever kills it the same seconds; then one client can keep the worker until it is
        killed, and what it knows is not written down.
        """
        self.cfg.set("graceful_timeout", max(1, self.cfg.graceful_timeout - WINDING_UP_SECONDS))
        super().run()
        self.tpool.shutdown(wait=False, cancel_futures=True)

    def load_wsgi(self) -> None:
        """Load the application and open the lane if it has one and gunicorn is not asked to log each request."""
        super().load_wsgi()
        self._ours = EXPRESS in getattr(self.wsgi, "extensions", {})
        raw = self.cfg.is_ssl or self.cfg.http2_cleartext != "off" or self.cfg.proxy_protocol != "off"
        self._gathers = self._ours and not raw and self.cfg.protocol == "http"
        if self.cfg.is_ssl or self.cfg.accesslog or self.cfg.max_requests:
            return
        self._express = getattr(self.wsgi, "extensions", {}).get(EXPRESS)
        if self._express is not None:
            self._thread = threading.Thread(target=self._serve, name="express", daemon=True)
            self._thread.start()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what cannot be read as a request with a problem like any other, and repeat nothing of it."""
        if not self._ours or not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        status = next(
            (status for kind, status in _UNREADABLE.items() if isinstance(exc, kind)), HTTPStatus.BAD_REQUEST
        )
        log(Event.REQUEST_UNREADABLE, status=int(status), reason=type(exc).__name__)
        with suppress(OSError):  # whoever sent this may be gone already
            _send_now(client, _problem(status))

    # In a thread of the pool

    def handle_request(self, req: Any, conn: TConn) -> Any:
        """Have a whole request answered; what the client does not take at once is left to the thread that polls."""
        if not self._gathers:
            return super().handle_request(req, conn)
        req._expected_100_continue = False  # the body is here, asked for where that was needed
        if conn.cut:
            req.force_close()
        sock = conn.sock
        conn.sock = outbox = _Outbox(sock)
        try:
            return super().handle_request(req, conn)
        finally:
            conn.sock = sock
            rest = outbox.flush()
            if rest:
                self._unsent[conn] = rest

    def _keepalive_after(self, conn: TConn, keepalive: bool) -> bool:
        kept = bool(super()._keepalive_after(conn, keepalive))
        return kept and not (self._gathers and conn.parser.unreader.dry)

    # In the thread that polls: connections

    def set_accept_enabled(self, enabled: bool) -> None:
        """Listen, or leave connections to wait in the system; also for a moment after it ran out of something."""
        if not enabled or time.monotonic() >= self._accept_again:
            super().set_accept_enabled(enabled)
        if not enabled and self.nr_conns >= self.worker_connections and self._may_tell("connections"):
            log(Event.ACCEPT_PAUSED, error="worker_connections", connections=self.nr_conns)

    def accept(self, listener: socket.socket) -> None:
        """Take a new connection. When there is no file or memory left for it, that is no reason to end."""
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in _SCARCE:
                self._hold_on(error)
            elif error.errno not in _BROKEN:
                raise
            return
        self.nr_conns += 1
        conn = TConn(self.cfg, sock, address, listener.getsockname())
        conn.close = partial(self._close, conn)
        if self._gathers:
            self._gather(conn)
        else:
            super().enqueue_req(conn)

    def _hold_on(self, error: OSError) -> None:
        self._accept_again = time.monotonic() + _BREATH
        self.set_accept_enabled(False)
        if self._may_tell("files"):
            log(Event.ACCEPT_PAUSED, error=errno.errorcode[error.errno or 0], connections=self.nr_conns)

    def _may_tell(self, what: str) -> bool:
        """Whether it is long since this was told: what clients can bring about at will must not fill the log."""
        now = time.monotonic()
        if now - self._told.get(what, float("-inf")) < _TELL_AGAIN:
            return False
        self._told[what] = now
        return True

    def enqueue_req(self, conn: TConn) -> None:
        """Take what may be a token request aside; the rest goes to the pool as soon as it is whole."""
        kept = conn.initialized and not conn.is_http2 and not conn.parser.unreader.buf.getvalue()
        if kept and self.alive and self._is_open():
            self._readable.append(conn)
        else:
            self._usual(conn)

    def finish_request(self, conn: TConn, fs: Any) -> None:
        """Go on with a connection whose request is answered, as soon as the client has taken the answer."""
        rest = self._unsent.pop(conn, None)
        if rest is None:
            super().finish_request(conn, fs)
        else:
            self._send_on(conn, rest, fs)

    def _usual(self, conn: TConn) -> None:
        if self._gathers:
            self._gather(conn)
        else:
            super().enqueue_req(conn)

    def _cap_keepalive(self, deadline: float) -> None:
        """Asked to stop: who has sent no whole request by then, or not taken an answer, does not hold up the end."""
        super()._cap_keepalive(deadline)
        self._stop_by = time.monotonic() + STOPPING_SECONDS
        for coming in self._coming.values():
            coming.until = min(coming.until, self._stop_by)
        for leaving in self._leaving.values():
            leaving.until = min(leaving.until, self._stop_by)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Dispatch events and send those that are readable down the lane together."""
        super().wait_for_and_dispatch_events(timeout)
        self._give_up(time.monotonic())
        if self._readable:
            self._lane.put(self._readable)
            self._readable = []
        if not self._is_open():
            with suppress(Empty):  # what is not for the lane must not wait with it
                while True:
                    for conn in self._lane.get_nowait():
                        self._usual(conn)

    def _is_open(self) -> bool:
        """Whether the lane moves: its thread lives and is not held up by a slow disk."""
        if self._thread is None or not self._thread.is_alive():
            return False
        since = self._recording_since
        return since is None or time.monotonic() - since < _HELD_UP

    def _back(
        self,
        answered: Sequence[TConn],
        broken: Sequence[TConn],
        others: Sequence[TConn],
        unsent: Sequence[tuple[TConn, bytes]] = (),
    ) -> None:
        finish = super().finish_request
        for conn in answered:
            finish(conn, _KEEP)
        for conn in broken:
            finish(conn, _CLOSE)
        for conn in others:
            self._usual(conn)
        for conn, rest in unsent:
            self._send_on(conn, rest, _KEEP)

    # In the thread that polls: requests that come and answers that go

    def _gather(self, conn: TConn) -> None:
        """Hand the next request on if it is there; else wait for it here, where that costs nobody anything."""
        arrival = Arrival()
        held = conn.parser.unreader.take_buffered() if conn.parser else b""
        whole = (bool(held) and arrival.add(held)) or self._receive(conn, arrival)
        if whole is None:
            self._coming[conn] = _Coming(arrival, min(time.monotonic() + ARRIVAL_SECONDS, self._stop_by))
            self._hold(len(arrival.raw))
            self._watch(conn, selectors.EVENT_READ, self._more)
        else:
            self._hand_on(conn, arrival, whole=whole)

    def _more(self, conn: TConn, _: object) -> None:
        coming = self._coming.get(conn)
        if coming is None:  # given up in this very round
            return
        before = len(coming.arrival.raw)
        whole = self._receive(conn, coming.arrival)
        self._hold(len(coming.arrival.raw) - before)
        if whole is not None and conn in self._coming:
            self._forget(conn)
            self._hand_on(conn, coming.arrival, whole=whole)

    def _receive(self, conn: TConn, arrival: Arrival) -> bool | None:
        """Read what is there; true for a whole request, false when the client sends no more, None to wait on."""
        try:
            data = conn.sock.recv(_LARGEST, _NOT_NOW)
        except BlockingIOError:
            data = None
        except OSError:
            arrival.raw.clear()
            return False
        if data is not None and (not data or arrival.add(data)):
            return bool(data)
        if arrival.expects:
            arrival.expects = False
            with suppress(OSError):  # reading finds the same, and knows what it means
                _send_now(conn.sock, _CONTINUE)
        return None

    def _hand_on(self, conn: TConn, arrival: Arrival, *, whole: bool) -> None:
        if arrival.refusal is not None:
            self._refuse(conn, arrival.refusal, reason="TooLarge")
        elif arrival.raw:  # also what is not whole and never will be: the parser finds that it ends too early
            conn.cut = arrival.cut or not whole
            if conn.parser is None:
                conn.parser = http.get_parser(self.cfg, (), conn.client)
                conn.parser.unreader = _Gathered()
                conn.initialized = True
            conn.parser.unreader.dry = False
            conn.parser.unreader.unread(bytes(arrival.raw))
            super().enqueue_req(conn)
        else:
            self._drop(conn)

    def _send_on(self, conn: TConn, rest: bytes, ended: Any) -> None:
        """Send the rest of an answer as fast as the client takes it."""
        self._leaving[conn] = _Leaving(rest, ended, min(time.monotonic() + ANSWER_SECONDS, self._stop_by))
        self._hold(len(rest))
        self._watch(conn, selectors.EVENT_WRITE, self._push)

    def _push(self, conn: TConn, _: object) -> None:
        leaving = self._leaving.get(conn)
        if leaving is None:
            return
        try:
            sent = conn.sock.send(leaving.rest, _NOT_NOW)
        except BlockingIOError:
            return
        except OSError:
            self._forget(conn)
            self._drop(conn)
            return
        leaving.rest = leaving.rest[sent:]
        self._held -= sent
        if not leaving.rest:
            self._forget(conn)
            super().finish_request(conn, leaving.ended)

    def _watch(self, conn: TConn, event: int, tell: Callable[[TConn, object], None]) -> None:
        if conn not in self._coming and conn not in self._leaving:
            return  # it was given up for the room its own bytes took
        try:
            self.poller.register(conn.sock, event, partial(tell, conn))
        except (OSError, ValueError, KeyError):
            self._forget(conn)
            self._drop(conn)

    def _forget(self, conn: TConn) -> None:
        coming, leaving = self._coming.pop(conn, None), self._leaving.pop(conn, None)
        self._held -= len(coming.arrival.raw) if coming else 0
        self._held -= len(leaving.rest) if leaving else 0
        with suppress(OSError, ValueError, KeyError):
            self.poller.unregister(conn.sock)

    def _hold(self, count: int) -> None:
        """Count bytes that wait; when they are too many, those go that have waited longest."""
        self._held += count
        while self._held > _MOST_HELD:
            late = next((conn for conn, coming in self._coming.items() if coming.arrival.raw), None)
            conn = late if late is not None else next(iter(self._leaving))
            self._forget(conn)
            self._drop(conn)

    def _give_up(self, now: float) -> None:
        """End what has waited long enough, and when there are too many connections, what has waited longest."""
        while self._closing and (first := next(iter(self._closing.items())))[1] <= now:
            self._end(first[0])
        while self._leaving and (oldest := next(iter(self._leaving.items())))[1].until <= now:
            self._forget(oldest[0])
            self._drop(oldest[0])
        while self._coming:
            conn, coming = next(iter(self._coming.items()))
            crowded = self.nr_conns >= self.worker_connections
            if coming.until > now + (ARRIVAL_SECONDS - _SURE_OF if crowded else 0):
                return
            self._forget(conn)
            if coming.arrival.raw and coming.until <= now:
                self._refuse(conn, HTTPStatus.REQUEST_TIMEOUT, reason="TooLate")
            else:
                self._drop(conn)

    def _refuse(self, conn: TConn, status: HTTPStatus, *, reason: str) -> None:
        if self._may_tell(reason):
            log(Event.REQUEST_UNREADABLE, status=int(status), reason=reason)
        with suppress(OSError):
            _send_now(conn.sock, _problem(status))
        self._drop(conn, graceful=True)

    def _drop(self, conn: TConn, *, graceful: bool = False) -> None:
        self.nr_conns -= 1
        conn.close(graceful=graceful)

    def _close(self, conn: TConn, *, graceful: bool = False) -> None:
        """Close a connection without making the others wait.

        In good order means to wait for the client's own end (RFC 9112, 9.6), and gthread waits in the thread that polls: two
        seconds in which a client that does not close keeps everybody else from being heard.
        """
        if not graceful or self.cfg.is_ssl:
            TConn.close(conn, graceful=graceful and not self.alive)
            return
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
            self.poller.register(conn.sock, selectors.EVENT_READ, self._drain)
        except (OSError, ValueError, KeyError):
            conn.sock.close()
            return
        self._closing[conn.sock] = time.monotonic() + _LINGER
        self.nr_conns += 1  # its file is still open

    def _drain(self, sock: socket.socket) -> None:
        """Read what still comes, so that the answer is not cut off by a reset; the end of it is the client's end."""
        if sock not in self._closing:
            return
        try:
            more = sock.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more:
            self._end(sock)

    def _end(self, sock: socket.socket) -> None:
        del self._closing[sock]
        self.nr_conns -= 1
        self.poller.unregister(sock)
        sock.close()

    # In the lane

    def _serve(self) -> None:
        waiting: list[TConn] = []
        while True:
            waiting += self._lane.get() if not waiting else []
            try:
                while len(waiting) < _TOGETHER:
                    waiting += self._lane.get_nowait()
            except Empty:
                pass
            some, waiting = waiting[:_TOGETHER], waiting[_TOGETHER:]
            try:
                self._answer(some)
            except Exception:
                self.log.exception("The express lane failed; the connections it had in hand are closed.")
                self.method_queue.defer(self._back, (), tuple(self._in_hand), ())

    def _answer(self, conns: Sequence[TConn]) -> None:
        self._in_hand = dict.fromkeys(conns)
        read = [(conn, self._read(conn)) for conn in conns]
        asked = [one for _, one in read if one is not None]
        others = [conn for conn, one in read if one is None]
        if others:
            self._give_back(others=others)  # before the wait for the disk, which is none of theirs
        if not asked:
            return
        again: list[TConn] = []
        answered: list[TConn] = []
        broken: list[TConn] = []
        unsent: list[tuple[TConn, bytes]] = []
        head = _HEAD % util.http_date().encode()
        for one, answer in zip(asked, self._finish(asked), strict=True):
            if answer is None:
                one.put_back()
                again.append(one.conn)
                continue
            rest = _send(one.conn, b"%b%b\r\n%b" % (head, *answer))
            if rest:
                unsent.append((one.conn, rest))
            else:
                (broken if rest is None else answered).append(one.conn)
        self._give_back(answered, broken, again, unsent)

    def _give_back(
        self,
        answered: Sequence[TConn] = (),
        broken: Sequence[TConn] = (),
        others: Sequence[TConn] = (),
        unsent: Sequence[tuple[TConn, bytes]] = (),
    ) -> None:
        for conn in (*answered, *broken, *others, *(conn for conn, _ in unsent)):
            del self._in_hand[conn]
        self.method_queue.defer(self._back, answered, broken, others, unsent)

    def _finish(self, asked: Sequence[_Asked]) -> Sequence[tuple[bytes, bytes] | None]:
        assert self._express is not None
        self._recording_since = time.monotonic()
        try:
            return self._express.finish([(one.environ, one.ready) for one in asked if one.ready])
        except Exception:
            self.log.exception("The express lane failed; its requests go the usual way.")
            return [None] * len(asked)
        finally:
            self._recording_since = None

    def _read(self, conn: TConn) -> _Asked | None:
        """The request if it is one for the lane; else its bytes are back where gthread will find them."""
        try:
            raw = conn.sock.recv(_LARGEST)
        except OSError:  # gthread finds the same, and knows what it means
            return None
        if not raw:
            return None
        asked = _Asked(conn, raw)
        # Behind a stopping or crowded worker a connection is to be closed: gthread's own way does that.
        if self._may_keep() and _is_token_request(raw) and isinstance(conn.client, tuple) and asked.parse():
            asked.ready = self._begin(asked)
            if asked.ready is not None:
                self.nr += 1
                return asked
        asked.put_back()
        return None

    def _begin(self, asked: _Asked) -> Ready | None:
        assert self._express is not None
        try:
            return self._express.begin(asked.environ)
        except Exception:
            self.log.exception("The express lane failed; the request goes the usual way.")
            return None

    def _may_keep(self) -> bool:
        return bool(self.alive and self.cfg.keepalive and len(self.keepalived_conns) < self.max_keepalived)


def _is_token_request(raw: bytes) -> bool:
    return raw.find(_END) == len(raw) - len(_END) and _REQUEST.match(raw) is not None


def _send(conn: TConn, data: bytes) -> bytes | None:
    """What could not be sent without waiting for the client; None when it is gone."""
    try:
        return _send_now(conn.sock, data)
    except OSError:
        return None


def _send_now(sock: socket.socket, data: bytes) -> bytes:
    """What could not be sent without waiting for the client; raises OSError when it is gone."""
    try:
        return data[sock.send(data, _NOT_NOW) :]
    except BlockingIOError:
        return data


def _problem(status: HTTPStatus) -> bytes:
    body = unreadable(status)
    return _PROBLEM % (status, status.phrase.encode(), util.http_date().encode(), len(body)) + body


def _raise_open_files() -> int:
    """Have this process open as many files as it may without asking anybody; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = _MOST_FILES if hard == unlimited else min(hard, _MOST_FILES)
    if soft == unlimited or soft >= most:
        return _MOST_FILES if soft == unlimited else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
