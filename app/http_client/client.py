"""One request, step by step: resolve, connect, TLS, headers, the caller's last check, body, answer."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json as json_codec
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from urllib3 import HTTPHeaderDict
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, IncompleteRead, ProtocolError, ReadTimeoutError
from urllib3.response import BaseHTTPResponse

from app.clock import Clock
from app.http_client.destinations import Address, Destinations, NotAllowed, Purpose, Target
from app.http_client.watchdog import Watch, Watchdog
from app.secret import Secret
from app.telemetry import metrics

__all__ = ["Abandoned", "Answer", "Deadlines", "HttpClient", "NotSent", "Resolver", "Unfinished", "WireFault"]

Resolver = Callable[[str], Sequence[str]]
"""Turns a host name into addresses; raises OSError when there are none."""

_MOST_BYTES: Final = 1_000_000
_READ_SIZE: Final = 65_536
_MOST_LOOKUPS: Final = 32
"""Name look-ups that may hang at a time; each holds a thread until the system's resolver gives up."""

_INSTANCE_DOMAINS: Final = ("salesforce.com", "salesforce.mil")
_BODYLESS_STATUS: Final = frozenset({204, 304})


class WireFault(Exception):
    """A request brought no complete answer; `reason` is a short machine word and holds nothing of the
    request.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def code(self) -> str:
        """The same word under the name log fields use."""
        return self.reason


class NotSent(WireFault):
    """Certainly not done by the other side: it failed before the first byte of the body (of the head, if it
    has none).

    Reasons: bad_url, bad_request, loopback, not_https, host_not_allowed, address_not_allowed, dns, refused,
    unreachable, connect_timeout, tls, tls_untrusted, reset, deadline, abandoned.
    """


class Unfinished(WireFault):
    """Perhaps done by the other side: it failed after the first byte and before the end of the answer.

    Reasons: reset, no_answer, truncated, malformed, oversized, read_timeout, deadline.
    """


class Abandoned(Exception):
    """Raised by a `before_body` hook that does not want the request sent any more; it becomes
    NotSent("abandoned").
    """


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds: `connect` for name, TCP and TLS together, `read` between two pieces of the answer, `total`
    for all.
    """

    connect: float
    read: float
    total: float


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """A complete answer, whatever its status; redirects are answers too. `sent_at` is just before the first
    byte.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent_at: datetime

    def json(self) -> dict[str, Any] | None:
        """The body as a JSON object; None when it is anything else, broken or empty."""
        value = self.json_value()
        return value if isinstance(value, dict) else None

    def json_value(self) -> Any:
        """The body as any JSON value, such as the lists Salesforce reports errors in; None when it is not
        JSON.
        """
        try:
            return json_codec.loads(self.body)
        except (ValueError, RecursionError):
            return None

    def __repr__(self) -> str:
        return f"Answer({self.status}, {len(self.body)} bytes)"


class HttpClient:
    """Sends requests; safe for threads and after a fork.

    `provider_hosts` are hosts (https) or URLs whose origin PROVIDER requests may go to; `allow` adds more
    while it runs. `ca_file` replaces the trusted certificate authorities of the system. `resolve` replaces
    the system's resolver.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        allow_loopback: bool = False,
        provider_hosts: Iterable[str] = (),
        instance_domains: Sequence[str] = _INSTANCE_DOMAINS,
        ca_file: Path | None = None,
        resolve: Resolver | None = None,
        user_agent: str = "drawbridge",
    ) -> None:
        self._clock = clock
        self._destinations = Destinations(provider_hosts, instance_domains, allow_loopback=allow_loopback)
        self._watchdog = Watchdog(clock)
        self._names = _Names(resolve or _system_addresses)
        self._trust = _Trust(ca_file)
        self._user_agent = user_agent

    def allow(self, *providers: str) -> None:
        """Let PROVIDER requests go to these hosts or origins of URLs as well; ValueError when it is
        neither.
        """
        for provider in providers:
            self._destinations.add(provider)

    def send(
        self,
        method: str,
        url: str,
        *,
        purpose: Purpose,
        deadlines: Deadlines,
        form: Mapping[str, str | Secret] | None = None,
        json: object = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        basic: tuple[str, Secret] | None = None,
        bearer: Secret | None = None,
        before_body: Callable[[], None] | None = None,
        max_bytes: int = _MOST_BYTES,
    ) -> Answer:
        """Send one request over a connection of its own and return the complete answer.

        At most one of `form`, `json` and `body` makes the body; Secrets in the first two are revealed here.
        `basic` is sent as given: quoting its halves (RFC 6749 §2.3.1) is the caller's. `before_body` is
        called when everything but the body has left (without a body: when nothing but the TLS handshake
        has) and stops the request by raising Abandoned; any other exception of it passes through, and
        nothing was sent then either.

        Raises NotSent and Unfinished; neither text nor cause of them holds anything of the request.
        """
        began = self._clock.elapsed()
        outcome = "stopped"  # by an exception of the hook
        try:
            request = self._request(
                method,
                url,
                purpose=purpose,
                content=_content(form, json, body),
                headers=headers or {},
                authorization=_authorization(basic, bearer),
            )
            with self._watchdog.watch(deadlines.total) as watch:
                exchange = _Exchange(
                    self._clock,
                    self._names,
                    self._trust,
                    watch,
                    deadlines=deadlines,
                    destinations=self._destinations,
                )
                answer = exchange.run(request, before_body=before_body, max_bytes=max_bytes)
            outcome = f"{answer.status // 100}xx"
            return answer
        except WireFault as fault:
            outcome = fault.reason
            raise
        finally:
            metrics.outgoing.labels(purpose.value, outcome).inc()
            metrics.outgoing_seconds.labels(purpose.value).observe(self._clock.elapsed() - began)

    def _request(
        self,
        method: str,
        url: str,
        *,
        purpose: Purpose,
        content: tuple[bytes, str | None],
        headers: Mapping[str, str],
        authorization: str | None,
    ) -> _Request:
        try:
            target = self._destinations.check(url, purpose)
        except NotAllowed as refusal:
            failure = NotSent(refusal.reason)
        else:
            body, kind = content
            head = HTTPHeaderDict(
                {"Host": target.authority, "User-Agent": self._user_agent, "Connection": "close"}
            )
            # No compression, so that the size of an answer is what it seems.
            head["Accept-Encoding"] = "identity"
            if kind is not None:
                head["Content-Type"] = kind
            for name, value in headers.items():
                head[name] = value
            if authorization is not None:
                head["Authorization"] = authorization
            if body or method not in ("GET", "DELETE"):
                head["Content-Length"] = str(len(body))
            return _Request(method, target, head, body)
        raise failure


