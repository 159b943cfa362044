"""The closed sockets of the test process."""

import socket

import pytest

from tests.loopback import ForeignHostError


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.com", 80), ("::ffff:192.0.2.1", 80)])
def test_connection_to_another_host_is_refused(address: tuple[str, int]) -> None:
    """A test that reaches for another host fails by name and sends nothing."""
    with pytest.raises(ForeignHostError, match=address[0]):
        socket.create_connection(address, timeout=1)


def test_datagram_to_another_host_is_refused() -> None:
    """Datagrams need no connection, and are refused as well."""
    with socket.socket(type=socket.SOCK_DGRAM) as sender, pytest.raises(ForeignHostError):
        sender.sendto(b"x", ("192.0.2.1", 53))


def test_reserved_name_is_unknown_without_asking_a_resolver() -> None:
    """A name under .invalid fails as in production, so that tests of DNS failures need no network."""
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo("nowhere.invalid", 443)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_open(host: str) -> None:
    """A server on this machine can be talked to."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection((host, server.getsockname()[1]), timeout=5) as client,
    ):
        assert client.getpeername() == server.getsockname()
