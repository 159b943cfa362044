"""Clients that send or read slowly, or not at all: each waits alone, for a bounded time, and nobody with it."""

from __future__ import annotations

import itertools
import json
import resource
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from gunicorn.config import Config
from gunicorn.http.errors import ParseException
from gunicorn.http.parser import RequestParser
from hypothesis import given
from hypothesis import strategies as st

from app.db.schema import processes
from app.web.arrival import LARGEST_HEAD, Arrival
from emulator import Emulator
from tests.processes import CONFIG, ROOT, Server, free_port, serve
from tests.waiting import until
from tests.web_stage import Stage, environment, staged

THREADS = 4
CROWD = 40
HALF_HEAD = b"GET /livez HTTP/1.1\r\nX"
HALF_BODY = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
BIG = b"0123456789abcdef" * 458_752  # 7 MiB, which no socket takes without its client
BIG_ONE = b"GET /big?458752 HTTP/1.1\r\nHost: a\r\n\r\n"


class World:
    """A broker behind one server process of four threads, and clients that say exactly what they are told to."""

    def __init__(self, stage: Stage, server: Server, hold: Path, log: Path, stack: ExitStack) -> None:
        self.stage = stage
        self.server = server
        self.hold = hold
        self._log = log
        self._stack = stack

    def client(self, *said: bytes, buffer: int | None = None) -> socket.socket:
        """A client that has said this; `buffer` is how many bytes it takes in without reading."""
        sock = self._stack.enter_context(closing(socket.socket()))
        sock.settimeout(60)
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect((self.server.host, self.server.port))
        for part in said:
            sock.sendall(part)
        return sock

    def worker(self) -> int:
        """The process that serves."""
        pid = self.server.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def files(self) -> int:
        """How many files that process has open."""
        return sum(1 for _ in Path(f"/proc/{self.worker()}/fd").iterdir())

    def log(self) -> str:
        """What the server said."""
        return self._log.read_text()


def answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The next answer, read to its end."""
    file = sock.makefile("rb")
    status = int(file.readline().split()[1])
    fields = {}
    while line := file.readline().strip().decode():
        name, _, value = line.partition(": ")
        fields[name] = value
    return status, fields, file.read(int(fields.get("Content-Length", 0)))


def asked(world: World, raw: bytes = LIVEZ) -> int:
    """The status a client of good manners gets."""
    with closing(world.client(raw)) as sock:
        return answer(sock)[0]


def ended(sock: socket.socket) -> bool:
    """Whether the server ends the connection without another word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


Serving = Callable[..., World]


@pytest.fixture(scope="module")
def serving(vendors: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Give a function that starts a server; `files` is its limit of open files, `options` are gunicorn's."""
    with ExitStack() as stack:

        def start(*options: str, files: int | None = None) -> World:
            directory = tmp_path_factory.mktemp("slow")
            url = f"sqlite:///{directory / 'drawbridge.db'}"
            more = {"WEB_WORKERS": "1", "WEB_THREADS": str(THREADS)}
            port = free_port()
            config = directory / "gunicorn.conf.py"
            limit = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))" if files else ""
            config.write_text(
                f"import resource\n{limit}\n__file__ = {str(CONFIG)!r}\nexec(open(__file__).read())\n"
            )
            stage = stack.enter_context(staged(vendors, url, directory / "state", **more))
            server = stack.enter_context(
                serve(
                    "tests.slow_app:application",
                    environment(vendors, url, directory / "state", **more)
                    | {"DRAWBRIDGE_BIND": f"127.0.0.1:{port}", "SLOW_HOLD": str(directory)},
                    options=["--config", str(config), *options],
                    log=directory / "web.log",
                    port=port,
                )
            )
            return World(stage, server, directory, directory / "web.log", stack)

        yield start


@pytest.fixture(scope="module")
def world(serving: Serving) -> World:
    """Give the server most tests here ask."""
    return serving()