@dataclass(frozen=True, slots=True, repr=False)
class _Request:
    method: str
    target: Target
    head: Mapping[str, str]
    content: bytes


class _Oversized(Exception):
    """The answer is longer than the caller takes."""


class _Exchange:
    """The life of one request; knows at every moment whether the first byte has left."""

    def __init__(
        self,
        clock: Clock,
        names: _Names,
        trust: _Trust,
        watch: Watch,
        *,
        deadlines: Deadlines,
        destinations: Destinations,
    ) -> None:
        self._clock = clock
        self._names = names
        self._trust = trust
        self._watch = watch
        self._deadlines = deadlines
        self._destinations = destinations
        self._sent_at: datetime | None = None
        self._socket: socket.socket | None = None
        self._before_body: Callable[[], None] | None = None
        self._hook_error: BaseException | None = None

    def run(self, request: _Request, *, before_body: Callable[[], None] | None, max_bytes: int) -> Answer:
        """Do all steps. Foreign exceptions end here: their texts quote URLs and headers, so none is kept as
        a cause.
        """
        self._before_body = before_body
        try:
            self._connect(request.target)
            return self._talk(request, max_bytes)
        except NotAllowed as refusal:
            failure: WireFault = NotSent(refusal.reason)
        except Abandoned:
            failure = NotSent("abandoned")
        except (OSError, ValueError, HTTPError, http.client.HTTPException, _Oversized) as error:
            if error is self._hook_error:
                raise
            failure = self._failure(error)
        finally:
            self._close()
        raise failure

    def _failure(self, error: Exception) -> WireFault:
        if self._sent_at is None:
            return NotSent("deadline" if self._watch.fired else _reason_before(error))
        return Unfinished("deadline" if self._watch.fired else _reason_after(error))

    def _close(self) -> None:
        self._watch.release()
        if self._socket is not None:
            self._socket.close()

    # -- before the first byte

    def _connect(self, target: Target) -> None:
        """Name, TCP, TLS: together within the connect deadline."""
        until = self._clock.elapsed() + min(self._deadlines.connect, self._watch.remaining())
        addresses = self._addresses(target, until)
        last: OSError | None = None
        for left in range(len(addresses), 0, -1):
            # A dead address must leave time for those after it.
            seconds = self._seconds_until(until) / left
            try:
                self._open(addresses[-left], target.port, seconds)
                last = None
                break
            except OSError as error:
                last = error
        if last is not None:
            raise last
        if target.scheme == "https":
            self._secure(target.host, until)

    def _addresses(self, target: Target, until: float) -> list[Address]:
        """All addresses of the name; one that is not allowed refuses the lot, for a name is no safer than
        its worst.
        """
        addresses = self._names.addresses(target.host, self._seconds_until(until))
        for address in addresses:
            # Checked here, connected to below: resolving again in between would let DNS change its answer.
            self._destinations.check_address(address, target)
        return addresses

    def _open(self, address: Address, port: int, seconds: float) -> None:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM)
        self._socket = sock
        try:
            self._watch.hold(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(seconds)
            sock.connect((str(address), port))
        except OSError:
            self._close()
            raise

    def _secure(self, host: str, until: float) -> None:
        assert self._socket is not None
        wrapped = self._trust.context().wrap_socket(
            self._socket, server_hostname=host, do_handshake_on_connect=False
        )
        self._socket = wrapped
        wrapped.settimeout(self._seconds_until(until))
        wrapped.do_handshake()

    def _seconds_until(self, until: float) -> float:
        """What is left of the connect deadline; raises when nothing is, for a time-out of 0 means not to
        block.
        """
        seconds = until - self._clock.elapsed()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    # -- from the first byte on

    def _talk(self, request: _Request, max_bytes: int) -> Answer:
        assert self._socket is not None
        connection = _Connection(
            request.target,
            self._socket,
            timeout=self._deadlines.read,
            at_flush=lambda: None if request.content else self._last_check(),
        )
        try:
            connection.request(
                request.method,
                request.target.path,
                body=self._body(request) if request.content else None,
                headers=request.head,
                preload_content=False,
                decode_content=True,
                enforce_content_length=True,
            )
        except ConnectionError:
            if self._sent_at is None or self._watch.fired:
                raise
            # A server may answer and close before it has read all: the answer is what counts.
        return self._answer(connection.getresponse(), max_bytes)

    def _body(self, request: _Request) -> Iterator[bytes]:
        """The body, written when urllib3 asks for it, which is when the head has left."""
        self._last_check()
        assert self._socket is not None
        try:
            accepted = self._socket.send(request.content)
        except ConnectionError:
            if not isinstance(self._socket, ssl.SSLSocket):
                # The kernel took nothing. TLS cannot say that: part of a record may have left.
                self._sent_at = None
            raise
        yield request.content[accepted:]

    def _last_check(self) -> None:
        """Ask the caller and the clock once more; after this the next byte counts as sent."""
        if self._before_body is not None:
            try:
                self._before_body()
            except BaseException as error:
                self._hook_error = error
                raise
        if self._watch.look():
            raise TimeoutError
        self._sent_at = self._clock.now()

    def _answer(self, response: BaseHTTPResponse, most: int) -> Answer:
        body = bytearray()
        if _announced(response) > most:
            raise _Oversized
        while piece := response.read(min(_READ_SIZE, most + 1 - len(body))):
            body += piece
            if len(body) > most:
                raise _Oversized
        if self._watch.fired and _ends_with_connection(response):
            raise TimeoutError  # the end that was read is the one the watchdog made
        assert self._sent_at is not None
        return Answer(response.status, response.headers, bytes(body), self._sent_at)


class _Connection(HTTPConnection):
    """Writes a request to a socket that is already connected; calls `at_flush` just before the head
    leaves.
    """

    def __init__(
        self, target: Target, sock: socket.socket, *, timeout: float, at_flush: Callable[[], None]
    ) -> None:
        super().__init__(target.host, target.port, timeout=timeout)
        self.auto_open = 0  # connecting was done before, or not at all
        self.response_class = _WholeHead
        self.sock = sock
        self._at_flush = at_flush

    def endheaders(self, message_body: Any = None, *, encode_chunked: bool = False) -> None:
        self._at_flush()
        super().endheaders(message_body, encode_chunked=encode_chunked)


class _WholeHead(http.client.HTTPResponse):
    """An answer whose head must end with its empty line; http.client takes the end of the connection for
    that line.
    """

    def begin(self) -> None:
        stream = self.fp
        lines = _Lines(stream)
        this: Any = self
        this.fp = lines  # begin() reads lines and may close, nothing else
        super().begin()
        if this.fp is lines:
            this.fp = stream
        if lines.last not in (b"\r\n", b"\n"):
            raise http.client.IncompleteRead(b"")


class _Lines:
    """A stream that remembers the last line read from it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.last = b""

    def readline(self, limit: int = -1) -> bytes:
        self.last = self._stream.readline(limit)
        return self.last

    def close(self) -> None:
        self._stream.close()

    def flush(self) -> None:
        self._stream.flush()


class _Names:
    """Looks names up with a deadline, which the system's resolver does not have."""

    def __init__(self, resolve: Resolver) -> None:
        self._resolve = resolve
        self._threads: list[threading.Thread] = []

    def addresses(self, host: str, seconds: float) -> list[Address]:
        """The addresses of a name or literal. Raises OSError when there are none, TimeoutError when it
        takes too long.
        """
        try:
            return [ipaddress.ip_address(host)]
        except ValueError:
            pass
        # A thread of a parent process does not count: after a fork it is not alive.
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= _MOST_LOOKUPS:
            raise socket.gaierror(socket.EAI_AGAIN)
        lookup = _Lookup(self._resolve, host)
        self._threads.append(lookup.start())
        return lookup.result(seconds)


class _Lookup:
    """One look-up in a thread of its own; left behind when it hangs."""

    def __init__(self, resolve: Resolver, host: str) -> None:
        self._resolve = resolve
        self._host = host
        self._done = threading.Event()
        self._addresses: list[Address] | None = None

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="http-lookup", daemon=True)
        thread.start()
        return thread

    def result(self, seconds: float) -> list[Address]:
        if not self._done.wait(seconds):
            raise socket.gaierror(socket.EAI_AGAIN)
        if not self._addresses:
            raise socket.gaierror(socket.EAI_NONAME)
        return self._addresses

    def _run(self) -> None:
        try:
            found = dict.fromkeys(self._resolve(self._host))
            self._addresses = [ipaddress.ip_address(address) for address in found]
        except (OSError, ValueError):
            self._addresses = None
        finally:
            self._done.set()


