"""Keep sockets on this machine while tests run.

The interpreter tells an audit hook of every connection and every name look-up, whichever library made it,
so nothing needs to be patched and nothing can patch it back. The price: a hook stays for the life of the
process, so it asks a flag first, and libraries in C (libpq) connect below the interpreter, unseen.
"""

import ipaddress
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_closed = False
_hooked = False


class ForeignHostError(RuntimeError):
    """A test reached for a host other than this one. Not an OSError: code under test must not mistake it."""


@contextmanager
def loopback_only() -> Iterator[None]:
    """Refuse every connection and every name look-up that would leave this machine, in the whole process."""
    global _closed, _hooked
    if not _hooked:
        sys.addaudithook(_refuse_foreign)
        _hooked = True
    before, _closed = _closed, True
    try:
        yield
    finally:
        _closed = before


def _refuse_foreign(event: str, arguments: tuple[Any, ...]) -> None:
    if not _closed or not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        _, address = arguments
        # A pair: host and port. Unix sockets have a path, a connected socket's sendmsg has no address.
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise ForeignHostError(f"{event} to {address[0]}: tests talk to this machine only")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        _refuse_foreign_name(event, arguments[0])


# Without this the interpreter hides what a hook runs from debuggers and from coverage.
_refuse_foreign.__cantrace__ = True  # type: ignore[attr-defined]


def _refuse_foreign_name(event: str, name: str | bytes | None) -> None:
    if name is None or _is_local(name):
        return
    if _text(name).endswith((".invalid", ".invalid.")):
        # RFC 6761 section 6.4: such names never exist. Answered here as a resolver would, without asking one.
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    raise ForeignHostError(f"{event} of {_text(name)}: tests talk to this machine only")


def _is_local(host: str | bytes) -> bool:
    name = _text(host).rstrip(".").lower()
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        return _is_local_address(ipaddress.ip_address(name.partition("%")[0]))
    except ValueError:
        return False


def _is_local_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    # The unspecified address (0.0.0.0, ::) is where servers listen, and a connection to it stays here.
    return bool((mapped or address).is_loopback or (mapped or address).is_unspecified)


def _text(name: str | bytes) -> str:
    return name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
