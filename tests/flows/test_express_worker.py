"""The express lane over real sockets: what gunicorn's insides must go on doing for it, and what clients see of it."""

from __future__ import annotations

import json
import re
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.access.permissions import Permission
from emulator import Emulator
from tests.processes import CONFIG, Server, free_port, serve
from tests.waiting import until
from tests.web_stage import Stage, environment, staged

CROWD = 24


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def express(self) -> bool:
        """Whether the lane gave it."""
        return "X-Together" in self.headers


class Client:
    """A client that keeps its connection and says exactly what it is told to."""

    def __init__(self, server: Server) -> None:
        self.sock = socket.create_connection((server.host, server.port), timeout=20)
        self._buffer = b""

    def send(self, raw: bytes) -> None:
        """Send these bytes."""
        self.sock.sendall(raw)

    def answer(self) -> Answer:
        """The next answer."""
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("Content-Length", 0))
        while len(self._buffer) < length:
            self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Answer(int(status.split()[1]), headers, body)

    def ask(self, raw: bytes) -> Answer:
        """Send and read."""
        self.send(raw)
        return self.answer()

    def answered(self) -> bool:
        """Whether something has come that was not read yet."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(self._buffer or poll.poll(0))

    def ended(self) -> bool:
        """Whether the server has closed the connection."""
        return self.sock.recv(1) == b""

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    def _more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data


class World:
    """A broker with one connection behind one server process of four threads."""

    def __init__(self, stage: Stage, server: Server, stack: ExitStack, hold: Path) -> None:
        self.stage = stage
        self.server = server
        self.hold = hold
        self._stack = stack

    def client(self, *, warm: bool = True) -> Client:
        """A client; warm, it has had its first answer, after which its connection may use the lane."""
        client = self._stack.enter_context(closing(Client(self.server)))
        if warm:
            assert client.ask(self.get()).status == 200
        return client

    def get(
        self,
        path: str = "/v1/connections/acme/token",
        *,
        version: str = "1.1",
        more: str = "",
        caller: str = "express",
    ) -> bytes:
        """A GET with a caller's credentials."""
        lines = f"Host: localhost\r\nAuthorization: {self.stage.basic(caller)}\r\n{more}"
        return f"GET {path} HTTP/{version}\r\n{lines}\r\n".encode()

    def recorded(self) -> int:
        """How many hand-outs are on record."""
        rows = self.stage.services.trail.export()
        return sum('"access:token:issued"' in row or '"broker:token:issued"' in row for row in rows)


