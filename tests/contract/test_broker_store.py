"""The connections table on both databases: every write is fenced, and two hosts never get the same thing."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from app.broker.connection import AdminState, Connection, ConnectionId, Health, Rotation, Tokens
from app.broker.journal import FACT_NAMES, FACT_STAMPS, Entry
from app.broker.store import Store, check_name, new_id
from app.clock import Clock
from app.crypto.envelope import Sealer
from app.crypto.keyring import Keyring
from app.db.engine import Database
from app.db.epoch import EpochWatch
from app.db.migrate import migrate
from app.db.schema import apps, connections
from app.errors import InvalidRequest, NotFound, Unopenable
from app.secret import Secret
from tests.broker_world import together
from tests.postgres import ExternalServer, PostgresServer

KEYRING = '{"active":"k1","keys":{"k1":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}}'
APP = "a" * 32


@dataclass
class Host:
    """One process's way to the shared table."""

    clock: Clock
    database: Database
    store: Store

    def put(self, **changes: object) -> Connection:
        """A new row with tokens; fields may be given."""
        unique = secrets.token_hex(4)
        fresh = Connection(
            id=ConnectionId(new_id()),
            name=f"c-{unique}",
            provider="salesforce",
            app_id=APP,
            grant_type="authorization_code",
            account_id="00D",
            user_id="005",
            identity=unique,
            generation=1,
            expires_at=self.clock.now() + timedelta(hours=1),
            created_at=self.clock.now(),
        )
        connection = replace(fresh, **changes)  # type: ignore[arg-type]
        sealed = self.store.seal(tokens(1), connection.id, generation=connection.generation)
        with self.database.write() as transaction:
            self.store.insert(transaction, connection, sealed)
        return connection

    def lease(self, seen: Connection, *, attempt: str = "x", seconds: float = 30.0) -> bool:
        """Try to take the lease."""
        with self.database.write() as transaction:
            return self.store.take_lease(transaction, seen, attempt=attempt, seconds=seconds, last_try=False)

    def save(self, after: Connection, number: int = 2) -> bool:
        """Try to store a new generation."""
        sealed = self.store.seal(tokens(number), after.id, generation=after.generation)
        with self.database.write() as transaction:
            return self.store.save_tokens(transaction, after, sealed) != 0

    def set(self, connection: Connection, **values: object) -> None:
        """Change columns past the store."""
        with self.database.write() as transaction:
            row = connections.c.id == connection.id
            transaction.execute(sa.update(connections).where(row).values(**values))

    def get(self, connection: Connection) -> Connection:
        """The row as it is now."""
        found = self.store.get(connection.id)
        assert found is not None
        return found

    def epoch(self) -> int:
        """Where the connections epoch stands."""
        return EpochWatch(self.database, self.clock).look().connections


def tokens(number: int) -> Tokens:
    """Tokens that can be told apart."""
    return Tokens(access_token=Secret(f"access-{number}"), refresh_token=Secret(f"refresh-{number}"))


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def standing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Host, Host]]:
    """Two hosts on one migrated database of each kind, for all tests of this file."""
    directory: Path = tmp_path_factory.mktemp("store")
    url = f"sqlite:///{directory / 'drawbridge.db'}"
    if request.param == "postgresql":
        server: PostgresServer | ExternalServer = request.getfixturevalue("postgres_server")
        url = server.create_database()
    one, two = (open_host(url, directory / name) for name in ("one", "two"))
    migrate(one.database, one.database)
    with one.database.write() as transaction:
        transaction.execute(
            sa.insert(apps).values(
                id=APP,
                provider="salesforce",
                name="default",
                source="environment",
                client_id="client",
                scopes=[],
                optional_scopes=[],
                options={},
                created_at=one.clock.now(),
                version=1,
            )
        )
    yield one, two
    for host in (one, two):
        host.database.dispose()


@pytest.fixture
def hosts(standing: tuple[Host, Host]) -> tuple[Host, Host]:
    """The two hosts, and no connection yet."""
    with standing[0].database.write() as transaction:
        transaction.execute(sa.delete(connections))
    return standing


