"""Outgoing HTTP over real sockets: deadlines, what counts as sent, and where requests may go."""

import ipaddress
import os
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.clock import Clock
from app.http_client import Abandoned, Answer, Deadlines, HttpClient, NotSent, Purpose, Unfinished
from app.http_client.destinations import Destinations, NotAllowed
from app.secret import Secret
from tests.contract.raw_server import (
    Identity,
    RawServer,
    answer,
    make_identity,
    read_head,
    read_request,
    serving,
)

LONG = Deadlines(connect=5.0, read=5.0, total=5.0)
SECRET = "na1-5ecret00-1111-2222-3333-444455556666"


def client_for(server: RawServer, **options: object) -> HttpClient:
    return HttpClient(Clock(), allow_loopback=True, provider_hosts=[server.url], **options)  # type: ignore[arg-type]


def post(client: HttpClient, server: RawServer, *, deadlines: Deadlines = LONG, **options: object) -> Answer:
    return client.send(  # type: ignore[call-overload,no-any-return]
        "POST",
        f"{server.url}/oauth/token?hapikey={SECRET}",
        purpose=Purpose.PROVIDER,
        deadlines=deadlines,
        form={"grant_type": "refresh_token", "refresh_token": Secret(SECRET)},
        **options,
    )


def get(client: HttpClient, server: RawServer, *, deadlines: Deadlines = LONG, **options: object) -> Answer:
    return client.send(  # type: ignore[arg-type]
        "GET", f"{server.url}/thing", purpose=Purpose.PROVIDER, deadlines=deadlines, **options
    )


# -- what is sent and what comes back


def test_a_form_is_sent_with_its_secrets_and_the_answer_comes_back_whole() -> None:
    """Secrets are revealed in the body, Basic credentials as given, and the JSON object is read."""
    seen: list[bytes] = []

    def behave(server: RawServer, connection: socket.socket) -> None:
        seen.extend(read_request(connection))
        connection.sendall(answer(b'{"access_token":"a"}', headers="X-Thing: 1\r\n"))

    with serving(behave) as server:
        before = datetime.now(UTC)
        got = post(client_for(server), server, basic=("id", Secret("pass:word")))
        after = datetime.now(UTC)
    head, body = seen
    assert got.status == 200
    assert got.json() == {"access_token": "a"}
    assert got.headers["x-thing"] == "1"
    assert before <= got.sent_at <= after
    assert body == f"grant_type=refresh_token&refresh_token={SECRET}".encode()
    assert b"Authorization: Basic aWQ6cGFzczp3b3Jk\r\n" in head
    assert b"Content-Type: application/x-www-form-urlencoded\r\n" in head
    assert f"Host: 127.0.0.1:{server.port}\r\n".encode() in head
    assert repr(got) == "Answer(200, 20 bytes)"


def test_json_bearer_and_a_body_of_bytes_are_sent_as_they_are() -> None:
    """Each of the other ways to give a body arrives byte for byte."""
    seen: list[tuple[bytes, bytes]] = []

    def behave(server: RawServer, connection: socket.socket) -> None:
        seen.append(read_request(connection))
        connection.sendall(answer(b"[1]"))

    with serving(behave) as server:
        client = client_for(server)
        url = f"{server.url}/x"
        first = client.send(
            "PATCH",
            url,
            purpose=Purpose.PROVIDER,
            deadlines=LONG,
            json={"a": Secret("s")},
            bearer=Secret("token"),
        )
        client.send(
            "POST",
            url,
            purpose=Purpose.PROVIDER,
            deadlines=LONG,
            body=b"\x00raw",
            headers={"Content-Type": "a/b"},
        )
        client.send("DELETE", url, purpose=Purpose.PROVIDER, deadlines=LONG)
        client.send("POST", url, purpose=Purpose.PROVIDER, deadlines=LONG)
    assert first.json() is None
    assert first.json_value() == [1]
    assert seen[0][1] == b'{"a":"s"}'
    assert b"Authorization: Bearer token\r\n" in seen[0][0]
    assert seen[1][1] == b"\x00raw"
    assert seen[1][0].count(b"Content-Type: a/b\r\n") == 1
    assert b"Content-Length" not in seen[2][0]
    assert b"Content-Length: 0\r\n" in seen[3][0]


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'"text"', b"\xff\xfe", b"[" * 200_000])
def test_an_answer_that_is_no_json_object_reads_as_none(body: bytes) -> None:
    """A gateway's HTML page must not blow up the reader."""
    got = Answer(200, {}, body, datetime.now(UTC))
    assert got.json() is None