@pytest.fixture(scope="module")
def world(vendors: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Give the server that all tests here ask; its answers from the lane are marked."""
    directory = tmp_path_factory.mktemp("express")
    url = f"sqlite:///{directory / 'drawbridge.db'}"
    more = {"WEB_WORKERS": "1", "WEB_THREADS": "4"}
    port = free_port()
    with ExitStack() as stack:
        stage = stack.enter_context(staged(vendors, url, directory / "state", **more))
        stage.connect(account="101", name="acme")
        stage.add_caller("express", "token:issue@*", rate=100_000.0)
        hold = directory / "hold"
        environ = environment(vendors, url, directory / "state", **more) | {"EXPRESS_HOLD": str(hold)}
        server = stack.enter_context(
            serve(
                "tests.express_app:application",
                {**environ, "DRAWBRIDGE_BIND": f"127.0.0.1:{port}"},
                options=["--config", str(CONFIG)],
                log=directory / "web.log",
                port=port,
            )
        )
        yield World(stage, server, stack, hold)


def test_a_kept_connection_is_answered_in_the_lane_as_it_would_be_elsewhere(world: World) -> None:
    """Same status, same headers, same body; only what names the moment differs."""
    client = world.client(warm=False)
    usual = client.ask(world.get())
    express = client.ask(world.get())
    while not express.express:  # a process that is behind with its look at the epochs does it the usual way
        express = client.ask(world.get())
    assert (usual.status, usual.express) == (200, False)
    assert (express.status, express.express) == (200, True)
    momentary = {"Date", "X-Request-ID", "Content-Length"}
    assert {name: value for name, value in usual.headers.items() if name not in momentary} == {
        name: value for name, value in express.headers.items() if name not in momentary | {"X-Together"}
    }
    assert usual.headers.keys() == express.headers.keys() - {"X-Together"}
    assert usual.headers["X-Request-ID"] != express.headers["X-Request-ID"]
    seconds = re.compile(rb'"expires_in": \d+')
    assert seconds.sub(b"", usual.body) == seconds.sub(b"", express.body)


def test_every_answer_of_the_lane_is_on_record(world: World) -> None:
    """A crowd that asks at the same moments gets as many answers as the trail has new rows, and the trail is sound."""
    before = world.recorded()
    clients = [world.client() for _ in range(CROWD)]
    together = 0
    for _ in range(10):
        for client in clients:
            client.send(world.get())
        answers = [client.answer() for client in clients]
        assert {answer.status for answer in answers} == {200}
        together = max(
            together, *(int(answer.headers.get("X-Together", "0 -").split()[0]) for answer in answers)
        )
    assert together > 1
    assert world.recorded() - before == CROWD * 11
    assert world.stage.services.trail.verify().sound


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/connections/nobody/token", 404),
        ("/v1/connections/acme/token?min_ttl=never", 400),
        ("/v1/connections/acme/token?min_ttl=999999", 400),
        ("/v1/connections/acme/token?min_ttl=1&min_ttl=1", 400),
        ("/v1/connections/acme/token/", 404),
        ("/v1/connections//token", 404),
        ("/v1/connections/acme%2Fx/token", 404),
        ("/livez", 200),
    ],
)
def test_what_the_lane_does_not_answer_gets_the_usual_answer(world: World, path: str, status: int) -> None:
    """Refusals, faults and other pages come from the one place that makes them, and the connection lives on."""
    client = world.client()
    answer = client.ask(world.get(path))
    assert (answer.status, answer.express) == (status, False)
    until(lambda: client.ask(world.get()).express)


def test_wrong_credentials_on_a_kept_connection_are_refused(world: World) -> None:
    """Proof counts for the request it came with, not for the connection."""
    client = world.client()
    for credentials in ("Basic bm9ib2R5Ondyb25n", "Bearer x", "Basic \xff"):
        raw = world.get().replace(world.stage.basic("express").encode(), credentials.encode("latin-1"))
        assert client.ask(raw).status == 401
    assert client.ask(b"GET /v1/connections/acme/token HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 401
    twice = world.get(more=f"Authorization: {world.stage.basic('express')}\r\n")
    assert not client.ask(twice).express


def test_a_permission_taken_away_closes_the_lane_to_it(world: World) -> None:
    """The very connection that was served is refused, and served again when the permission is given back."""
    client, callers = world.client(), world.stage.services.callers
    callers.deny("express", Permission.parse("token:issue@*"))
    until(lambda: client.ask(world.get()).status == 403)
    callers.allow("express", Permission.parse("token:issue@*"))
    until(lambda: client.ask(world.get()).status == 200)
    until(lambda: client.ask(world.get()).express)


def test_half_a_request_holds_up_nobody(world: World) -> None:
    """Who sends the beginning of a request and then nothing waits alone; the rest completes it."""
    slow, quick = world.client(), world.client()
    raw = world.get()
    slow.send(raw[:60])
    for _ in range(20):
        assert quick.ask(world.get()).status == 200
    slow.send(raw[60:])
    assert slow.answer().status == 200
    until(lambda: slow.ask(raw).express)


def test_two_requests_in_one_breath_are_answered_in_order(world: World) -> None:
    """Pipelined requests are not for the lane, and none is lost."""
    client = world.client()
    client.send(world.get("/v1/connections/acme/token?min_ttl=1") + world.get("/livez") + world.get())
    first, second, third = client.answer(), client.answer(), client.answer()
    assert [first.status, second.status, third.status] == [200, 200, 200]
    assert (b"access_token" in first.body, b"access_token" in second.body) == (True, False)
    assert b"access_token" in third.body


@pytest.mark.parametrize(("version", "more"), [("1.0", ""), ("1.1", "Connection: close\r\n")])
def test_who_wants_the_connection_closed_gets_it_closed(world: World, version: str, more: str) -> None:
    """HTTP/1.0 and `Connection: close` are served and end there."""
    client = world.client()
    answer = client.ask(world.get(version=version, more=more))
    assert (answer.status, answer.headers["Connection"], answer.express) == (200, "close", False)
    assert client.ended()


def test_a_get_with_a_body_is_read_to_its_end(world: World) -> None:
    """What follows the head is not taken for the next request."""
    client = world.client()
    client.send(world.get(more="Content-Length: 4\r\n"))
    client.send(b"GET ")
    assert client.answer().status == 200
    until(lambda: client.ask(world.get()).express)


def test_a_refusal_is_on_record_once(world: World) -> None:
    """The lane looks whether a caller may come from where it is; the usual way refuses it, and writes that down."""
    world.stage.add_caller("elsewhere", "token:issue@*", allow_ips=["192.0.2.0/24"])
    client = world.client()
    before = sum('"forbidden"' in row or '"address"' in row for row in world.stage.services.trail.export())
    for _ in range(3):
        assert client.ask(world.get(caller="elsewhere")).status == 403
    rows = list(world.stage.services.trail.export())
    assert sum('"forbidden"' in row or '"address"' in row for row in rows) - before == 3


def test_who_is_over_the_rate_is_told_and_not_charged_twice(world: World) -> None:
    """A caller with a rate of five gets five in its first moment, whichever way they go."""
    world.stage.add_caller("slow", "token:issue@*", rate=5.0)
    client = world.client()
    statuses = [client.ask(world.get(caller="slow")).status for _ in range(12)]
    assert statuses[:5] == [200] * 5
    assert 429 in statuses[5:]


def test_a_fault_in_the_lane_costs_nobody_else_anything(world: World) -> None:
    """What it cannot finish goes the usual way; a connection it loses its place with is closed; the lane lives on."""
    client, other = world.client(), world.client()
    until(lambda: client.ask(world.get()).express)
    failed = client.ask(world.get("/v1/connections/acme/token?min_ttl=7.5"))
    assert (failed.status, failed.express) == (200, False)
    client.send(world.get("/v1/connections/acme/token?min_ttl=8.5"))
    with pytest.raises(ConnectionError):
        client.answer()
    until(lambda: other.ask(world.get()).express)


def test_nobody_waits_with_the_lane_for_its_disk(world: World) -> None:
    """While the records of some take long, all others are served the usual way, those too who came a moment later."""
    others = [world.client() for _ in range(CROWD)]
    with lane_held_up(world) as held:
        for _ in range(3):
            for other in others:
                other.send(world.get())
            answers = [other.answer() for other in others]
            assert {(answer.status, answer.express) for answer in answers} == {(200, False)}
        assert others[0].ask(world.get("/livez")).status == 200
        assert others[0].ask(world.get("/v1/connections/nobody/token")).status == 404
        assert not held.answered()
    assert held.answer().status == 200
    for other in others:
        assert other.ask(world.get()).status == 200
    until(lambda: others[0].ask(world.get()).express)


@contextmanager
def lane_held_up(world: World) -> Iterator[Client]:
    """Hold the lane's thread up where it waits for the disk, with a request of this client in hand."""
    client, asked = world.client(), world.get("/v1/connections/acme/token?min_ttl=9.5")
    held = world.hold.with_suffix(".held")

    def in_hand() -> bool:
        if client.answered():  # the lane had left it to the usual way
            assert client.answer().status == 200
            client.send(asked)
        return held.exists()

    world.hold.touch()
    try:
        client.send(asked)
        until(in_hand)
        yield client
    finally:
        world.hold.unlink()


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "invalid_request"),
        (b"GET /livez HTTP/1.1\r\nBad Header: secret-word\r\n\r\n", 400, "invalid_request"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400, "invalid_request"),
        (b"GET /livez HTTP/7.1\r\nHost: a\r\n\r\n", 400, "invalid_request"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "too_large"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 431, "too_large"),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n", 417, "invalid_request"),
        (b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: tea\r\n\r\n", 501, "invalid_request"),
    ],
)
def test_what_is_no_request_gets_a_problem_too(world: World, raw: bytes, status: int, code: str) -> None:
    """Also on a kept connection, which ends there; nothing of what came is repeated."""
    for warm in (False, True):
        client = world.client(warm=warm)
        answer = client.ask(raw)
        assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json")
        told = json.loads(answer.body)
        assert (told["status"], told["code"]) == (status, code)
        assert b"secret-word" not in answer.body
        assert client.ended()