def open_host(url: str, state_dir: Path) -> Host:
    """A host with pool, clock and keyring of its own."""
    clock = Clock()
    database = Database(url, clock=clock, state_dir=state_dir)
    sealer = Sealer(Keyring.from_text(Secret(KEYRING)), lambda: "k1")
    return Host(clock, database, Store(database, sealer))


# The lease


def test_a_lease_goes_to_one(hosts: tuple[Host, Host]) -> None:
    """Of many threads on two hosts that read the same row exactly one gets the lease."""
    connection = hosts[0].put()
    for _ in range(3):
        seen = hosts[0].get(connection)
        won = together(24, lambda n, seen=seen: hosts[n % 2].lease(seen, attempt=f"attempt{n}"))
        assert won.count(True) == 1
        assert hosts[1].get(connection).open_attempt == f"attempt{won.index(True)}"
        hosts[0].set(connection, lease_until=None, open_attempt=None)


def test_a_lease_is_free_again_when_its_time_is_over(hosts: tuple[Host, Host]) -> None:
    """Time is the database's: under the lease nobody else gets it; over, whoever has seen the open attempt does."""
    one, two = hosts
    connection = one.put()
    assert one.lease(connection, attempt="first")
    seen = two.get(connection)
    assert seen.lease_until is not None
    assert seen.lease_until > two.clock.now()
    assert not two.lease(seen, attempt="second")
    one.set(connection, lease_until=one.clock.now() - timedelta(seconds=1))
    assert not two.lease(connection, attempt="second"), "what was read before the attempt is out of date"
    assert two.lease(two.get(connection), attempt="second")


@pytest.mark.parametrize(
    "moved",
    [
        {"generation": 2},
        {"admin_state": "disabled"},
        {"health": "needs_reconnect"},
        {"open_attempt": "other"},
    ],
)
def test_a_lease_needs_the_row_as_it_was_read(hosts: tuple[Host, Host], moved: dict[str, object]) -> None:
    """Generation, admin state, health and open attempt must be those that were looked at."""
    connection = hosts[0].put()
    hosts[1].set(connection, **moved)
    assert not hosts[0].lease(connection)


def test_a_lease_is_not_for_a_connection_that_moved_away(hosts: tuple[Host, Host]) -> None:
    """Exported between looking and taking: not ours to refresh any more."""
    connection = hosts[0].put()
    hosts[1].set(connection, exported_at=hosts[1].clock.now())
    assert not hosts[0].lease(connection)


def test_a_last_try_stays_one(hosts: tuple[Host, Host]) -> None:
    """Once a try is the last, taking the lease again does not make it one of many."""
    one, _ = hosts
    connection = one.put()
    with one.database.write() as transaction:
        assert one.store.take_lease(transaction, connection, attempt="a", seconds=0.0, last_try=True)
    one.set(connection, lease_until=None)
    assert one.lease(one.get(connection), attempt="b")
    assert one.get(connection).last_try


# Fences


def test_a_generation_is_stored_once(hosts: tuple[Host, Host]) -> None:
    """Of many who bring generation two, one stores it, and the row opens to that one's tokens."""
    connection = hosts[0].put()
    after = replace(connection, generation=2)
    saved = together(8, lambda n: hosts[n % 2].save(after, number=n))
    assert saved.count(True) == 1
    found = hosts[1].store.tokens_of(connection.id)
    assert found is not None
    assert found[0].generation == 2
    assert found[1] == tokens(saved.index(True))


def test_a_paused_holder_saves_while_the_generation_stands(hosts: tuple[Host, Host]) -> None:
    """The fence is the generation, not the owner: the only good token is stored by whoever has it."""
    one, two = hosts
    connection = one.put()
    one.lease(connection, attempt="paused", seconds=0.0)
    one.set(connection, lease_until=None)
    assert two.lease(two.get(connection), attempt="impatient")
    assert one.save(replace(connection, generation=2))
    row = two.get(connection)
    assert (row.generation, row.open_attempt, row.lease_until) == (2, None, None)


