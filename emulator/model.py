"""What an authorization server remembers: apps, accounts with their users, grants, codes and access tokens.

One set of records serves both vendors; a field that only one of them knows says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

VendorName = Literal["hubspot", "salesforce"]
RefreshPolicy = Literal["infinite", "zero", "lifetime", "inactivity"]


class SetUpError(ValueError):
    """Set-up data that names an unknown field, misses one or contradicts itself."""


class FromMapping:
    """Builds a record from JSON and refuses fields it does not know."""

    __slots__ = ()

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """Return the record; SetUpError names the fields that are unknown or missing."""
        known = {item.name for item in fields(cls)}  # type: ignore[arg-type]  # every subclass is a dataclass
        unknown = sorted(set(data) - known)
        if unknown:
            raise SetUpError(f"{cls.__name__}: unknown fields {unknown}, known are {sorted(known)}")
        for name, hint in get_type_hints(cls).items():
            if get_origin(hint) is Literal and name in data and data[name] not in get_args(hint):
                raise SetUpError(f"{name} is one of {get_args(hint)}, not {data[name]!r}")
        try:
            return cls(**data)
        except TypeError as error:
            raise SetUpError(f"{cls.__name__}: {error}") from error


@dataclass(slots=True)
class User(FromMapping):
    """A person in an account; `name` is the e-mail address (HubSpot) or the username (Salesforce)."""

    id: str
    name: str
    active: bool = True
    may_install: bool = True


@dataclass(slots=True)
class Account(FromMapping):
    """A HubSpot portal (id = hub id) or a Salesforce org (id = 18 characters).

    `scopes` None means the account may have every scope. `ip_blocked` and `instance_url` are Salesforce's,
    `migrating` (seconds for Retry-After), `domain` and `hublet` are HubSpot's.
    """

    id: str
    domain: str = "customer.example"
    users: list[User] = field(default_factory=list)
    scopes: list[str] | None = None
    active: bool = True
    hublet: str = "na1"
    migrating: int | None = None
    ip_blocked: bool = False
    instance_url: str | None = None

    def user(self, user_id: str | None) -> User | None:
        """Find a user by id or name; without an argument the first one."""
        if user_id is None:
            return self.users[0] if self.users else None
        return next((user for user in self.users if user_id in (user.id, user.name)), None)


@dataclass(slots=True)
class App(FromMapping):
    """A registered client. An app without `secrets` is a public client.

    `scopes` are HubSpot's required scopes or all that a Salesforce app may ask for. Lifetimes are seconds;
    None takes the vendor's default. `run_as`, `jwt_public_key`, `preauthorized`, `refresh_policy`,
    `introspect_all` and `sliding` exist at Salesforce only; `user_level` at HubSpot only.
    """

    client_id: str
    secrets: list[str] = field(default_factory=list)
    redirect_uris: list[str] = field(default_factory=list)
    scopes: list[str] = field(default_factory=list)
    optional_scopes: list[str] = field(default_factory=list)
    conditional_scopes: list[str] = field(default_factory=list)
    name: str = "Demo app"
    app_id: int = 0
    user_level: bool = False
    rotation: bool = False
    reuse_revokes: bool = True
    pkce_required: bool = False
    secret_required_for_refresh: bool = True
    token_lifetime: int | None = None
    sliding: bool = False
    jwt_public_key: str | None = None
    preauthorized: bool = True
    run_as: str | None = None
    refresh_policy: RefreshPolicy = "infinite"
    refresh_lifetime: int = 0
    introspect_all: bool = False
    lenient_redirects: bool = False

    @property
    def declared(self) -> set[str]:
        """Every scope that the app's settings mention."""
        return {*self.scopes, *self.optional_scopes, *self.conditional_scopes}


@dataclass(slots=True)
class Access:
    """An access token with its life in epoch seconds; `revoked` says why it died early."""

    token: str
    sha256: str
    grant_id: str
    issued_at: float
    expires_at: float
    lifetime: float
    revoked: str | None = None
    revoked_at: float = 0.0


@dataclass(slots=True)
class Grant:
    """One approval: who let which app into which account, with the refresh token that stands for it.

    `revoked` speaks of the refresh token alone: at HubSpot access tokens outlive it.
    """

    id: str
    client_id: str
    account_id: str
    user_id: str
    scopes: list[str]
    kind: str
    created_at: float
    last_used_at: float
    refresh: str | None = None
    voided: set[str] = field(default_factory=set)
    rotations: int = 0
    revoked: str | None = None
    revoked_at: float = 0.0
    access: list[Access] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether the refresh token would still be honoured."""
        return self.revoked is None and self.refresh is not None


@dataclass(slots=True)
class Code:
    """An authorization code on its way to the callback (RFC 6749 section 4.1.2)."""

    value: str
    client_id: str
    account_id: str
    user_id: str
    scopes: list[str]
    redirect_uri: str
    challenge: str | None
    expires_at: float
    used: bool = False