@pytest.fixture
def many_files() -> Iterator[int]:
    """Let this process open as many files as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Requests that do not come to their end


@pytest.mark.parametrize("half", [b"", HALF_HEAD, HALF_BODY], ids=["nothing", "half a head", "half a body"])
@pytest.mark.parametrize("kept", [False, True])
def test_half_a_request_holds_no_thread(world: World, half: bytes, kept: bool) -> None:
    """Many times as many as there are threads, on new connections and on kept ones, and others are answered."""
    slow = [world.client() for _ in range(CROWD)]
    for client in slow if kept else ():
        client.sendall(LIVEZ)
        assert answer(client)[0] == 200
    for client in slow:
        client.sendall(half)
    assert [asked(world) for _ in range(20)] == [200] * 20
    for client in slow:
        client.close()


def test_who_does_not_finish_is_told_so_and_let_go(world: World) -> None:
    """In the end; also who sends a byte now and then. Who has said nothing at all is just let go."""
    silent = world.client()
    late = [world.client(HALF_HEAD), world.client(HALF_BODY)]
    trickling = world.client(HALF_HEAD)
    kept = world.client(LIVEZ)
    assert answer(kept)[0] == 200
    kept.sendall(HALF_HEAD)
    for client in (*late, kept):
        status, fields, body = answer(client)
        assert (status, fields["Content-Type"]) == (408, "application/problem+json")
        assert (json.loads(body)["status"], json.loads(body)["code"]) == (408, "invalid_request")
        assert ended(client)
    assert ended(silent)
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        until(lambda: trickling.send(b"x") == 0)


def test_a_request_in_pieces_is_put_together(world: World) -> None:
    """Byte for byte, with a length or in chunks, and the connection goes on."""
    client = world.client()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    chunked = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    for raw in (
        LIVEZ,
        HALF_BODY + b"-more",
        chunked + b"4;x=y\r\nhalf\r\n5\r\n-more\r\n0\r\nSum: 1\r\n\r\n",
        chunked + b"9\r\nhalf-more\r\n0\r\n\r\n",
    ):
        for at in range(len(raw)):
            client.sendall(raw[at : at + 1])
        status, _, body = answer(client)
        assert status == 200
        assert raw == LIVEZ or body == b"9"


def test_requests_with_bodies_in_one_breath_are_answered_in_order(world: World) -> None:
    """Pipelined, the last of them in halves; the body of one is never taken for the next request."""
    body = LIVEZ * 3
    post = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    client = world.client(post + LIVEZ + post + HALF_BODY)
    file = client.makefile("rb")
    client.sendall(b"-more")
    told = []
    for _ in range(4):
        assert file.readline() == b"HTTP/1.1 200 OK\r\n"
        length = 0
        while line := file.readline().strip():
            length = int(line.split()[1]) if line.startswith(b"Content-Length") else length
        told.append(file.read(length))
    assert (told[0], told[2], told[3]) == (b"%d" % len(body), b"%d" % len(body), b"9")
    assert told[1] == b""


def test_who_waits_to_be_asked_for_the_body_is_asked_once(world: World) -> None:
    """`Expect: 100-continue` is answered before the body has come, and the answer follows it."""
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
    client = world.client(head)
    assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(b"half")
    client.sendall(b"-more")
    assert (answer(client)[0], answer(world.client(head + b"half-more"))[0]) == (200, 200)
    old = world.client(head.replace(b"HTTP/1.1", b"HTTP/1.0"), b"half-more")
    assert answer(old)[0] == 200


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n", 413),
        (b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n", 413),
        (
            b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 99999\r\n\r\n",
            413,
        ),
        (b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n10001\r\n", 413),
        (
            b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"1\r\nx\r\n" * 30_000,
            413,
        ),
        (b"GET /" + b"a" * LARGEST_HEAD, 414),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * (LARGEST_HEAD // 6), 431),
        (b"GET /livez HTTP/1.1\nHost: a\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nnothing\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n", 400),
    ],
)
def test_what_is_too_much_or_hopeless_is_not_waited_for(world: World, raw: bytes, status: int) -> None:
    """It is refused with what has come so far, and the connection ends there."""
    client = world.client()
    with suppress(ConnectionError):  # it may be answered before it is said
        client.sendall(raw)
    told = answer(client)
    assert (told[0], told[1]["Connection"]) == (status, "close")
    assert ended(client)


def test_a_client_that_ends_in_the_middle_is_let_go(world: World) -> None:
    """Half a head is no request; half a body is one that the application finds too short."""
    client = world.client(HALF_HEAD)
    client.shutdown(socket.SHUT_WR)
    assert ended(client)
    client = world.client(HALF_BODY)
    client.shutdown(socket.SHUT_WR)
    assert (answer(client)[2], ended(client)) == (b"4", True)
    client = world.client(LIVEZ)
    client.shutdown(socket.SHUT_WR)
    assert (answer(client)[0], ended(client)) == (200, True)


def test_broken_connections_leave_nothing_behind(world: World) -> None:
    """Reset in whatever state they were in; all their files are closed again."""
    assert asked(world) == 200
    before = world.files()
    for _ in range(5):
        crowd = [
            world.client(said)
            for said in (b"", HALF_HEAD, HALF_BODY, LIVEZ, BIG_ONE)
            for _ in range(CROWD // 5)
        ]
        for client in crowd:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        assert asked(world) == 200
    until(lambda: world.files() <= before)


# Answers that are not taken


def test_a_large_answer_arrives_whole_at_a_slow_reader(world: World) -> None:
    """Whatever the client's pace; also the next one on the same connection, asked for before."""
    client = world.client(BIG_ONE + BIG_ONE + LIVEZ, buffer=4096)
    assert asked(world) == 200
    file = client.makefile("rb")
    for _ in range(2):
        while file.readline().strip():
            pass
        assert file.read(len(BIG)) == BIG
    assert file.readline() == b"HTTP/1.1 200 OK\r\n"