def _system_addresses(host: str) -> Sequence[str]:
    name = "localhost" if host.endswith(".localhost") else host  # RFC 6761 §6.3
    return [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]


class _Trust:
    """The certificate authorities that are believed, read once when the first https request is made."""

    def __init__(self, ca_file: Path | None) -> None:
        self._ca_file = ca_file
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        if self._context is None:
            with self._lock:
                if self._context is None:
                    self._context = _context(self._ca_file)
        return self._context


def _context(ca_file: Path | None) -> ssl.SSLContext:
    """Names and certificates verified, TLS 1.2 at least, HTTP/1.1 only."""
    context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    if ca_file is None and not _system_has_authorities():
        import certifi

        context.load_verify_locations(certifi.where())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _system_has_authorities() -> bool:
    """A slim container image has the directory for them, but nothing in it."""
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile) or (bool(paths.capath) and any(Path(paths.capath).iterdir()))


def _content(
    form: Mapping[str, str | Secret] | None, json: object, body: bytes | None
) -> tuple[bytes, str | None]:
    if sum(part is not None for part in (form, json, body)) > 1:
        raise TypeError("a request has one body")
    if form is not None:
        pairs = [(name, _clear(value)) for name, value in form.items()]
        return urlencode(pairs).encode(), "application/x-www-form-urlencoded"
    if json is not None:
        text = json_codec.dumps(json, default=_clear, separators=(",", ":"))
        return text.encode(), "application/json"
    return body or b"", None


