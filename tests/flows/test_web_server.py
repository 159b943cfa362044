"""gunicorn over the real configuration: what a socket sees that a test client does not."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from emulator import Emulator
from tests.processes import Server, free_port, web
from tests.waiting import until
from tests.web_stage import Stage, environment, staged

TOKEN = "/v1/connections/acme/token"


@pytest.fixture
def served(vendors: Emulator, tmp_path: Path) -> Iterator[tuple[Stage, Server, str]]:
    """Give a broker with one connection, its server of two processes, and the address of its metrics."""
    url = f"sqlite:///{tmp_path / 'drawbridge.db'}"
    metrics = f"127.0.0.1:{free_port()}"
    more = {"METRICS_BIND": metrics, "WEB_WORKERS": "2", "WEB_THREADS": "4"}
    with staged(vendors, url, tmp_path / "state", **more) as stage:
        stage.connect(account="101", name="acme")
        environ = environment(vendors, url, tmp_path / "state", **more)
        with web(environ, log=tmp_path / "web.log", port=free_port()) as server:
            yield stage, server, metrics


def test_the_server_answers_as_the_application_does(
    served: tuple[Stage, Server, str], tmp_path: Path
) -> None:
    """Tokens, limits, metrics on their own address, and a log without a line per request or a secret in it."""
    stage, server, metrics = served
    auth = {"Authorization": stage.basic("caller")}
    answer = requests.get(f"{server.url}{TOKEN}", headers=auth, timeout=10)
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"

    too_large = requests.post(
        f"{server.url}{TOKEN}",
        data=iter([b" " * 40_000, b" " * 40_000]),  # chunked, so that no length says so beforehand
        headers={**auth, "Content-Type": "application/json"},
        timeout=10,
    )
    assert (too_large.status_code, too_large.json()["code"]) == (413, "too_large")

    huge = requests.get(
        f"{server.url}{TOKEN}", headers={"Authorization": "Bearer " + "a" * 20_000}, timeout=10
    )
    assert 400 <= huge.status_code < 500
    long = requests.get(f"{server.url}/v1/connections?after={'a' * 20_000}", headers=auth, timeout=10)
    assert 400 <= long.status_code < 500
    nearly = requests.get(
        f"{server.url}{TOKEN}", headers={"Authorization": "Bearer " + "a" * 8000}, timeout=10
    )
    assert (nearly.status_code, nearly.json()["code"]) == (401, "unauthenticated")

    assert requests.get(f"{server.url}/metrics", timeout=10).status_code == 404
    numbers = requests.get(f"http://{metrics}/metrics", timeout=10)
    assert numbers.status_code == 200
    assert "drawbridge_" in numbers.text
    for path in ("/v1/connections", "/admin", "/livez"):
        assert requests.get(f"http://{metrics}{path}", headers=auth, timeout=10).status_code == 404

    log = (tmp_path / "web.log").read_text()
    assert answer.json()["access_token"] not in log
    assert TOKEN not in log


def test_every_hand_out_is_in_the_numbers(served: tuple[Stage, Server, str]) -> None:
    """Whichever process and lane gave it: as a request, as a hand-out with its time, and as an audit entry."""
    stage, server, metrics = served
    with requests.Session() as session:
        session.headers["Authorization"] = stage.basic("caller")
        for _ in range(20):
            assert session.get(f"{server.url}{TOKEN}", timeout=10).status_code == 200

    expected = {
        'drawbridge_requests_total{route="/v1/connections/<name:name>/token",status="200"} 20.0',
        'drawbridge_hand_outs_total{provider="hubspot",way="kept"} 20.0',
        'drawbridge_hand_out_seconds_count{way="kept"} 20.0',
    }
    recorded = 'drawbridge_audit_entries_total{way="database"} '

    def counted() -> bool:
        lines = requests.get(f"http://{metrics}/metrics", timeout=10).text.splitlines()
        entries = sum(float(line.removeprefix(recorded)) for line in lines if line.startswith(recorded))
        return expected <= set(lines) and entries >= 20

    until(counted)


def test_two_credentials_in_two_headers_are_none(served: tuple[Stage, Server, str]) -> None:
    """A header sent twice is no well-formed credential, whichever of the two is right."""
    stage, server, _ = served
    lines = [f"GET {TOKEN} HTTP/1.1", "Host: broker.example", "Connection: close"]
    lines += [f"Authorization: {stage.basic('caller')}"] * 2
    with socket.create_connection((server.host, server.port), timeout=10) as raw:
        raw.sendall("\r\n".join([*lines, "", ""]).encode())
        status = raw.makefile("rb").readline()
    assert b" 401 " in status


def test_what_waits_is_answered_before_the_server_ends(served: tuple[Stage, Server, str]) -> None:
    """SIGTERM lets a refresh that runs come to its end, and its caller gets the token."""
    stage, server, _ = served
    stage.emulator.control.advance(1790)
    with stage.services.database.write() as transaction:
        connection = stage.services.store.named("acme")
        stage.services.store.change(transaction, connection.id, expires_at=stage.clock.now())
    stage.emulator.control.hubspot.misbehave("latency", delay=1.5)
    answers: list[requests.Response] = []

    def ask() -> None:
        url = f"{server.url}{TOKEN}"
        answers.append(requests.get(url, headers={"Authorization": stage.basic("caller")}, timeout=30))

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(200):
        if stage.emulator.control.hubspot.totals().open:
            break
        stage.clock.sleep(0.05)
    else:
        pytest.fail("the refresh never reached the provider")
    server.process.send_signal(signal.SIGTERM)
    asking.join(30)
    assert server.process.wait(60) == 0
    assert [answer.status_code for answer in answers] == [200]
    assert answers[0].json()["generation"] == 2