def test_files_are_served_as_they_are(world: World) -> None:
    """Whole, and only their heads to who asks for no more; the connection goes on."""
    file = max((ROOT / "app/web/static").iterdir(), key=lambda file: file.stat().st_size)
    client = world.client(f"HEAD /static/{file.name} HTTP/1.1\r\nHost: a\r\n\r\n".encode(), LIVEZ)
    reader = client.makefile("rb")
    assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
    while reader.readline().strip():
        pass
    assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
    whole = world.client(f"GET /static/{file.name} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert answer(whole)[2] == file.read_bytes()


def test_who_does_not_take_an_answer_holds_no_thread(world: World) -> None:
    """As many as there are threads and more; memory for them is bounded, and what is over it goes."""
    deaf = [world.client(BIG_ONE, buffer=4096) for _ in range(THREADS + 1)]
    assert [asked(world) for _ in range(20)] == [200] * 20
    deaf += [world.client(BIG_ONE, buffer=4096) for _ in range(10)]
    assert [asked(world) for _ in range(20)] == [200] * 20
    assert ended_early(deaf)
    for client in deaf:
        client.close()


def ended_early(clients: list[socket.socket]) -> bool:
    """Whether some were cut off in the middle of their answers, and not all."""
    short = 0
    for client in clients:
        total = 0
        with suppress(ConnectionResetError):
            while total <= len(BIG) and (data := client.recv(1 << 20)):
                total += len(data)
        short += total < len(BIG)
    return 0 < short < len(clients)


# Too many at once


def test_a_crowd_of_two_thousand_half_requests_keeps_nobody_out(world: World, many_files: int) -> None:
    """More connections than are taken: who has waited longest goes, and who has something to say is heard."""
    assert many_files >= 3000
    pid = world.worker()
    crowd = [world.client(HALF_HEAD) for _ in range(2000)]
    assert [asked(world) for _ in range(5)] == [200] * 5
    assert world.worker() == pid
    for client in crowd:
        client.close()


def test_few_open_files_bound_the_connections(serving: Serving, many_files: int) -> None:
    """Six hundred idle connections at a limit of four hundred files cost no process its life; it says so once."""
    world = serving(files=400)
    pid = world.worker()
    crowd = [world.client() for _ in range(600)]
    assert [asked(world) for _ in range(5)] == [200] * 5
    assert world.worker() == pid
    assert "Exception in worker process" not in world.log()
    assert world.log().count("web:accept:paused") == 1
    for client in crowd:
        client.close()


def test_a_process_without_a_file_left_waits_for_one(serving: Serving) -> None:
    """It says so once, goes on with the connections it has, and takes new ones when it can again."""
    world = serving(files=400)
    pid = world.worker()
    kept = world.client(LIVEZ)
    assert answer(kept)[0] == 200
    (world.hold / "files").touch()
    until((world.hold / "full").exists)
    waiting = [world.client(LIVEZ) for _ in range(5)]
    until(lambda: "web:accept:paused" in world.log())
    for _ in range(20):
        kept.sendall(LIVEZ)
        assert answer(kept)[0] == 200
    (world.hold / "files").unlink()
    assert {answer(client)[0] for client in waiting} == {200}
    assert world.worker() == pid
    assert world.log().count("web:accept:paused") == 1


# The end


def alive(world: World) -> int:
    """How many processes of this installation say that they live; one is the test's own."""
    with world.stage.services.database.read() as connection:
        return len(connection.execute(processes.select()).all())


def test_clients_that_hang_do_not_hold_up_the_end(serving: Serving) -> None:
    """Asked to stop, the server lets them go, ends in good order and leaves no row behind."""
    world = serving()
    assert alive(world) == 2
    hanging = [world.client(said) for said in (b"", HALF_HEAD, HALF_BODY) for _ in range(CROWD)]
    hanging += [world.client(BIG_ONE, buffer=4096) for _ in range(THREADS)]
    hanging += [world.client(LIVEZ) for _ in range(CROWD)]
    assert asked(world) == 200
    world.server.process.send_signal(signal.SIGTERM)
    assert world.server.process.wait(90) == 0
    assert "SIGKILL" not in world.log()
    assert alive(world) == 1


def test_a_request_that_never_ends_does_not_cost_the_good_end(serving: Serving) -> None:
    """The worker waits for it less long than gunicorn waits for the worker, and uses what is left to close."""
    world = serving("--graceful-timeout", "14")
    (world.hold / "hang").touch()
    world.client(b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n")
    assert asked(world) == 200
    world.server.process.send_signal(signal.SIGTERM)
    until(lambda: alive(world) == 1)
    (world.hold / "hang").unlink()
    assert world.server.process.wait(90) == 0
    assert "SIGKILL" not in world.log()


# When a request is whole

TOKENS = st.text("abcdefXYZ-", min_size=1, max_size=8).map(str.encode)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A request and its body."""
    body = draw(st.binary(max_size=60)) + draw(st.sampled_from([b"", b"\r\n\r\n", b"0\r\n\r\n", LIVEZ]))
    extra = b"".join(b"X-%b: %b\r\n" % (draw(TOKENS), draw(TOKENS)) for _ in range(draw(st.integers(0, 3))))
    lead = draw(st.sampled_from([b"", b"\r\n"]))
    kind = draw(st.sampled_from(["none", "length", "chunks"]))
    head = lead + b"PUT /" + draw(TOKENS) + b" HTTP/1.1\r\nHost: a\r\n" + extra
    if kind == "none":
        return head + b"\r\n", b""
    if kind == "length":
        name = draw(st.sampled_from([b"Content-Length: ", b"content-length:", b"CONTENT-LENGTH:\t"]))
        return head + name + b"%d\r\n\r\n" % len(body) + body, body
    cuts = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=4))})
    pieces = [body[start:end] for start, end in itertools.pairwise(cuts) if end > start]
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    trailer = draw(st.sampled_from([b"", b"Sum: 1\r\n"]))
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n", body


@given(request=requests(), more=st.sampled_from([b"", LIVEZ, HALF_HEAD]), data=st.data())
def test_a_request_is_whole_exactly_at_its_end(
    request: tuple[bytes, bytes], more: bytes, data: st.DataObject
) -> None:
    """However it is cut into pieces, and whatever follows; gunicorn's own parser finds its body in what is there."""
    raw, body = request
    stream = raw + more
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=6))
    arrival, at = Arrival(), 0
    for cut in sorted({*cuts, len(stream)} - {0}):
        whole = arrival.add(stream[at:cut])
        at = cut
        assert whole == (at >= len(raw)), (stream[:at], raw)
        if whole:
            break
    assert (arrival.refusal, arrival.cut) == (None, False)
    parsed = next(RequestParser(Config(), iter([bytes(arrival.raw)]), ("127.0.0.1", 1)))
    assert parsed.body.read() == body