def test_a_late_failure_changes_nothing(hosts: tuple[Host, Host]) -> None:
    """What has no tokens to save needs both the generation and the lease."""
    one, two = hosts
    connection = one.put()
    one.lease(connection, attempt="late", seconds=0.0)
    one.set(connection, lease_until=None)
    two.lease(two.get(connection), attempt="present")
    failed = replace(connection, health=Health.NEEDS_RECONNECT)
    with one.database.write() as transaction:
        assert not one.store.save_health(transaction, failed, attempt="late")
        assert one.store.save_health(transaction, failed, attempt="present")
    two.save(replace(connection, generation=2))
    with one.database.write() as transaction:
        assert not one.store.save_health(transaction, failed, attempt="present")


def test_a_save_leaves_the_admins_columns_alone(hosts: tuple[Host, Host]) -> None:
    """Disabled and renamed while the provider was asked: the token is stored and both stay."""
    one, two = hosts
    connection = one.put()
    two.set(connection, admin_state=AdminState.DISABLED.value, name="renamed")
    assert one.save(replace(connection, generation=2, rotation=Rotation.SEEN))
    row = two.get(connection)
    assert (row.name, row.admin_state, row.rotation) == ("renamed", AdminState.DISABLED, Rotation.SEEN)


def test_a_row_that_was_installed_anew_is_not_removed(hosts: tuple[Host, Host]) -> None:
    """Removing needs the generation that was revoked, and the mark that it is to go."""
    one, _ = hosts
    connection = one.put(admin_state=AdminState.DISCONNECTING)
    one.save(replace(connection, generation=2))
    with one.database.write() as transaction:
        assert not one.store.remove(transaction, connection.id, generation=1)
    one.set(connection, admin_state="enabled")
    with one.database.write() as transaction:
        assert not one.store.remove(transaction, connection.id, generation=2)
    one.set(connection, admin_state="disconnecting")
    with one.database.write() as transaction:
        assert one.store.remove(transaction, connection.id, generation=2)
    assert one.store.get(connection.id) is None


def test_replaying_a_journal_is_fenced_like_saving(hosts: tuple[Host, Host]) -> None:
    """An entry is stored over the generation before it and does nothing the second time or later."""
    one, two = hosts
    connection = one.put(open_attempt="dead", last_try=True, failures=3, health=Health.UNCERTAIN)
    facts = dict.fromkeys((*FACT_STAMPS, *FACT_NAMES)) | {
        "expires_at": 1_900_000_000_000_000,
        "rotation": "seen",
        "scopes_granted": ["api"],
        "life_known": True,
    }
    sealed = one.store.seal(tokens(2), connection.id, generation=2)
    entry = Entry(attempt="dead", connection=connection.id, generation=2, sealed=sealed, facts=facts)
    with one.database.write() as transaction:
        assert one.store.replay(transaction, entry)
    with two.database.write() as transaction:
        assert not two.store.replay(transaction, entry)
    row, stored = two.store.tokens_of(connection.id) or (connection, Tokens())
    assert stored == tokens(2)
    assert (row.generation, row.health, row.open_attempt, row.last_try, row.failures) == (
        2,
        Health.HEALTHY,
        None,
        False,
        0,
    )
    assert row.expires_at == datetime.fromtimestamp(1_900_000_000, UTC)


# Sealing


def test_a_record_opens_only_in_its_row_and_generation(hosts: tuple[Host, Host]) -> None:
    """Sealed bytes copied to another row, or kept from an older generation, do not open."""
    one, _ = hosts
    first, second = one.put(), one.put()
    with one.database.write() as transaction:
        sealed = transaction.scalar(sa.select(connections.c.sealed).where(connections.c.id == first.id))
    one.set(second, sealed=sealed)
    with pytest.raises(Unopenable):
        one.store.tokens_of(second.id)
    one.set(first, generation=2)
    with pytest.raises(Unopenable):
        one.store.read_with_tokens(first.name)


def test_a_row_without_tokens_opens_to_none(hosts: tuple[Host, Host]) -> None:
    """A shredded record is no error."""
    connection = hosts[0].put()
    hosts[0].set(connection, sealed=None, kek_id=None)
    found = hosts[0].store.tokens_of(connection.id)
    assert found is not None
    assert found[1] == Tokens()


# The worker's share


