"""Web and worker as the processes they are in service, on one database, watched from the provider's side."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from app.access.callers import Added
from app.access.permissions import Permission
from app.bootstrap import Services
from tests.installation import HUBSPOT, Installation, add_caller, connect, installation
from tests.processes import free_port, web, worker

CALLERS = 64


@pytest.fixture
def made(postgres_url: str, tmp_path: Path) -> Iterator[Installation]:
    """An installation on PostgreSQL."""
    with installation(postgres_url, tmp_path) as opened:
        yield opened


def credentials(added: Added) -> tuple[str, str]:
    """Client id and secret as requests wants them."""
    assert added.client_secret is not None
    return added.caller.client_id, added.client_secret.reveal()


def bring_expired(host: Services, made: Installation) -> str:
    """A connection that has a refresh token and no living access token; its account id."""
    grant = made.emulator.control.hubspot.grant(HUBSPOT)
    line = {
        "provider": "hubspot",
        "account_id": grant.account,
        "refresh_token": grant.refresh_token,
        "name": "expired",
    }
    (result,) = host.transfer.import_lines([json.dumps(line)])
    assert result.problem is None
    return grant.account


def patient_get(url: str, auth: tuple[str, str]) -> dict[str, Any]:
    """Ask as a good client does: come again when told to."""
    until = time.monotonic() + 60
    while True:
        answer = requests.get(url, auth=auth, timeout=60)
        if answer.status_code == 200 or time.monotonic() > until:
            body: dict[str, Any] = answer.json()
            return body
        assert answer.status_code == 503, answer.text
        time.sleep(float(answer.headers["Retry-After"]))


def test_sixty_four_callers_of_two_web_processes_and_a_worker_cost_one_refresh(
    made: Installation, tmp_path: Path
) -> None:
    """However many ask for an expired connection at once, the provider sees one refresh and all get its token."""
    host = made.host("command")
    account = bring_expired(host, made)
    auth = credentials(add_caller(host))
    made.emulator.control.hubspot.misbehave("latency", delay=1.0)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                web(
                    made.environment(host=f"web{number}", WEB_WORKERS="1", WEB_THREADS=str(CALLERS)),
                    log=tmp_path / f"web{number}.log",
                    port=free_port(),
                )
            )
            for number in range(2)
        ]
        stack.enter_context(worker(made.environment(host="worker"), log=tmp_path / "worker.log"))
        answers: list[dict[str, Any]] = []

        def ask(number: int) -> None:
            url = f"{servers[number % 2].url}/v1/connections/expired/token"
            answers.append(patient_get(url, auth))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == CALLERS
    assert len({answer["access_token"] for answer in answers}) == 1
    seen = [request for request in made.emulator.control.hubspot.requests() if request.account == account]
    assert [request.grant_type for request in seen] == ["refresh_token"]


def test_permission_taken_away_stops_the_next_request_on_another_process(
    made: Installation, tmp_path: Path
) -> None:
    """A second after the command returned, no process honours the permission any more."""
    host = made.host("command")
    connect(host, made, "hubspot", name="hubspot-one")
    auth = credentials(add_caller(host, "token:issue@hubspot-*"))
    path = "/v1/connections/hubspot-one/token"
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                web(
                    made.environment(host=f"web{number}", WEB_WORKERS="1"),
                    log=tmp_path / f"web{number}.log",
                    port=free_port(),
                )
            )
            for number in range(2)
        ]
        assert [requests.get(server.url + path, auth=auth, timeout=30).status_code for server in servers] == [
            200,
            200,
        ]
        host.callers.deny("reader", Permission.parse("token:issue@hubspot-*"))
        time.sleep(1.0)
        assert [requests.get(server.url + path, auth=auth, timeout=30).status_code for server in servers] == [
            403,
            403,
        ]

        host.callers.allow("reader", Permission.parse("token:issue@hubspot-*"))
        time.sleep(1.0)
        bearer = requests.post(
            f"{servers[0].url}/oauth/token", auth=auth, data={"grant_type": "client_credentials"}, timeout=30
        ).json()["access_token"]
        headers = {"Authorization": f"Bearer {bearer}"}
        assert requests.get(servers[1].url + path, headers=headers, timeout=30).status_code == 200
        host.callers.disable("reader")
        time.sleep(1.0)
        answers = [requests.get(server.url + path, headers=headers, timeout=30) for server in servers]
        assert [answer.status_code for answer in answers] == [401, 401]
        assert all("WWW-Authenticate" in answer.headers for answer in answers)


def test_disconnecting_is_carried_out_by_the_worker(made: Installation, tmp_path: Path) -> None:
    """DELETE answers 202, nothing is handed out from then on, and the worker revokes upstream and removes the row."""
    host = made.host("command")
    connect(host, made, "salesforce", name="salesforce-one")
    auth = credentials(add_caller(host, "token:issue@*", "connection:manage@*"))
    with (
        web(
            made.environment(host="web", WEB_WORKERS="1"), log=tmp_path / "web.log", port=free_port()
        ) as server,
        worker(made.environment(host="worker"), log=tmp_path / "worker.log"),
    ):
        url = f"{server.url}/v1/connections/salesforce-one"
        assert requests.delete(url, auth=auth, timeout=30).status_code == 202
        time.sleep(1.0)
        assert requests.get(f"{url}/token", auth=auth, timeout=30).status_code in (404, 409)
        until = time.monotonic() + 30
        while host.store.by_name("salesforce-one") is not None and time.monotonic() < until:
            time.sleep(0.1)
    assert host.store.by_name("salesforce-one") is None
    (grant,) = made.emulator.control.grants(vendor="salesforce")
    assert not grant.live


def test_basic_credentials_that_are_not_utf_8_are_refused(made: Installation, tmp_path: Path) -> None:
    """Bytes that are no text at all are an unknown credential, not a fault of ours."""
    with web(made_environment(made), log=tmp_path / "web.log", port=free_port()) as server:
        header = "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode()
        answer = requests.get(
            f"{server.url}/v1/connections/any/token", headers={"Authorization": header}, timeout=30
        )
    assert answer.status_code == 401
    assert answer.headers["Content-Type"] == "application/problem+json"


def made_environment(made: Installation) -> dict[str, str]:
    """The environment of a web process, on a database that is prepared."""
    made.host("command")
    return made.environment(host="web", WEB_WORKERS="1")
