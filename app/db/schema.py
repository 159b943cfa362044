"""Every table, in the words of the rest of the program.

`metadata` is the main database. `audit_metadata` is the trail: the same database on PostgreSQL, a file of its own on SQLite,
because each hand-out commits there and must not move the main file's `data_version` nor wait for its writers.

Sealed columns hold the bytes of `crypto.envelope`; the column beside each names the KEK, so that a rotation can find them.
Identifiers are random text, so that rows made on different hosts never collide.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from app.db.types import Instant, Json

__all__ = [
    "admin_logins",
    "admin_sessions",
    "apps",
    "assertions_seen",
    "attempts",
    "audit",
    "audit_metadata",
    "audit_register",
    "audit_register_head",
    "audit_writers",
    "callers",
    "connect_links",
    "connections",
    "epochs",
    "findings",
    "handshakes",
    "installation",
    "keks",
    "metadata",
    "notices",
    "permissions",
    "processes",
    "signing_keys",
]

_NAMES: Final = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
metadata: Final = MetaData(naming_convention=_NAMES)
audit_metadata: Final = MetaData(naming_convention=_NAMES)

installation: Final = Table(
    "installation",
    metadata,
    Column("one", Integer, primary_key=True),  # always 1: the table has one row
    Column("id", String(32), nullable=False),
    Column("public_url", Text, nullable=False),
    Column("active_kek", String(64), nullable=False),
    Column(
        "audit_key", LargeBinary, nullable=False
    ),  # sealed; keys the audit chain, so the database alone cannot forge it
    Column("kek_id", String(64), nullable=False),  # seals audit_key
    Column("created_at", Instant, nullable=False),
    Column("adopted_at", Instant),
)

# Counters that only grow; see db.epoch. "access": callers, permissions, keys. "connections": any connection row.
epochs: Final = Table(
    "epochs",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

processes: Final = Table(
    "processes",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("kind", String(16), nullable=False),  # web, worker, command
    Column("pid", Integer, nullable=False),
    Column("version", String(32), nullable=False),
    Column("kek_ids", Json, nullable=False),
    Column("skew_seconds", Float, nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("seen_at", Instant, nullable=False, index=True),
)

keks: Final = Table(
    "keks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("canary", LargeBinary, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("retired_at", Instant),
)

apps: Final = Table(
    "apps",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("provider", String(32), nullable=False),
    Column("name", String(63), nullable=False),
    Column("source", String(16), nullable=False),  # environment, database
    Column("client_id", Text, nullable=False),
    Column("secrets", LargeBinary),  # sealed list, newest first; null for source=environment
    Column("kek_id", String(64), index=True),
    Column("scopes", Json, nullable=False),
    Column("optional_scopes", Json, nullable=False),
    Column(
        "options", Json, nullable=False
    ),  # what the provider file understands: login_url, app_id, user_level, …
    Column("created_at", Instant, nullable=False),
    Column("version", Integer, nullable=False),  # +1 at each change: the fence and the sealing AAD
    # Circuit breaker and rate limit, shared by all processes.
    Column("failures", Integer, nullable=False, default=0, server_default="0"),
    Column("open_until", Instant),
    Column("open_reason", String(32)),
    UniqueConstraint("provider", "name"),
)

connections: Final = Table(
    "connections",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("provider", String(32), nullable=False),
    Column("app_id", String(32), ForeignKey("apps.id"), nullable=False, index=True),
    Column("grant_type", String(32), nullable=False),  # authorization_code, jwt_bearer, client_credentials
    Column("account_id", Text, nullable=False),
    Column("user_id", Text, nullable=False),  # empty where the identity is the account alone
    Column("identity", Text, nullable=False),  # the provider's key of (account, user): see Account.identity
    # Admin state and health have separate writers; see broker.connection for both diagrams.
    Column("admin_state", String(16), nullable=False),
    Column("health", String(24), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("sealed", LargeBinary),  # tokens; null once shredded
    Column("kek_id", String(64), index=True),
    Column("obtained_at", Instant),  # when the request that brought the access token was sent
    Column("expires_at", Instant, index=True),
    Column("life_seconds", Float),  # whole life of an access token as last learned
    Column("life_known", Boolean, nullable=False, default=False, server_default="0"),
    Column("rotation", String(16), nullable=False),  # unknown, seen, not_seen
    Column("scopes_wanted", Json, nullable=False),
    Column("scopes_granted", Json, nullable=False),
    Column("instance_url", Text),
    Column(
        "details", Json, nullable=False
    ),  # provider facts without personal data: hublet, app_install_id, …
    # The lease and the open attempt; both null when nobody refreshes.
    Column("lease_until", Instant),
    Column("open_attempt", String(32)),
    Column(
        "last_try", Boolean, nullable=False, default=False, server_default="0"
    ),  # the one replay after a lost answer
    # First sight of a refusal on the present generation: it counts when seen again.
    Column("refused_generation", BigInteger),
    Column("refused_at", Instant),
    Column("refused_code", String(64)),
    Column("failures", Integer, nullable=False, default=0, server_default="0"),
    Column("retry_at", Instant),  # back-off: no attempt before
    Column(
        "refresh_at", Instant, index=True
    ),  # when the worker should look at it next; null = never by itself
    Column("forced_at", Instant),
    Column("last_refresh_at", Instant),
    Column("last_used_at", Instant),
    Column("last_error", String(64)),
    Column("last_error_at", Instant),
    Column("revoke_since", Instant),  # disconnecting: when it began
    Column("exported_at", Instant),  # moved to another installation: never refreshed here again
    Column("created_at", Instant, nullable=False),
    Column("connected_at", Instant),
    Column("epoch", BigInteger, nullable=False, index=True),
    UniqueConstraint("app_id", "identity"),
)

attempts: Final = Table(
    "attempts",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("connection_id", String(32), nullable=False),
    Column("app_id", String(32), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("host", String(255), nullable=False),
    Column("process_id", String(32), nullable=False),
    Column("journal", Text, nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("finished_at", Instant),
    Column(
        "outcome", String(24)
    ),  # granted, refused, unavailable, misconfigured, unknown, not_sent, superseded
    Column("code", String(64)),
    Index("ix_attempts_app_id_finished_at", "app_id", "finished_at"),
    Index("ix_attempts_connection_id_started_at", "connection_id", "started_at"),
)

handshakes: Final = Table(
    "handshakes",
    metadata,
    Column("state_hash", String(64), primary_key=True),
    Column("browser_hash", String(64), nullable=False),
    Column("provider", String(32), nullable=False),
    Column("app_id", String(32), nullable=False),
    Column("connection_id", String(32)),  # a reconnect: the identity that must come back
    Column("name", String(63)),
    Column("sealed_verifier", LargeBinary),
    Column("kek_id", String(64), index=True),
    Column("redirect_uri", Text, nullable=False),
    Column("started_by", Text, nullable=False),  # audit actor: admin:…, link:…
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant, nullable=False, index=True),
    Column("used_at", Instant),
)

connect_links: Final = Table(
    "connect_links",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("app_id", String(32), nullable=False),
    Column("connection_id", String(32)),
    Column("name", String(63)),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant, nullable=False, index=True),
    Column("used_at", Instant),
)

callers: Final = Table(
    "callers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("client_id", String(64), nullable=False, unique=True),
    Column("secret_hash", String(64)),  # SHA-256 hex of a 256-bit random secret
    Column("jwks", Json),
    Column("jwks_uri", Text),
    Column("allow_ips", Json, nullable=False),
    Column("rate", Float),  # requests per second; null = the default
    Column("enabled", Boolean, nullable=False),
    Column("version", Integer, nullable=False),  # +1 when the secret or state changes: JWTs made before die
    Column("created_at", Instant, nullable=False),
    Column("last_used_at", Instant),
)

permissions: Final = Table(
    "permissions",
    metadata,
    Column("caller_id", String(32), ForeignKey("callers.id", ondelete="CASCADE"), primary_key=True),
    Column("action", String(32), primary_key=True),
    Column("pattern", String(128), primary_key=True),
    Column("created_at", Instant, nullable=False),
)

signing_keys: Final = Table(
    "signing_keys",
    metadata,
    Column("kid", String(64), primary_key=True),
    Column("public_jwk", Json, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("kek_id", String(64), nullable=False, index=True),
    Column("created_at", Instant, nullable=False),
    Column("signs_until", Instant, nullable=False),
    Column("verifies_until", Instant, nullable=False),
)

# `jti` of each private_key_jwt assertion: single use by the primary key (RFC 7523 §3).
assertions_seen: Final = Table(
    "assertions_seen",
    metadata,
    Column("key", String(64), primary_key=True),  # SHA-256 of (issuer, jti)
    Column("expires_at", Instant, nullable=False, index=True),
)

admin_logins: Final = Table(
    "admin_logins",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant, nullable=False, index=True),
    Column("used_at", Instant),
)

admin_sessions: Final = Table(
    "admin_sessions",
    metadata,
    Column("id_hash", String(64), primary_key=True),
    Column("csrf_hash", String(64), nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("seen_at", Instant, nullable=False),
    Column("expires_at", Instant, nullable=False, index=True),
)

findings: Final = Table(
    "findings",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(48), nullable=False),
    Column("app_id", String(32)),
    Column("connection_id", String(32)),
    Column("code", String(64)),
    Column("opened_at", Instant, nullable=False),
    Column("seen_at", Instant, nullable=False),
    Column("count", Integer, nullable=False),
    Column("closed_at", Instant),
    Column(
        "open_key", String(160), unique=True
    ),  # kind and subject while open, null once closed: one open finding each
)

notices: Final = Table(
    "notices",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("event", String(64), nullable=False),
    Column("body", Json, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("next_try_at", Instant, index=True),  # null once delivered or given up
    Column("tries", Integer, nullable=False),
    Column("delivered_at", Instant),
)

audit_writers: Final = Table(
    "audit_writers",
    audit_metadata,
    Column("id", String(32), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("kept_n", BigInteger, nullable=False),  # rows up to here were pruned;
    Column("kept_mac", LargeBinary, nullable=False),  # the chain goes on from this head
    Column("head_n", BigInteger, nullable=False),
    Column("head_mac", LargeBinary, nullable=False),
)

# Every writer from its beginning, so that none can vanish; see access.chain.
audit_register: Final = Table(
    "audit_register",
    audit_metadata,
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("writer", String(32), nullable=False, index=True),
    Column("sequence", BigInteger, nullable=False),  # the row of the writer it had come to;
    Column("mac", LargeBinary, nullable=False),  # and the mac of that
    Column("link", LargeBinary, nullable=False),
)

audit_register_head: Final = Table(
    "audit_register_head",
    audit_metadata,
    Column("one", Integer, primary_key=True, autoincrement=False),  # always 1: the table has one row
    Column("n", BigInteger, nullable=False),
    Column("link", LargeBinary, nullable=False),  # with its seal
)

audit: Final = Table(
    "audit",
    audit_metadata,
    Column("writer", String(32), primary_key=True),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Instant, nullable=False, index=True),
    Column("actor", Text, nullable=False),
    Column("action", String(48), nullable=False),
    Column("target", Text, nullable=False),
    Column("outcome", String(32), nullable=False),
    Column("detail", Json),
    Column("mac", LargeBinary, nullable=False),
)