def test_two_hosts_share_what_is_due(hosts: tuple[Host, Host]) -> None:
    """Claims at the same moment from two hosts never overlap, and together take everything that is due."""
    one, _ = hosts
    now = one.clock.now()
    due = [one.put(refresh_at=now - timedelta(seconds=n)).id for n in range(60)]
    one.put(refresh_at=now + timedelta(hours=1))
    one.put(refresh_at=None)

    def claim(number: int) -> list[str]:
        taken: list[str] = []
        for _ in range(4):
            claimed = hosts[number % 2].store.claim_due(limit=10, hold=60.0)
            taken += [connection.id for connection in claimed]
        return taken

    taken = [each for share in together(4, claim) for each in share]
    assert len(taken) == len(set(taken)), "one connection was given to two"
    rest = [connection.id for connection in one.store.claim_due(limit=100, hold=60.0)]
    assert sorted(taken + rest) == sorted(due)


def test_the_most_overdue_comes_first_and_its_hold_ends(hosts: tuple[Host, Host]) -> None:
    """A claimed row is left alone for its hold and due again after it, should its claimer have died."""
    one, two = hosts
    now = one.clock.now()
    late, later = one.put(refresh_at=now - timedelta(hours=1)), one.put(refresh_at=now - timedelta(hours=2))
    assert [each.id for each in one.store.claim_due(limit=1, hold=0.0)] == [later.id]
    one.set(later, refresh_at=now - timedelta(hours=2))
    assert {each.id for each in two.store.claim_due(limit=5, hold=60.0)} == {later.id, late.id}
    assert two.store.claim_due(limit=5, hold=60.0) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"admin_state": AdminState.DISABLED},
        {"admin_state": AdminState.DISCONNECTING},
        {"health": Health.NEEDS_RECONNECT},
        {"exported_at": datetime(2026, 1, 1, tzinfo=UTC)},
    ],
)
def test_what_may_not_be_refreshed_is_not_claimed(
    hosts: tuple[Host, Host], changes: dict[str, object]
) -> None:
    """Disabled, on its way out, lost or moved elsewhere: due or not, it is nobody's work."""
    one, _ = hosts
    one.put(refresh_at=one.clock.now() - timedelta(hours=1), **changes)
    assert one.store.claim_due(limit=5, hold=60.0) == []


def test_two_hosts_share_what_is_to_be_revoked(hosts: tuple[Host, Host]) -> None:
    """The same for connections that wait to be revoked; one whose retry has not come yet stays."""
    one, two = hosts
    marked = {one.put(admin_state=AdminState.DISCONNECTING).id for _ in range(10)}
    one.put(admin_state=AdminState.DISCONNECTING, retry_at=one.clock.now() + timedelta(hours=1))
    one.put()
    with ThreadPoolExecutor(2) as pool:
        shares = list(pool.map(lambda host: host.store.claim_disconnecting(limit=10, hold=60.0), (one, two)))
    taken = [connection.id for share in shares for connection in share]
    assert len(taken) == len(set(taken))
    rest = [connection.id for connection in one.store.claim_disconnecting(limit=10, hold=60.0)]
    assert set(taken + rest) == marked


def test_a_forced_refresh_is_given_to_one(hosts: tuple[Host, Host]) -> None:
    """Of many who want to force a refresh one may, and the next only when the time is over."""
    connection = hosts[0].put()
    won = together(12, lambda n: hosts[n % 2].store.claim_forced(connection.id, every=30.0))
    assert won.count(True) == 1
    hosts[0].set(connection, forced_at=hosts[0].clock.now() - timedelta(seconds=31))
    assert hosts[1].store.claim_forced(connection.id, every=30.0)
    assert not hosts[1].store.claim_forced("nobody", every=30.0)


def test_use_brings_an_idle_connection_back_to_the_worker(hosts: tuple[Host, Host]) -> None:
    """One only kept alive is looked at again once somebody asks for it; a scheduled one keeps its time."""
    one, _ = hosts
    now = one.clock.now()
    idle = one.put(refresh_at=now + timedelta(days=20))
    minted = one.put(refresh_at=None, grant_type="jwt_bearer")
    regular = one.put(refresh_at=now + timedelta(minutes=50))
    lost = one.put(refresh_at=None, health=Health.NEEDS_RECONNECT)
    one.store.mark_used([idle.id, minted.id, regular.id, lost.id, "nobody"], now=now)
    assert one.get(idle).refresh_at == one.get(minted).refresh_at == now
    assert one.get(regular).refresh_at == regular.refresh_at
    assert one.get(lost).refresh_at is None
    assert one.get(regular).last_used_at == now
    one.store.mark_used([], now=now)


