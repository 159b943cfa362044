"""Key sets that callers publish, fetched over real HTTP from a server that is slow, silent or gone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from joserfc.jwk import ECKey
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from app.access import keysets
from app.access.keysets import KeySets, PublicKey
from app.errors import Overloaded
from app.http_client import Deadlines, HttpClient
from tests.access_stage import JumpingClock
from tests.waiting import PATIENCE

WAITERS = 6


@dataclass
class Publisher:
    """A caller's server: publishes a key of another kid each time, when it is let, and counts who asked."""

    clock: JumpingClock
    asked: int = 0
    status: int = 200
    takes: float = 0.0  # seconds that pass while it answers
    arrived: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def answer(self, _: Request) -> Response:
        """Answer as told, once the gate is open."""
        self.asked += 1
        self.arrived.set()
        assert self.gate.wait(PATIENCE)
        self.clock.jump(self.takes)
        key = ECKey.generate_key("P-256", {"kid": f"k{self.asked}", "use": "sig"})
        body = {"keys": [key.as_dict(private=False)]}
        return Response(json.dumps(body), status=self.status, mimetype="application/json")


def kids(keys: tuple[PublicKey, ...]) -> list[str | None]:
    """The names of the keys."""
    return [key.kid for key in keys]


@pytest.fixture
def publisher(httpserver: HTTPServer) -> Iterator[Publisher]:
    """A server whose gate is open to begin with."""
    made = Publisher(JumpingClock())
    made.gate.set()
    httpserver.expect_request("/jwks").respond_with_handler(made.answer)
    yield made
    made.gate.set()


@pytest.fixture
def sets(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> KeySets:
    """Key sets of one process that are patient with a server that hangs."""
    monkeypatch.setattr(keysets, "_DEADLINES", Deadlines(connect=PATIENCE, read=PATIENCE, total=PATIENCE))
    return KeySets(HttpClient(publisher.clock, allow_loopback=True), publisher.clock)


def test_nobody_who_holds_keys_waits_for_a_server_that_hangs(
    publisher: Publisher, sets: KeySets, httpserver: HTTPServer
) -> None:
    """While one asks for news, the others go on with the keys there are: they are served before the server answers."""
    uri = httpserver.url_for("/jwks")
    assert kids(sets.fetch(uri, kid="k1")) == ["k1"]
    publisher.clock.jump(601)
    publisher.gate.clear()
    publisher.arrived.clear()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(sets.fetch, uri, kid="k1")
        assert publisher.arrived.wait(PATIENCE)
        assert [kids(sets.fetch(uri, kid="k1")) for _ in range(WAITERS)] == [["k1"]] * WAITERS
        assert publisher.asked == 2
        publisher.gate.set()
        assert kids(asking.result(PATIENCE)) == ["k2"]


def test_a_key_nobody_knows_is_no_wrong_key_while_the_news_is_on_its_way(
    publisher: Publisher, sets: KeySets, httpserver: HTTPServer
) -> None:
    """A caller that has just rotated is told to come again, neither refused nor kept waiting."""
    uri = httpserver.url_for("/jwks")
    sets.fetch(uri, kid="k1")
    publisher.clock.jump(61)
    publisher.gate.clear()
    publisher.arrived.clear()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(sets.fetch, uri, kid="k2")
        assert publisher.arrived.wait(PATIENCE)
        with pytest.raises(Overloaded):
            sets.fetch(uri, kid="k2")
        assert kids(sets.fetch(uri, kid="k1")) == ["k1"]
        publisher.gate.set()
        assert kids(asking.result(PATIENCE)) == ["k2"]
    assert kids(sets.fetch(uri, kid="k2")) == ["k2"]
    assert publisher.asked == 2


@pytest.mark.parametrize("held", [False, True])
def test_a_fetch_that_takes_long_is_not_due_again_when_it_ends(
    publisher: Publisher, sets: KeySets, httpserver: HTTPServer, held: bool
) -> None:
    """Those in line behind a fetch of six seconds share its result instead of making one each, one after the other."""
    uri = httpserver.url_for("/jwks")
    if held:
        sets.fetch(uri, kid="k1")
        publisher.clock.jump(601)
    before = publisher.asked
    publisher.status, publisher.takes = 500, 6.0
    for _ in range(WAITERS):
        if held:
            assert kids(sets.fetch(uri, kid="k1")) == ["k1"]
        else:
            with pytest.raises(Overloaded):
                sets.fetch(uri, kid="k1")
    assert publisher.asked == before + 1
    publisher.clock.jump(6)
    publisher.status, publisher.takes = 200, 0.0
    assert kids(sets.fetch(uri, kid=None)) == [f"k{before + 2}"]


def test_without_keys_a_crowd_waits_for_one_fetch(
    publisher: Publisher, sets: KeySets, httpserver: HTTPServer
) -> None:
    """Nobody can be let in without keys, so all wait for the same answer."""
    uri = httpserver.url_for("/jwks")
    publisher.gate.clear()
    with ThreadPoolExecutor(WAITERS) as pool:
        crowd = [pool.submit(sets.fetch, uri, kid="k1") for _ in range(WAITERS)]
        assert publisher.arrived.wait(PATIENCE)
        publisher.gate.set()
        assert [kids(one.result(PATIENCE)) for one in crowd] == [["k1"]] * WAITERS
    assert publisher.asked == 1