def _clear(value: object) -> str:
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _authorization(basic: tuple[str, Secret] | None, bearer: Secret | None) -> str | None:
    if basic is not None and bearer is not None:
        raise TypeError("a request has one Authorization")
    if basic is not None:
        pair = f"{basic[0]}:{basic[1].reveal()}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"
    return None if bearer is None else f"Bearer {bearer.reveal()}"


def _announced(response: BaseHTTPResponse) -> int:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else 0


def _ends_with_connection(response: BaseHTTPResponse) -> bool:
    """Whether nothing but the end of the connection marks the end of the body (RFC 9112 §6.3)."""
    headers = response.headers
    framed = "content-length" in headers or "chunked" in headers.get("Transfer-Encoding", "").lower()
    return not framed and response.status not in _BODYLESS_STATUS


def _reason_before(error: Exception) -> str:
    match error:
        case socket.gaierror():
            return "dns"
        case ssl.SSLCertVerificationError():
            return "tls_untrusted"
        case TimeoutError():
            return "connect_timeout"
        case ssl.SSLError():
            return "tls"
        case ConnectionRefusedError():
            return "refused"
        case ConnectionError():
            return "reset"
        case OSError():
            return "unreachable"
    return "bad_request"


def _reason_after(error: Exception) -> str:
    match error:
        case _Oversized():
            return "oversized"
        case ReadTimeoutError() | TimeoutError():
            return "read_timeout"
        case http.client.RemoteDisconnected():
            return "no_answer"
        case http.client.IncompleteRead() | IncompleteRead():
            return "truncated"
        case ProtocolError():
            return "truncated" if _is_cut(error) else "reset"
        case OSError():
            return "reset"
    return "malformed"


def _is_cut(error: ProtocolError) -> bool:
    return any(isinstance(part, http.client.IncompleteRead | IncompleteRead) for part in error.args)