def test_a_redirect_is_an_answer() -> None:
    """A token must not travel to wherever a Location points."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer(b"", status="307 Go", headers=f"Location: {server.url}/elsewhere\r\n"))

    with serving(behave) as server:
        got = post(client_for(server), server)
        assert (got.status, server.connections) == (307, 1)


def test_each_request_has_a_connection_of_its_own() -> None:
    """A kept-alive connection the server is about to close would make a token request's fate unknown."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer(b"{}"))
        server.release.wait(5)

    with serving(behave) as server:
        client = client_for(server)
        post(client, server)
        post(client, server)
        assert server.connections == 2


def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who can set a proxy variable must not be able to read refresh tokens."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with serving(lambda server, connection: _reply(connection, b"{}")) as server:
        assert get(client_for(server), server).status == 200


def _reply(connection: socket.socket, body: bytes) -> None:
    read_request(connection)
    connection.sendall(answer(body))


def test_chunked_answers_are_put_together() -> None:
    """HubSpot and Salesforce both answer in chunks."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")

    with serving(behave) as server:
        assert post(client_for(server), server).json() == {}


# -- the hook, and what counts as sent


def test_the_hook_runs_after_the_head_and_before_the_body() -> None:
    """The server has the whole head and not a byte of the body while the hook decides."""
    head_seen, after = threading.Event(), []

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_head(connection)
        head_seen.set()
        after.append(connection.recv(10_000))
        connection.sendall(answer(b"{}"))

    with serving(behave) as server:

        def hook() -> None:
            assert head_seen.wait(5)
            assert after == []

        assert post(client_for(server), server, before_body=hook).status == 200
    assert after[0].startswith(b"grant_type=")


def test_an_abandoned_request_sends_no_byte_of_its_body() -> None:
    """A holder whose lease ran out while it slept must not present its refresh token."""
    rest: list[bytes] = []
    over = threading.Event()

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_head(connection)
        rest.append(connection.recv(10_000))
        over.set()

    def hook() -> None:
        raise Abandoned

    with serving(behave) as server:
        with pytest.raises(NotSent) as caught:
            post(client_for(server), server, before_body=hook)
        assert over.wait(5)
    assert caught.value.reason == "abandoned"
    assert rest == [b""]


def test_a_hook_of_a_request_without_body_stops_even_its_head() -> None:
    """A GET acts with its head, so that is where the line runs."""
    rest: list[bytes] = []
    over = threading.Event()

    def behave(server: RawServer, connection: socket.socket) -> None:
        rest.append(connection.recv(10_000))
        over.set()

    def hook() -> None:
        raise Abandoned

    with serving(behave) as server:
        with pytest.raises(NotSent, match="abandoned"):
            get(client_for(server), server, before_body=hook)
        assert over.wait(5)
    assert rest == [b""]


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError("ours"), ValueError("ours")])
def test_another_exception_of_the_hook_passes_through(error: Exception) -> None:
    """A lost database in the hook is the caller's to explain, not a fault of the wire."""

    def hook() -> None:
        raise error

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_head(connection)

    with serving(behave) as server, pytest.raises(type(error), match="ours") as caught:
        post(client_for(server), server, before_body=hook)
    assert caught.value is error


