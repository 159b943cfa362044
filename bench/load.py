"""A closed-loop HTTP load: so many sockets, each sending the next request when the last answer is there.

One process, one thread, epoll: light enough that the server under test and not the load is what is measured.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

__all__ = ["Result", "run"]

_CHUNK: Final = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run came to: latencies in seconds, sorted."""

    seconds: float
    latencies: list[float]
    statuses: Counter[int]

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """The latency below which that share of the answers came, in seconds."""
        if not self.latencies:
            return float("nan")
        return self.latencies[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


class _Client:
    __slots__ = ("began", "buffer", "request", "sock")

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.sock = socket.create_connection(address, timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request = request
        self.buffer = b""
        self.began = 0.0

    def send(self) -> None:
        self.began = time.perf_counter()
        self.sock.sendall(self.request)

    def receive(self) -> int | None:
        """The status when a whole answer is there; the server must keep the connection open."""
        data = self.sock.recv(_CHUNK)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return None
        self.buffer = self.buffer[end + 4 + length :]
        return int(head[9:12])


def run(host: str, port: int, request: bytes, *, sockets: int, seconds: float) -> Result:
    """Send `request` over and over on so many sockets for so long."""
    selector = selectors.DefaultSelector()
    clients = [_Client((host, port), request) for _ in range(sockets)]
    latencies: list[float] = []
    statuses: Counter[int] = Counter()
    began = time.perf_counter()
    until = began + seconds
    for client in clients:
        selector.register(client.sock, selectors.EVENT_READ, client)
        client.send()
    while (now := time.perf_counter()) < until:
        for key, _ in selector.select(until - now):
            client = key.data
            try:
                status = client.receive()
            except ConnectionError:
                # gunicorn may close a kept connection; a real client opens another one.
                selector.unregister(client.sock)
                client.sock.close()
                fresh = _Client((host, port), request)
                selector.register(fresh.sock, selectors.EVENT_READ, fresh)
                fresh.send()
                statuses[0] += 1
                continue
            if status is None:
                continue
            latencies.append(time.perf_counter() - client.began)
            statuses[status] += 1
            client.send()
    taken = time.perf_counter() - began
    for client in clients:
        client.sock.close()
    selector.close()
    latencies.sort()
    return Result(seconds=taken, latencies=latencies, statuses=statuses)


if __name__ == "__main__":
    import json

    target = json.loads(sys.stdin.read())
    result = run(
        target["host"],
        target["port"],
        target["request"].encode(),
        sockets=target["sockets"],
        seconds=target["seconds"],
    )
    print(
        json.dumps(
            {
                "rate": result.rate,
                "p50": result.percentile(0.5),
                "p99": result.percentile(0.99),
                "statuses": dict(result.statuses),
            }
        )
    )
