"""gunicorn's threaded worker with an express lane: token requests that arrive together are answered together.

gthread gives each request a thread, and each thread would wait by itself for the audit row to reach the disk. Blocking,
waking and queueing for the interpreter cost more than all the rest of a hand-out. So what the poller finds readable at one
moment goes to one thread: it reads the requests, decides them, waits once for all their records, and answers.

    readable ─► whole GET of a token, on a kept connection? ─► known in this process? ─► record all ─► answer all
                        └──────────── no ────────────┴─────── no ──────┴────── no ─────┴─► gthread's own way

Nothing in the lane waits for a client, a provider or, but for the record, a database: what is not complete, not remembered
or not allowed is put back unread for gthread. Other applications are served by gthread alone.

Decision: this leans on the insides of gunicorn's worker (`enqueue_req`, `finish_request`, the parser's `unreader`), which
may change with any release; `tests/flows/test_express_worker.py` holds them to what is used here.
"""

from __future__ import annotations

import re
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from gunicorn import SERVER, util
from gunicorn.http.errors import (
    ExpectationFailed,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.workers.gthread import TConn, ThreadWorker

from app.telemetry import Event, log
from app.web.problems import MEDIA_TYPE, unreadable
from app.web.tokens import EXPRESS

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from app.broker.issue import Ready
    from app.web.tokens import Express

__all__ = ["ExpressWorker"]

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
        self._closing: dict[socket.socket, float] = {}  # when we wait no longer for the client to close, too

    def load_wsgi(self) -> None:
        """Load the application and open the lane if it has one and gunicorn is not asked to log each request."""
        super().load_wsgi()
        self._ours = EXPRESS in getattr(self.wsgi, "extensions", {})
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
        body = unreadable(status)
        head = _PROBLEM % (status, status.phrase.encode(), util.http_date().encode(), len(body))
        with suppress(OSError):  # whoever sent this may be gone already
            util.write_nonblock(client, head + body)

    # In the thread that polls

    def enqueue_req(self, conn: TConn) -> None:
        """Take what may be a token request aside; the rest goes to the pool."""
        conn.close = partial(self._close, conn)
        kept = conn.initialized and not conn.is_http2 and not conn.parser.unreader.buf.getvalue()
        if kept and self.alive and self._is_open():
            self._readable.append(conn)
        else:
            super().enqueue_req(conn)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Dispatch events and send those that are readable down the lane together."""
        super().wait_for_and_dispatch_events(timeout)
        now = time.monotonic()
        for sock in [sock for sock, until in self._closing.items() if until <= now]:
            self._end(sock)
        if self._readable:
            self._lane.put(self._readable)
            self._readable = []
        if not self._is_open():
            with suppress(Empty):  # what is not for the lane must not wait with it
                while True:
                    for conn in self._lane.get_nowait():
                        super().enqueue_req(conn)

    def _is_open(self) -> bool:
        """Whether the lane moves: its thread lives and is not held up by a slow disk."""
        if self._thread is None or not self._thread.is_alive():
            return False
        since = self._recording_since
        return since is None or time.monotonic() - since < _HELD_UP

    def _back(self, answered: Sequence[TConn], broken: Sequence[TConn], others: Sequence[TConn]) -> None:
        for conn in answered:
            self.finish_request(conn, _KEEP)
        for conn in broken:
            self.finish_request(conn, _CLOSE)
        for conn in others:
            super().enqueue_req(conn)

    def _close(self, conn: TConn, *, graceful: bool = False) -> None:
        """Close a connection without making the others wait.

        In good order means to wait for the client's own end (RFC 9112, 9.6), and gthread waits in the thread that polls: two
        seconds in which a client that does not close keeps everybody else from being heard.
        """
        if not graceful or not self.alive or self.cfg.is_ssl or len(self._closing) >= self.worker_connections:
            TConn.close(conn, graceful=graceful and not self.alive)
            return
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
            self.poller.register(conn.sock, selectors.EVENT_READ, self._drain)
        except OSError:
            conn.sock.close()
            return
        self._closing[conn.sock] = time.monotonic() + _LINGER

    def _drain(self, sock: socket.socket) -> None:
        """Read what still comes, so that the answer is not cut off by a reset; the end of it is the client's end."""
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
        head = _HEAD % util.http_date().encode()
        for one, answer in zip(asked, self._finish(asked), strict=True):
            if answer is None:
                one.put_back()
                again.append(one.conn)
                continue
            rest = _send(one.conn, b"%b%b\r\n%b" % (head, *answer))
            if rest:
                self._send_later(one.conn, rest)
            else:
                (broken if rest is None else answered).append(one.conn)
        self._give_back(answered, broken, again)

    def _give_back(
        self, answered: Sequence[TConn] = (), broken: Sequence[TConn] = (), others: Sequence[TConn] = ()
    ) -> None:
        for conn in (*answered, *broken, *others):
            del self._in_hand[conn]
        self.method_queue.defer(self._back, answered, broken, others)

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

    def _send_later(self, conn: TConn, rest: bytes) -> None:
        """Leave a client that does not read its answers to a thread of the pool."""
        future = self.tpool.submit(_send_rest, conn, rest)
        del self._in_hand[conn]
        future.add_done_callback(lambda done: self.method_queue.defer(self.finish_request, conn, done))


def _is_token_request(raw: bytes) -> bool:
    return raw.find(_END) == len(raw) - len(_END) and _REQUEST.match(raw) is not None


def _send(conn: TConn, data: bytes) -> bytes | None:
    """What could not be sent without waiting for the client; None when it is gone."""
    try:
        return data[conn.sock.send(data) :]
    except BlockingIOError:
        return data
    except OSError:
        return None


def _send_rest(conn: TConn, rest: bytes) -> bool:
    conn.sock.setblocking(True)
    conn.sock.sendall(rest)
    return True
