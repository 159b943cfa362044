"""Callers that ask for tokens all the time and write down what they got."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.chaos.hosts import Host

__all__ = ["Answer", "Caller", "Probers"]

_TIMEOUT: Final = 120.0
_OUT_OF_REACH: Final = 0.05  # seconds before a prober tries again to reach a host that is not there


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request came to; times are epoch seconds, `status` 0 means that no answer came.

    `accepted` tells whether the connection was made, so that the server may have read the request.
    """

    host: Host
    name: str
    begin: float
    end: float
    status: int
    digest: str = ""
    expires_in: int = 0
    code: str = ""
    accepted: bool = True


class Caller:
    """One socket to one host, opened again when it breaks; for one thread."""

    def __init__(self, host: Host, credentials: str, *, timeout: float = _TIMEOUT) -> None:
        self._host = host
        self._headers = {"Authorization": f"Basic {credentials}"}
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None

    def token(self, name: str, query: str) -> Answer:
        """Ask for the token of a connection."""
        return self.ask(name, "GET", f"/v1/connections/{name}/token?{query}")

    def ask(self, name: str, method: str, path: str, *, body: dict[str, Any] | None = None) -> Answer:
        """Send a request about a connection and read the answer."""
        begin, connected = time.time(), False
        try:
            connection = self._connected()
            connected = True
            headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
            connection.request(method, path, body=None if body is None else json.dumps(body), headers=headers)
            response = connection.getresponse()
            said = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            self.close()
            return Answer(self._host, name, begin, time.time(), 0, accepted=connected)
        return _read(self._host, name, begin, response.status, said)

    def close(self) -> None:
        """Close the socket; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> http.client.HTTPConnection:
        if self._connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._host.port, timeout=self._timeout)
            connection.connect()
            self._connection = connection
        return self._connection


def _read(host: Host, name: str, begin: float, status: int, said: dict[str, Any]) -> Answer:
    end = time.time()
    if status != 200 or "access_token" not in said:
        return Answer(
            host, name, begin, end, status, code=f"{said.get('code', '')}: {said.get('detail', '')}"
        )
    digest = hashlib.sha256(said["access_token"].encode()).hexdigest()
    return Answer(host, name, begin, end, status, digest, said["expires_in"])


class Probers:
    """Threads that ask the hosts for tokens until told to stop; use it as a context manager.

    Each host has threads of its own, so that one that is frozen holds up nobody who asks another. `rate` is requests per
    second and thread.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        names: Sequence[str],
        credentials: str,
        *,
        min_ttl: float,
        seed: int,
        threads: int = 2,
        rate: float = 8.0,
        max_wait: float = 1.0,
    ) -> None:
        self.min_ttl = min_ttl
        self._hosts = tuple(hosts)
        self._names = list(names)
        self._query = f"min_ttl={min_ttl:g}&max_wait={max_wait:g}"
        self._credentials = credentials
        self._pause = 1 / rate
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._answers: list[Answer] = []
        self._threads = [
            threading.Thread(target=self._probe, args=(host, seed * 1000 + number), daemon=True)
            for number, host in enumerate([host for host in hosts for _ in range(threads)])
        ]

    def __enter__(self) -> Probers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_TIMEOUT)

    def ask_everywhere(self, names: Sequence[str]) -> None:
        """Ask every host once for each of these, so that it knows them."""
        for host in self._hosts:
            caller = Caller(host, self._credentials)
            for name in names:
                self._keep(caller.token(name, self._query))
            caller.close()

    def answers(self) -> list[Answer]:
        """Everything so far, by the moment of the answer."""
        with self._lock:
            return sorted(self._answers, key=lambda answer: answer.end)

    def _probe(self, host: Host, seed: int) -> None:
        pick = random.Random(seed)
        caller = Caller(host, self._credentials)
        while not self._stop.wait(self._pause * pick.uniform(0.5, 1.5)):
            answer = caller.token(pick.choice(self._names), self._query)
            self._keep(answer)
            if not answer.status:
                self._stop.wait(_OUT_OF_REACH)
        caller.close()

    def _keep(self, answer: Answer) -> None:
        with self._lock:
            self._answers.append(answer)
