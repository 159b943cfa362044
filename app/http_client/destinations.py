"""Where requests may go: decided by purpose, first from the URL and then from the addresses its name stands
for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

__all__ = ["Destinations", "NotAllowed", "Purpose", "Target"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_LONGEST_URL: Final = 8192
_UNWANTED: Final = re.compile(r"[\x00-\x20\x7f\\]")
_PORTS: Final = {"http": 80, "https": 443}

# Special-purpose addresses (IANA registries, RFC 6890); listed here because what `ipaddress` calls global
# changes between Python releases.
_CLOSED_V4: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this host
            "10.0.0.0/8",  # private (RFC 1918)
            "100.64.0.0/10",  # shared by carriers (RFC 6598)
            "127.0.0.0/8",  # loopback
            "169.254.0.0/16",  # link-local; the metadata services of clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarking
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
        ),
    )
)
_OPEN_V6: Final = ipaddress.IPv6Network("2000::/3")
"""All global unicast there is: leaves out ::1, IPv4-mapped, NAT64 64:ff9b::, unique local, link-local,
multicast.
"""
_CLOSED_V6: Final = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments, Teredo among them: an IPv4 address inside
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4: an IPv4 address inside
            "3fff::/20",  # documentation
        ),
    )
)


class Purpose(StrEnum):
    """Why a request is made; it decides where it may go."""

    PROVIDER = "provider"
    """The hosts named in the settings and app registrations, and no others."""
    INSTANCE = "instance"
    """A host a provider named in an answer: only under that provider's own domains."""
    OPERATOR = "operator"
    """An https URL an operator gave: anywhere on the public internet, nowhere inside."""


class NotAllowed(Exception):
    """A request may not go there; `reason` is a machine word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be asked: where to connect, which name to verify, what to ask for."""

    scheme: str
    host: str
    port: int
    path: str
    purpose: Purpose
    loopback: bool

    @property
    def origin(self) -> str:
        """Scheme, host and port, as they are compared with the list."""
        return f"{self.scheme}://{_bracketed(self.host)}:{self.port}"

    @property
    def authority(self) -> str:
        """The Host header (RFC 9110 §7.2)."""
        host = _bracketed(self.host)
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __repr__(self) -> str:
        return f"Target({self.scheme}://{self.authority})"  # a path or query may hold a token


class Destinations:
    """The list of where this program may send requests."""

    def __init__(
        self, providers: Iterable[str], instance_domains: Sequence[str], *, allow_loopback: bool
    ) -> None:
        self._allow_loopback = allow_loopback
        self._instance_domains = tuple(f".{domain.lower().strip('.')}" for domain in instance_domains)
        self._providers: frozenset[str] = frozenset()
        for provider in providers:
            self.add(provider)

    def add(self, provider: str) -> None:
        """Let PROVIDER requests go to this host (https) or to the origin of this URL.

        Raises ValueError when it is neither.
        """
        url = provider if "://" in provider else f"https://{provider}"
        try:
            origin = _parsed(url, Purpose.PROVIDER).origin
        except NotAllowed:
            raise ValueError("a provider is named by a host or an http(s) URL") from None
        self._providers = self._providers | {origin}

    def check(self, url: str, purpose: Purpose) -> Target:
        """The URL taken apart, if it may be asked for this purpose. Raises NotAllowed."""
        target = _parsed(url, purpose)
        if target.loopback and not self._allow_loopback:
            raise NotAllowed("loopback")
        if target.scheme != "https" and not target.loopback:
            raise NotAllowed("not_https")
        if not self._listed(target):
            raise NotAllowed("host_not_allowed")
        return target

    def check_address(self, address: Address, target: Target) -> None:
        """Whether this address may be connected to for the target. Raises NotAllowed.

        A loopback name must stay on this machine, an operator's URL must leave it and its network.
        Providers and instances are held by the list of names and by their certificates; their addresses may
        be a private link.
        """
        if target.loopback:
            if not address.is_loopback:
                raise NotAllowed("address_not_allowed")
        elif target.purpose is Purpose.OPERATOR and not self._public(address):
            raise NotAllowed("address_not_allowed")

    def _listed(self, target: Target) -> bool:
        match target.purpose:
            case Purpose.PROVIDER:
                return target.origin in self._providers
            case Purpose.INSTANCE:
                own = target.host.endswith(self._instance_domains) and target.port == _PORTS["https"]
                return own or target.loopback
            case Purpose.OPERATOR:
                return True

    def _public(self, address: Address) -> bool:
        if self._allow_loopback and address.is_loopback:
            return True
        if isinstance(address, ipaddress.IPv4Address):
            return not any(address in network for network in _CLOSED_V4)
        return address in _OPEN_V6 and not any(address in network for network in _CLOSED_V6)


def _parsed(url: str, purpose: Purpose) -> Target:
    if len(url) > _LONGEST_URL or _UNWANTED.search(url):
        raise NotAllowed("bad_url")
    try:
        parts = parse_url(url)
    except LocationParseError:
        raise NotAllowed("bad_url") from None
    if parts.scheme not in _PORTS or not parts.host or parts.auth is not None or parts.fragment:
        raise NotAllowed("bad_url")
    host = parts.host.strip("[]").rstrip(".").lower()
    return Target(
        scheme=parts.scheme,
        host=host,
        port=parts.port or _PORTS[parts.scheme],
        path=parts.request_uri,
        purpose=purpose,
        loopback=_is_loopback(host),
    )


def _is_loopback(host: str) -> bool:
    """Names that mean this machine by definition (RFC 6761 §6.3) and literal loopback addresses."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