@given(
    st.lists(
        st.sampled_from(
            [
                *(b"\r\n", b"\n", b"\r", b" ", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.0\r\n", b"Host: a\r\n"),
                *(b"Content-Length: 3\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n"),
                *(
                    b"transfer-encoding: gzip, chunked\r\n",
                    b"Expect: 100-continue\r\n",
                    b"3\r\nabc\r\n",
                    b"0\r\n",
                ),
                *(
                    b"\r\n\r\n",
                    b"abc",
                    b"\x00",
                    b"\xff",
                    b"ffffffffffffffffff\r\n",
                    b"Content-Length: 99999999\r\n",
                ),
            ]
        ),
        max_size=12,
    ),
    st.integers(1, 20),
)
def test_a_thread_is_never_left_to_wait(parts: list[bytes], step: int) -> None:
    """What counts as whole is refused by gunicorn's own parser, or read to its end without asking for more."""
    raw = b"".join(parts)
    arrival = Arrival()
    whole = any(arrival.add(raw[at : at + step]) for at in range(0, len(raw), step))
    if not whole or arrival.refusal is not None or arrival.cut:
        return
    source = Source(bytes(arrival.raw))
    try:
        next(RequestParser(Config(), source, ("127.0.0.1", 1))).body.read()
    except (ParseException, OSError, StopIteration):
        return
    assert not source.dry


class Source:
    """Bytes that have come; knows whether somebody wanted more."""

    def __init__(self, raw: bytes) -> None:
        self.dry = False
        self._raw = raw

    def __iter__(self) -> Iterator[bytes]:
        yield self._raw
        self.dry = True