def test_a_refused_connection_was_not_sent() -> None:
    """Nobody listens: retrying is free."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = RawServer(listener.getsockname()[1])
    with pytest.raises(NotSent, match="refused"):
        post(client_for(server), server)


def test_headers_that_cannot_be_sent_were_not() -> None:
    """A line break in a header value would let it write headers of its own."""
    with serving(lambda server, connection: _reply(connection, b"{}")) as server:
        client = client_for(server)
        for bad in ("a\r\nX-Evil: 1", "\u2603"):
            with pytest.raises(NotSent, match="bad_request"):
                get(client, server, headers={"X-Thing": bad})


def test_two_bodies_or_two_authorizations_are_a_mistake_in_the_program() -> None:
    """Neither may silently win."""
    client = HttpClient(Clock(), provider_hosts=["api.hubapi.com"])
    url = "https://api.hubapi.com/"
    with pytest.raises(TypeError):
        client.send("POST", url, purpose=Purpose.PROVIDER, deadlines=LONG, form={}, body=b"x")
    with pytest.raises(TypeError):
        client.send(
            "GET",
            url,
            purpose=Purpose.PROVIDER,
            deadlines=LONG,
            basic=("a", Secret("b")),
            bearer=Secret("c"),
        )


CUTS: dict[str, tuple[bytes, str]] = {
    "no byte of an answer": (b"", "no_answer"),
    "half a status line": (b"HTTP/1.1 20", "malformed"),
    "half a head": (b"HTTP/1.1 400 Bad\r\nContent-Ty", "truncated"),
    "a head without its end": (b"HTTP/1.1 200 OK\r\nX: y\r\n", "truncated"),
    "half a body": (b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"a":', "truncated"),
    "half the chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}", "truncated"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "malformed"),
}


@pytest.mark.parametrize("name", CUTS)
def test_an_answer_cut_short_is_unfinished(name: str) -> None:
    """The other side may have done it; which part of the answer is missing does not matter."""
    sent, reason = CUTS[name]

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(sent)

    with serving(behave) as server, pytest.raises(Unfinished) as caught:
        post(client_for(server), server)
    assert caught.value.reason == reason


def test_a_reset_after_the_body_is_unfinished() -> None:
    """A crashing server resets; whether it crashed before or after it did its work nobody knows."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(behave) as server, pytest.raises(Unfinished, match="reset"):
        post(client_for(server), server)


def test_a_connection_cut_before_the_body_was_not_sent() -> None:
    """The kernel refused the first byte, so the other side cannot have it."""
    gone = threading.Event()

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_head(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        gone.set()

    def wait_for_the_reset() -> None:
        assert gone.wait(5)  # on loopback it has arrived when it was sent

    with serving(behave) as server, pytest.raises(NotSent, match="reset"):
        post(client_for(server), server, before_body=wait_for_the_reset)


def test_an_answer_given_before_the_body_was_read_counts() -> None:
    """A gateway that says 503 to the head and closes has answered."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(answer(b"{}", status="503 Busy"))
        connection.shutdown(socket.SHUT_WR)
        server.release.wait(5)

    with serving(behave) as server:
        assert post(client_for(server), server).status == 503


def test_an_answer_given_before_a_reset_counts() -> None:
    """A gateway that refuses a large body answers, then closes with most of it unread, which is a reset."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_head(connection)
        connection.recv(1)
        connection.sendall(answer(b"{}", status="413 Too Large"))

    with serving(behave) as server:
        got = client_for(server).send(
            "POST",
            f"{server.url}/",
            purpose=Purpose.PROVIDER,
            deadlines=LONG,
            body=b"x" * 20_000_000,
        )
    assert got.status == 413


def test_an_answer_larger_than_allowed_is_unfinished() -> None:
    """Memory is bounded when the server does not say how much is coming."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000)

    with serving(behave) as server:
        with pytest.raises(Unfinished, match="oversized"):
            post(client_for(server), server, max_bytes=1999)
        assert len(post(client_for(server), server, max_bytes=2000).body) == 2000


def test_an_answer_that_announces_too_much_is_not_waited_for() -> None:
    """The head is enough to refuse it."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n")
        server.release.wait(5)

    with serving(behave) as server, pytest.raises(Unfinished, match="oversized"):
        post(client_for(server), server, max_bytes=1999)


# -- deadlines


def _silent(server: RawServer, connection: socket.socket) -> None:
    server.release.wait(10)


def _read_then_silent(server: RawServer, connection: socket.socket) -> None:
    read_request(connection)
    server.release.wait(10)


def _drip(piece: bytes, start: bytes) -> Callable[[RawServer, socket.socket], None]:
    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(start)
        while not server.release.wait(0.02):
            connection.sendall(piece)

    return behave


def test_silence_after_the_request_ends_at_the_read_deadline() -> None:
    """No byte comes for as long as `read` says."""
    with serving(_read_then_silent) as server, pytest.raises(Unfinished, match="read_timeout"):
        post(client_for(server), server, deadlines=Deadlines(connect=5, read=0.1, total=5))