# Reading


def test_pages_follow_one_another_without_gap(hosts: tuple[Host, Host]) -> None:
    """Paging by name sees every row once, also while rows come and go before the page's end."""
    one, two = hosts
    names = [f"page-{number:03}" for number in range(25)]
    for name in names:
        one.put(name=name)
    seen: list[str] = []
    after = ""
    while page := two.store.page(after=after, limit=7):
        seen += [connection.name for connection in page]
        after = page[-1].name
        one.put(name=f"a-{len(seen):03}")
    assert seen == names


def test_a_page_can_be_of_one_app_or_state(hosts: tuple[Host, Host]) -> None:
    """The state is the one an admin sees: a disabled connection is disabled whatever its health."""
    one, _ = hosts
    healthy = one.put()
    lost = one.put(health=Health.NEEDS_RECONNECT)
    off = one.put(health=Health.NEEDS_RECONNECT, admin_state=AdminState.DISABLED)
    assert [each.id for each in one.store.page(state="healthy")] == [healthy.id]
    assert [each.id for each in one.store.page(state="needs_reconnect")] == [lost.id]
    assert [each.id for each in one.store.page(state="disabled")] == [off.id]
    assert one.store.page(app_id="other") == []
    assert one.store.counts() == {
        ("salesforce", "healthy"): 1,
        ("salesforce", "needs_reconnect"): 1,
        ("salesforce", "disabled"): 1,
    }


def test_a_row_comes_back_as_it_was_written(hosts: tuple[Host, Host]) -> None:
    """Every field of a connection survives the way through the database, to the microsecond."""
    one, two = hosts
    now = one.clock.now()
    stamps = [name for name, kind in Connection.__annotations__.items() if "datetime" in str(kind)]
    full = one.put(
        **dict.fromkeys(stamps, now),
        scopes_wanted=("api", "refresh_token"),
        scopes_granted=("api",),
        details={"hublet": "eu1", "nested": [1, None]},
        instance_url="https://acme.my.salesforce.com",
        life_seconds=7199.5,
        life_known=True,
        rotation=Rotation.SEEN,
        health=Health.UNCERTAIN,
        last_try=True,
        open_attempt="x",
        refused_generation=1,
        refused_code="invalid_grant",
        failures=3,
        last_error="unknown:reset",
    )
    assert two.store.by_name(full.name) == full
    assert two.store.by_identity(APP, full.identity) == full


def test_names_and_identities_are_taken_once(hosts: tuple[Host, Host]) -> None:
    """A second row of the same name, or for the same account through the same app, is refused by the database."""
    one, two = hosts
    first = one.put()
    with pytest.raises(IntegrityError):
        two.put(name=first.name)
    with pytest.raises(IntegrityError):
        two.put(identity=first.identity)
    with pytest.raises(NotFound):
        one.store.named("nobody")


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "a" * 64, "ä", "a\n"])
def test_bad_names_are_refused(name: str) -> None:
    """Names are lower-case words with dots, underscores and hyphens, 63 characters at most."""
    with pytest.raises(InvalidRequest):
        check_name(name)
    assert check_name("a" * 63) == "a" * 63


# What other processes learn


def test_every_change_of_what_is_handed_out_shows_in_the_epoch(hosts: tuple[Host, Host]) -> None:
    """Storing, switching and removing move the counter, and the row says when it was; a deleted row shows by its absence."""
    one, two = hosts
    first, second = one.put(), one.put()
    start = one.epoch()
    one.save(replace(first, generation=2))
    with one.database.write() as transaction:
        one.store.change(transaction, second.id, admin_state="disconnecting")
    assert set(two.store.changes_since(start)) == {first.id, second.id}
    with one.database.write() as transaction:
        one.store.remove(transaction, second.id, generation=1)
    assert two.epoch() == start + 3
    assert two.store.changes_since(start) == [first.id]
    assert two.store.surviving([first.id, second.id]) == {first.id}
    assert two.store.surviving([]) == set()