def test_clients_that_do_not_close_hold_up_nobody(world: World) -> None:
    """The server has closed and waits for them to do so, too: for them alone, not before everybody else."""
    waiting = [world.client(warm=False) for _ in range(40)]
    for client in waiting:
        client.send(world.get(more="Connection: close\r\n"))
    quick = world.client()
    for _ in range(20):
        assert quick.ask(world.get()).status == 200
    assert {client.answer().status for client in waiting} == {200}
    assert all(client.ended() for client in waiting)


def test_a_client_that_talks_on_after_the_end_is_cut_off(world: World) -> None:
    """What comes after the last answer is read and forgotten, for a while."""
    client = world.client()
    assert client.ask(world.get(more="Connection: close\r\n")).status == 200
    assert client.ended()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        until(lambda: client.send(world.get()) is not None)


def test_a_client_that_does_not_read_holds_up_nobody(world: World) -> None:
    """Its answers wait for it outside the threads; everybody else is served, and it gets all of them in the end."""
    deaf, quick = world.client(), world.client()
    asked = 0
    deaf.sock.settimeout(0.3)
    raw = world.get()
    try:
        while asked < 20_000:
            deaf.sock.sendall(raw)
            asked += 1
    except TimeoutError:
        pass  # both sides' buffers are full; a request may have gone out in part, so nothing more is sent
    for _ in range(20):
        assert quick.ask(raw).status == 200
    deaf.sock.settimeout(20)
    for _ in range(min(asked, 500)):
        assert deaf.answer().status == 200


def test_an_access_log_closes_the_lane(vendors: Emulator, tmp_path: Path) -> None:
    """gunicorn writes a line for each request it answers itself; an operator who asks for them gets them all."""
    url, port = f"sqlite:///{tmp_path / 'drawbridge.db'}", free_port()
    with ExitStack() as stack:
        stage = stack.enter_context(staged(vendors, url, tmp_path / "state", WEB_WORKERS="1"))
        stage.connect(account="102", name="acme")
        stage.add_caller("express", "token:issue@*")
        environ = environment(vendors, url, tmp_path / "state", WEB_WORKERS="1")
        environ["EXPRESS_HOLD"] = str(tmp_path / "hold")
        server = stack.enter_context(
            serve(
                "tests.express_app:application",
                {**environ, "DRAWBRIDGE_BIND": f"127.0.0.1:{port}"},
                options=["--config", str(CONFIG), "--access-logfile", str(tmp_path / "access.log")],
                log=tmp_path / "web.log",
                port=port,
            )
        )
        world = World(stage, server, stack, tmp_path / "hold")
        client = world.client()
        assert not client.ask(world.get()).express