@pytest.mark.parametrize(
    "behave",
    [
        _read_then_silent,
        _drip(b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
        _drip(b"x", b"HTTP/1.1 200 OK\r\n\r\n"),
        _drip(b"X-Drip: 1\r\n", b"HTTP/1.1 200 OK\r\n"),
        _drip(b"x", b"HTTP/1.1 200 OK\r\nX-Drip: "),
        _drip(b"1\r\nx\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        _drip(b"HTTP/1.1 100 Continue\r\n\r\n", b""),
    ],
    ids=["silent", "body", "body-to-end", "headers", "header", "chunks", "continue"],
)
def test_the_total_deadline_ends_whatever_drips(behave: Callable[[RawServer, socket.socket], None]) -> None:
    """Each byte starts a socket's own time-out anew; the watchdog's does not."""
    with serving(behave) as server:
        with pytest.raises(Unfinished) as caught:
            post(client_for(server), server, deadlines=Deadlines(connect=5, read=5, total=0.3))
        assert not server.release.is_set()
    # A head of a hundred lines may be refused before the deadline: either way it ends, unfinished.
    assert caught.value.reason in {"deadline", "malformed"}


class _Jumping(Clock):
    ahead = 0.0

    def elapsed(self) -> float:
        return super().elapsed() + self.ahead


def test_a_machine_that_slept_before_the_body_sends_nothing() -> None:
    """The clock went on while nobody ran; the last check sees it."""
    clock = _Jumping()
    rest: list[bytes] = []
    over = threading.Event()

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_head(connection)
        rest.append(connection.recv(10_000))
        over.set()

    def hook() -> None:
        clock.ahead = 3600.0

    with serving(behave) as server:
        client = HttpClient(clock, allow_loopback=True, provider_hosts=[server.url])
        with pytest.raises(NotSent, match="deadline"):
            post(client, server, before_body=hook)
        assert over.wait(5)
    assert rest == [b""]


def test_a_name_server_that_hangs_ends_at_the_connect_deadline() -> None:
    """The system's resolver has no deadline of its own."""
    release = threading.Event()

    def hang(host: str) -> list[str]:
        release.wait(10)
        return ["127.0.0.1"]

    client = HttpClient(Clock(), allow_loopback=True, provider_hosts=["slow.example"], resolve=hang)
    try:
        with pytest.raises(NotSent, match="dns"):
            client.send(
                "GET",
                "https://slow.example/",
                purpose=Purpose.PROVIDER,
                deadlines=Deadlines(connect=0.1, read=5, total=5),
            )
    finally:
        release.set()


def test_a_name_that_does_not_exist_was_not_sent() -> None:
    """Also when the resolver finds nothing, or nonsense."""

    def unknown(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, host)

    for resolve in (unknown, lambda host: [], lambda host: ["nonsense"]):
        client = HttpClient(Clock(), provider_hosts=["gone.example"], resolve=resolve)
        with pytest.raises(NotSent, match="dns"):
            client.send("GET", "https://gone.example/", purpose=Purpose.PROVIDER, deadlines=LONG)


def test_look_ups_that_hang_do_not_pile_up_without_end() -> None:
    """Each holds a thread; past the limit a request fails at once instead."""
    release, count = threading.Event(), []

    def hang(host: str) -> list[str]:
        count.append(host)
        release.wait(10)
        return []

    client = HttpClient(Clock(), provider_hosts=["slow.example"], resolve=hang)
    try:
        for _ in range(40):
            with pytest.raises(NotSent, match="dns"):
                client.send(
                    "GET",
                    "https://slow.example/",
                    purpose=Purpose.PROVIDER,
                    deadlines=Deadlines(connect=0.002, read=1, total=1),
                )
    finally:
        release.set()
    assert len(count) == 32


# -- TLS


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """A certificate for hooks.example.test."""
    return make_identity(tmp_path_factory.mktemp("tls"), "hooks.example.test", "localhost")


@pytest.fixture
def tls_server(identity: Identity) -> Iterator[RawServer]:
    """A server that speaks TLS as hooks.example.test."""
    context = identity.context()

    def behave(server: RawServer, connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                head, _ = read_request(secured)
                secured.sendall(answer(head.split(b"\r\n")[1]))
        except ssl.SSLError:
            return  # the client refused the certificate

    with serving(behave) as server:
        yield server


def hook_client(resolve: Callable[[str], list[str]], ca_file: Path | None) -> HttpClient:
    return HttpClient(Clock(), allow_loopback=True, ca_file=ca_file, resolve=resolve)


def test_an_untrusted_certificate_is_refused_before_anything_is_sent(tls_server: RawServer) -> None:
    """Nobody in the middle gets to see a token."""
    client = HttpClient(Clock(), allow_loopback=True)
    with pytest.raises(NotSent, match="tls_untrusted"):
        client.send(
            "POST",
            f"https://localhost:{tls_server.port}/",
            purpose=Purpose.OPERATOR,
            deadlines=LONG,
            form={"a": "b"},
        )


def test_a_certificate_for_another_name_is_refused(tls_server: RawServer, identity: Identity) -> None:
    """The right authority is not enough."""
    client = hook_client(lambda host: ["127.0.0.1"], identity.authority)
    with pytest.raises(NotSent, match="tls_untrusted"):
        client.send(
            "GET",
            f"https://other.example.test:{tls_server.port}/",
            purpose=Purpose.OPERATOR,
            deadlines=LONG,
        )


def test_a_name_is_resolved_once_and_its_certificate_checked_by_name(
    tls_server: RawServer, identity: Identity
) -> None:
    """The address that was checked is the one connected to: a second answer of the name server has no
    effect.
    """
    answers = iter([["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]])
    client = hook_client(lambda host: next(answers), identity.authority)
    got = client.send(
        "GET",
        f"https://hooks.example.test:{tls_server.port}/x",
        purpose=Purpose.OPERATOR,
        deadlines=LONG,
    )
    assert got.body == f"Host: hooks.example.test:{tls_server.port}".encode()
    assert next(answers) == ["10.0.0.1"]


def test_a_tls_handshake_that_hangs_ends_at_its_deadline(identity: Identity) -> None:
    """A listener that accepts and says nothing."""
    with serving(_silent) as server:
        client = hook_client(lambda host: ["127.0.0.1"], identity.authority)
        for deadlines, reason in (
            (Deadlines(connect=0.1, read=5, total=5), "connect_timeout"),
            (Deadlines(connect=5, read=5, total=0.1), "(deadline|connect_timeout)"),
        ):
            with pytest.raises(NotSent, match=reason):
                client.send(
                    "GET",
                    f"https://hooks.example.test:{server.port}/",
                    purpose=Purpose.OPERATOR,
                    deadlines=deadlines,
                )


def test_plain_http_on_a_tls_port_was_not_sent(identity: Identity) -> None:
    """Something that is not TLS answers the handshake."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")

    with serving(behave) as server, pytest.raises(NotSent, match="tls"):
        hook_client(lambda host: ["127.0.0.1"], identity.authority).send(
            "GET", f"https://hooks.example.test:{server.port}/", purpose=Purpose.OPERATOR, deadlines=LONG
        )


def test_a_dripping_answer_over_tls_ends_at_the_total_deadline(identity: Identity) -> None:
    """And what is left in the socket is not taken for an answer."""
    context = identity.context()

    def behave(server: RawServer, connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            read_request(secured)
            secured.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while not server.release.wait(0.02):
                secured.sendall(b"x")

    with serving(behave) as server, pytest.raises(Unfinished, match="deadline"):
        hook_client(lambda host: ["127.0.0.1"], identity.authority).send(
            "GET",
            f"https://hooks.example.test:{server.port}/",
            purpose=Purpose.OPERATOR,
            deadlines=Deadlines(connect=5, read=5, total=0.4),
        )


def test_a_dead_address_leaves_time_for_the_next(identity: Identity, tls_server: RawServer) -> None:
    """One of several addresses of a name may be out of order."""
    client = hook_client(lambda host: ["127.0.0.2", "127.0.0.1"], identity.authority)
    got = client.send(
        "GET", f"https://hooks.example.test:{tls_server.port}/", purpose=Purpose.OPERATOR, deadlines=LONG
    )
    assert got.status == 200


# -- where requests may go


def refusal(url: str, purpose: Purpose, *, allow_loopback: bool = False, **options: object) -> str:
    client = HttpClient(
        Clock(),
        allow_loopback=allow_loopback,
        provider_hosts=["api.hubapi.com", "https://login.salesforce.com"],
        **options,  # type: ignore[arg-type]
    )
    with pytest.raises(NotSent) as caught:
        client.send("GET", url, purpose=purpose, deadlines=LONG)
    return caught.value.reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://api.hubapi.com.evil.example/", "host_not_allowed"),
        ("https://evil.example/api.hubapi.com", "host_not_allowed"),
        ("https://api.hubapi.com:8443/", "host_not_allowed"),
        ("http://api.hubapi.com/", "not_https"),
        ("https://user:pass@api.hubapi.com/", "bad_url"),
        ("https://api.hubapi.com@evil.example/", "bad_url"),
        ("https://evil.example\\@api.hubapi.com/", "bad_url"),
        ("https://api.hubapi.com/\r\nX-Evil: 1", "bad_url"),
        ("https://api.hubapi.com/#fragment", "bad_url"),
        ("ftp://api.hubapi.com/", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("//api.hubapi.com/", "bad_url"),
        ("https://[::1", "bad_url"),
        ("https://api.hubapi.com/" + "x" * 9000, "bad_url"),
        ("http://127.0.0.1:1/", "loopback"),
        ("https://localhost/", "loopback"),
    ],
)
def test_a_provider_request_goes_to_listed_hosts_only(url: str, reason: str) -> None:
    """Whatever trick the URL plays."""
    assert refusal(url, Purpose.PROVIDER) == reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://acme.lightning.force.com/", "host_not_allowed"),
        ("https://acme.force.com/", "host_not_allowed"),
        ("https://salesforce.com/", "host_not_allowed"),
        ("https://evilsalesforce.com/", "host_not_allowed"),
        ("https://acme.my.salesforce.com.evil.example/", "host_not_allowed"),
        ("https://acme.my.salesforce.com:8443/", "host_not_allowed"),
        ("http://acme.my.salesforce.com/", "not_https"),
        ("http://127.0.0.1/", "loopback"),
    ],
)
def test_an_instance_lies_under_the_providers_domains(url: str, reason: str) -> None:
    """A Lightning address is where people work, not where the API is."""
    assert refusal(url, Purpose.INSTANCE) == reason


@pytest.mark.parametrize(
    "url",
    [
        "https://acme.my.salesforce.com/services/data",
        "https://acme--dev.sandbox.my.salesforce.com",
        "https://login.salesforce.com./",
        "https://ACME.My.Salesforce.COM/",
    ],
)
def test_production_and_sandbox_instances_are_allowed(url: str) -> None:
    """The forms Salesforce hands out."""
    destinations = Destinations([], ["salesforce.com"], allow_loopback=False)
    assert destinations.check(url, Purpose.INSTANCE).host.endswith(".salesforce.com")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",  # noqa: S104 - to be refused
        "224.0.0.1",
        "255.255.255.255",
        "198.18.0.1",
        "::1",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::7f00:1",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001:0:1::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
    ],
)
def test_an_operators_url_cannot_reach_inside(address: str) -> None:
    """Neither the cloud's metadata service nor anything that hides an inner address in an outer one."""

    def resolve(host: str) -> list[str]:
        return ["93.184.216.34", address]

    reason = refusal("https://hooks.example.org/", Purpose.OPERATOR, resolve=resolve)
    assert reason == "address_not_allowed"


def test_an_operators_url_may_not_be_a_literal_inner_address() -> None:
    """Literals and the odd spellings of them are held to the same rule."""
    assert refusal("https://169.254.169.254/latest", Purpose.OPERATOR) == "address_not_allowed"
    assert refusal("https://[::ffff:10.0.0.1]/", Purpose.OPERATOR) == "address_not_allowed"
    assert refusal("https://127.0.0.1/", Purpose.OPERATOR) == "loopback"
    assert refusal("http://hooks.example.org/", Purpose.OPERATOR) == "not_https"
    for odd in ("0x7f.1", "2130706433", "017700000001", "127.1"):
        # The C library reads these as addresses, and so does the resolver.
        reason = refusal(
            f"https://{odd}/",
            Purpose.OPERATOR,
            resolve=lambda host: [socket.inet_ntoa(socket.inet_aton(host))],
        )
        assert reason == "address_not_allowed"


def test_a_loopback_name_that_points_elsewhere_is_refused() -> None:
    """Plain http is for this machine, so it must stay on it."""
    reason = refusal(
        "http://localhost:1/", Purpose.OPERATOR, allow_loopback=True, resolve=lambda host: ["93.184.216.34"]
    )
    assert reason == "address_not_allowed"


@given(st.integers(0, 2**32 - 1))
def test_no_ipv4_address_that_python_calls_private_is_public(number: int) -> None:
    """The list here may be stricter than the standard library's, never laxer."""
    address = ipaddress.IPv4Address(number)
    destinations = Destinations([], [], allow_loopback=False)
    target = destinations.check("https://hooks.example.org/", Purpose.OPERATOR)
    if not address.is_global or address.is_multicast:
        with pytest.raises(NotAllowed):
            destinations.check_address(address, target)


@given(st.integers(0, 2**128 - 1))
def test_no_ipv6_address_that_python_calls_private_is_public(number: int) -> None:
    """The same for the larger world."""
    address = ipaddress.IPv6Address(number)
    destinations = Destinations([], [], allow_loopback=False)
    target = destinations.check("https://hooks.example.org/", Purpose.OPERATOR)
    if not address.is_global or address.is_multicast or address.ipv4_mapped or address.sixtofour:
        with pytest.raises(NotAllowed):
            destinations.check_address(address, target)


def test_hosts_can_be_allowed_later() -> None:
    """An app registered while the program runs brings its login host."""
    with serving(lambda server, connection: _reply(connection, b"{}")) as server:
        client = HttpClient(Clock(), allow_loopback=True)
        with pytest.raises(NotSent, match="host_not_allowed"):
            get(client, server)
        client.allow(server.url)
        assert get(client, server).status == 200
    for nonsense in ("", "ftp://x", "a b", "https://u:p@h"):
        with pytest.raises(ValueError, match="provider"):
            client.allow(nonsense)


# -- nothing leaks


def _walk(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 400 Bad\r\nContent-Ty", b"garbage\r\n\r\n"])
def test_no_secret_is_in_an_exception_or_what_it_arose_from(sent: bytes) -> None:
    """Foreign messages quote URLs; none of them is kept as a cause."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(sent)

    with serving(behave) as server:
        with pytest.raises(Unfinished) as caught:
            post(client_for(server), server)
        with pytest.raises(NotSent) as refused:
            get(client_for(server), server, bearer=Secret(f"{SECRET}\n"))
    for error in (*_walk(caught.value), *_walk(refused.value)):
        assert SECRET not in f"{error} {error!r} {vars(error)}"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert caught.value.code == caught.value.reason


def test_no_socket_is_left_open(recwarn: pytest.WarningsRecorder) -> None:
    """Neither after an answer nor after a failure."""

    def behave(server: RawServer, connection: socket.socket) -> None:
        read_request(connection)
        if server.connections % 2:
            connection.sendall(answer(b"{}"))

    with serving(behave) as server:
        client = client_for(server)
        get(client, server)
        with pytest.raises(Unfinished):
            get(client, server)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterating would hold one more open
        for _ in range(5):
            get(client, server)
            with pytest.raises(Unfinished):
                get(client, server)
    assert not [one for one in recwarn if issubclass(one.category, ResourceWarning)]
    _settles_at_most(before)


def _settles_at_most(before: int) -> None:
    """The server's own ends close in its threads, a moment later."""
    for _ in range(100):
        if len(os.listdir("/proc/self/fd")) <= before:  # noqa: PTH208 - as above
            return
        time.sleep(0.02)
    raise AssertionError("sockets were left open")


def test_a_child_forked_in_the_worst_moment_can_send() -> None:
    """gunicorn forks after the first request of a preloaded program: the watchdog's thread does not come
    along, but its lock does, and nobody is left who would release it.
    """
    with serving(lambda server, connection: _reply(connection, b"{}")) as server:
        client = client_for(server)
        get(client, server)
        held, over = threading.Event(), threading.Event()

        def hold() -> None:
            with client._watchdog._changed:
                held.set()
                over.wait(10)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(5)
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(10)
                os._exit(0 if get(client, server).status == 200 else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        over.set()
        holder.join()
    assert os.waitstatus_to_exitcode(status) == 0
