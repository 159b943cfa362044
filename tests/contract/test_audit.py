"""What the audit trail promises; each test runs on SQLite and on PostgreSQL."""

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.access.audit import Entry, Trail
from app.access.chain import REGISTER, ChainKeys, Head, encode_head
from app.access.inspection import Verdict
from app.access.spool import Spool, orphans
from app.clock import Clock
from app.db.engine import Database
from app.db.migrate import migrate
from app.db.schema import audit, audit_register, audit_register_head, audit_writers
from app.errors import AuditUnavailable
from app.telemetry import Event
from tests.access_stage import AUDIT_KEY, JumpingClock, databases
from tests.contract.audit_outage import bring_back, take_away
from tests.waiting import until

ROOT = Path(__file__).parents[2]
Maker = Callable[..., Trail]


@pytest.fixture
def clock() -> JumpingClock:
    """Give a clock that can be moved."""
    return JumpingClock()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Give the state folder all processes share."""
    return tmp_path / "state"


@pytest.fixture
def database(database_url: str, state: Path, clock: JumpingClock) -> Iterator[Database]:
    """Give the migrated audit database."""
    main, audit_database = databases(database_url, state, clock)
    migrate(main, audit_database)
    yield audit_database
    main.dispose()
    audit_database.dispose()


@pytest.fixture
def make(database: Database, state: Path, clock: JumpingClock) -> Iterator[Maker]:
    """Make trails, each as a process start of its own, closed at the end."""
    made: list[Trail] = []

    def make(**options: Any) -> Trail:
        settled: dict[str, Any] = {"clock": clock, "state_dir": state} | options
        made.append(Trail(database, AUDIT_KEY, **settled))
        return made[-1]

    yield make
    for trail in made:
        trail.close()


def entry(target: str = "hubspot-1", **changes: Any) -> Entry:
    """Describe a hand-out."""
    fields = {"actor": "caller:crm", "action": "broker:token:issued", "detail": {"generation": 1}}
    return Entry(target=target, **(fields | changes))


def targets(trail: Trail) -> list[str]:
    """List the targets of all rows by writer and number."""
    return [json.loads(line)["target"] for line in trail.export()]


def returned(trail: Trail) -> None:
    """Wait until the trail has gone back to its database."""
    thread = trail._reviver
    if thread is not None:
        thread.join(30)
        assert not thread.is_alive()


# ------------------------------------------------------------------------------------------------ recording


def test_what_threads_record_together_is_all_there_and_sound(make: Maker) -> None:
    """Sixteen threads share commits; every row is there once, in one unbroken chain."""
    trail = make()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: trail.record(entry(f"c-{n}")), range(400)))
    assert sorted(targets(trail)) == sorted(f"c-{n}" for n in range(400))
    assert trail.verify() == Verdict(rows=400, writers=1, bad=None)


def test_a_row_is_durable_when_record_returns(make: Maker) -> None:
    """Another connection sees the row at once."""
    make().record(entry("seen"))
    assert targets(make()) == ["seen"]


def test_nothing_that_could_be_an_address_or_a_token_is_written(make: Maker) -> None:
    """Free texts that do not look like words of ours are replaced; permissions, which hold an @, are not."""
    trail = make()
    detail = {
        "mail": "bob@example.com",
        "token": "x" * 65,
        "given": "token:issue@hubspot-*",
        "list": ["a", "b@c.d"],
        "n": 1,
    }
    trail.record(entry("bob@example.com", detail=detail))
    row = json.loads(next(trail.export()))
    assert row["target"] == "(invalid)"
    assert row["detail"] == {
        "given": "token:issue@hubspot-*",
        "list": ["a", "(redacted)"],
        "mail": "(redacted)",
        "n": 1,
        "token": "(redacted)",
    }


@pytest.mark.parametrize(
    "changes", [{"actor": "Bob Smith"}, {"action": "issue"}, {"outcome": "It failed"}, {"detail": {"A b": 1}}]
)
def test_words_that_are_not_ours_are_mistakes(make: Maker, changes: dict[str, Any]) -> None:
    """An actor, action, outcome or key that is no word of ours is refused before it is queued."""
    with pytest.raises(ValueError, match="words of ours"):
        make().record(entry(**changes))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(target=st.text(max_size=20), value=st.text(max_size=20))
def test_any_text_is_recorded_and_verified(make: Maker, target: str, value: str) -> None:
    """NUL, lone surrogates and the like never break a commit, whose other rows belong to other threads."""
    trail = make(reserve=0)
    trail.record(entry(target, detail={"value": value}))
    assert trail.verify().sound
    trail.close()


def test_a_forked_child_writes_a_chain_of_its_own(make: Maker, state: Path) -> None:
    """Parent and child after a fork are two writers, and the child does not hold the parent's spool."""
    trail = make()
    trail.record(entry("parent"))
    child = os.fork()
    if child == 0:
        try:
            trail.record(entry("child"))
            trail.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    trail.record(entry("parent again"))
    assert sorted(targets(trail)) == ["(invalid)", "child", "parent"]
    assert trail.verify() == Verdict(rows=3, writers=2, bad=None)
    assert len(list(state.glob("*.audit-spool"))) == 1


# ------------------------------------------------------------------------------------------------- the proof


@pytest.fixture
def rows(make: Maker, database: Database, clock: JumpingClock) -> list[Any]:
    """Give the rows of two writers, seven and four."""
    for count in (7, 4):
        trail = make(reserve=0)
        for n in range(count):
            trail.record(entry(f"c-{n}", detail=None if n == 2 else {"generation": n}))
            clock.jump(60)
        trail.close()
    with database.read() as connection:
        return list(connection.execute(sa.select(audit).order_by(audit.c.writer, audit.c.n)))


@contextmanager
def tampered(database: Database, *statements: sa.Executable) -> Iterator[None]:
    """Edit the tables of the trail and put everything back afterwards."""
    with database.read() as connection:
        before = [
            (table, [dict(row._mapping) for row in connection.execute(sa.select(table))])
            for table in (audit, audit_writers, audit_register, audit_register_head)
        ]
    with database.write() as connection:
        for statement in statements:
            connection.execute(statement)
    try:
        yield
    finally:
        with database.write() as connection:
            for table, rows_ in before:
                connection.execute(sa.delete(table))
                connection.execute(sa.insert(table), rows_)


def at(row: Any) -> Any:
    """Point to one row."""
    return sa.and_(audit.c.writer == row.writer, audit.c.n == row.n)


EDITS: dict[str, Any] = {
    "at": datetime(2020, 1, 1, tzinfo=UTC),
    "actor": "caller:other",
    "action": "broker:token:refused",
    "target": "c-99",
    "outcome": "denied",
    "detail": {"generation": 99},
    "mac": b"m" * 32,
}
exhaustive = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@exhaustive
@given(index=st.integers(0, 10), column=st.sampled_from(sorted(EDITS)))
def test_an_edited_row_is_named(
    make: Maker, database: Database, rows: list[Any], index: int, column: str
) -> None:
    """Whatever column of whatever row is changed, that row is the first bad one."""
    row = rows[index]
    with tampered(database, sa.update(audit).where(at(row)).values({column: EDITS[column]})):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (row.writer, row.n)
    assert make().verify().sound


@exhaustive
@given(index=st.integers(0, 10))
def test_a_removed_row_is_named(make: Maker, database: Database, rows: list[Any], index: int) -> None:
    """A gap is named by the number that is missing, the last row included."""
    row = rows[index]
    with tampered(database, sa.delete(audit).where(at(row))):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (row.writer, row.n)


@exhaustive
@given(index=st.integers(0, 10), n=st.sampled_from([-1, 0, 8, 9, 100]))
def test_an_inserted_row_is_named(
    make: Maker, database: Database, rows: list[Any], index: int, n: int
) -> None:
    """A row that was never written is found before the first, behind the last, and far behind it."""
    row = rows[index]
    last = max(other.n for other in rows if other.writer == row.writer)
    n = max(n, last + 1) if n > 0 else n
    forged = dict(row._mapping) | {"n": n}
    with tampered(database, sa.insert(audit).values(forged)):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (row.writer, min(n, last + 1))


@exhaustive
@given(pair=st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True))
def test_reordered_rows_are_named(make: Maker, database: Database, rows: list[Any], pair: list[int]) -> None:
    """Two rows that changed places, within a writer or between two, are found at the first of them."""
    one, other = (rows[index] for index in sorted(pair))
    contents = [{name: row._mapping[name] for name in EDITS} for row in (one, other)]
    swap = (
        sa.update(audit).where(at(one)).values(contents[1]),
        sa.update(audit).where(at(other)).values(contents[0]),
    )
    with tampered(database, *swap):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (one.writer, one.n)


@exhaustive
@given(data=st.data())
def test_a_cut_off_tail_is_named(make: Maker, database: Database, rows: list[Any], data: Any) -> None:
    """A tail is missed by the stored head, and a head moved along with it by its seal."""
    row = data.draw(st.sampled_from(rows))
    tail = sa.delete(audit).where(audit.c.writer == row.writer, audit.c.n >= row.n)
    with tampered(database, tail):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (row.writer, row.n)
    before = next((other for other in rows if (other.writer, other.n) == (row.writer, row.n - 1)), None)
    head = sa.update(audit_writers).where(audit_writers.c.id == row.writer)
    edited = head.values(head_n=row.n - 1, head_mac=(before.mac if before else b"m" * 32) + b"s" * 32)
    with tampered(database, tail, edited):
        assert not make().verify().sound


def test_a_tail_cut_back_to_an_older_genuine_head_is_missed_by_a_head_kept_elsewhere(
    make: Maker, database: Database
) -> None:
    """Who restores an old head with its seal fools the database, not the head in the log."""
    trail = make()
    trail.record(entry("first"))
    with database.read() as connection:
        old = connection.execute(sa.select(audit_writers)).one()
    trail.record(entry("second"))
    head = trail.head()
    assert head is not None
    kept = Head(head.writer, head.n, head.mac[:16])
    assert trail.verify([kept]).sound
    back = sa.update(audit_writers).values(head_n=old.head_n, head_mac=old.head_mac)
    with tampered(database, sa.delete(audit).where(audit.c.n == 2), back):
        assert trail.verify().sound
        bad = trail.verify([kept]).bad
    assert bad is not None
    assert (bad.writer, bad.n) == (head.writer, 2)


@pytest.fixture
def ended(make: Maker, database: Database) -> list[Any]:
    """Three rows of a writer that has ended, between two others; its heads on the way were seen by an intruder."""
    make().record(entry("before"))
    trail, seen = make(), []
    for n in range(3):
        trail.record(entry(f"t-{n}"))
        trail.verify()
        seen.append(stored_writer(database, writer_of(trail)))
    trail.close()
    make().record(entry("after"))
    return seen


def writer_of(trail: Trail) -> str:
    """The writer of a trail that has recorded."""
    head = trail.head()
    assert head is not None
    return head.writer


def stored_writer(database: Database, writer: str) -> Any:
    """What is stored about a writer."""
    with database.read() as connection:
        return connection.execute(sa.select(audit_writers).where(audit_writers.c.id == writer)).one()


def test_a_writer_that_vanished_is_named(make: Maker, database: Database, ended: list[Any]) -> None:
    """All its rows and its head are gone, as if it had never been: the register says that it was there."""
    writer = ended[-1].id
    assert make().verify() == Verdict(rows=5, writers=3, bad=None)
    with tampered(
        database,
        sa.delete(audit).where(audit.c.writer == writer),
        sa.delete(audit_writers).where(audit_writers.c.id == writer),
    ):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.why) == (writer, "This writer is gone, with its head and all its rows.")


def test_an_empty_trail_under_a_register_is_named(make: Maker, database: Database, ended: list[Any]) -> None:
    """Everything but the register is gone."""
    with tampered(database, sa.delete(audit), sa.delete(audit_writers)):
        assert not make().verify().sound


def test_the_head_of_a_writer_that_ended_cannot_go_back(
    make: Maker, database: Database, ended: list[Any]
) -> None:
    """An older genuine head with its seal is put back and what is behind it cut off: the register is further on."""
    old, last = ended[1], ended[-1]
    with tampered(
        database,
        sa.delete(audit).where(audit.c.writer == last.id, audit.c.n > old.head_n),
        sa.update(audit_writers)
        .where(audit_writers.c.id == last.id)
        .values(head_n=old.head_n, head_mac=old.head_mac),
    ):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (last.id, 3)


def test_a_living_writer_cannot_go_back_behind_its_newest_mark(make: Maker, database: Database) -> None:
    """Marked now and then, it need not have ended."""
    trail = make()
    trail.record(entry("first"))
    trail.verify()
    old = stored_writer(database, writer_of(trail))
    trail.record(entry("second"))
    trail.log_head()
    back = sa.update(audit_writers).values(head_n=old.head_n, head_mac=old.head_mac)
    with tampered(database, sa.delete(audit).where(audit.c.n == 2), back):
        assert not make().verify().sound
    assert trail.verify().sound


def test_a_killed_writer_is_marked_by_whoever_finds_its_spool(
    make: Maker, database: Database, state: Path
) -> None:
    """It could not say where it ended; the next one in its directory does."""
    killed = make()
    for target in ("one", "two"):
        killed.record(entry(target))
        killed.verify()
        if target == "one":
            old = stored_writer(database, writer_of(killed))
    spool = killed._chain.spool  # type: ignore[union-attr]
    assert spool is not None
    spool.abandon()
    killed._chain = None  # it will not close in order
    make().adopt_orphans()
    with tampered(
        database,
        sa.delete(audit).where(audit.c.n == 2),
        sa.update(audit_writers).values(head_n=old.head_n, head_mac=old.head_mac),
    ):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (old.id, 2)


@pytest.mark.parametrize("edit", ["removed", "last", "edited", "inserted", "all", "head", "forged"])
def test_a_register_that_was_tampered_with_is_named(
    make: Maker, database: Database, ended: list[Any], edit: str
) -> None:
    """Its lines are chained and its end is sealed; without it no writer is listed."""
    lines = audit_register.c
    with database.read() as connection:
        last = connection.scalar(sa.select(sa.func.max(lines.n)))
    edits: dict[str, list[sa.Executable]] = {
        "removed": [sa.delete(audit_register).where(lines.n == 2)],
        "last": [sa.delete(audit_register).where(lines.n == last)],
        "edited": [sa.update(audit_register).where(lines.n == 2).values(sequence=1)],
        "inserted": [
            sa.insert(audit_register).values(
                n=(last or 0) + 1, writer="f" * 32, sequence=0, mac=b"m" * 32, link=b"l" * 32
            )
        ],
        "all": [sa.delete(audit_register), sa.delete(audit_register_head)],
        "head": [sa.delete(audit_register_head)],
        "forged": [
            sa.delete(audit_register).where(lines.n == last),
            sa.update(audit_register_head).values(n=audit_register_head.c.n - 1),
        ],
    }
    with tampered(database, *edits[edit]):
        assert not make().verify().sound
        make().record(entry("a newcomer must not put its seal under it"))
        assert not make().verify().sound


def test_a_register_put_back_before_a_writer_does_not_hide_it(
    make: Maker, database: Database, ended: list[Any]
) -> None:
    """Whoever came later is then not in it."""
    writer = ended[-1].id
    lines = audit_register.c
    with database.read() as connection:
        first = connection.scalar(sa.select(sa.func.min(lines.n)).where(lines.writer == writer))
        assert first is not None
        link = connection.scalar(sa.select(lines.link).where(lines.n == first - 1))
    sealed = encode_head(ChainKeys(AUDIT_KEY), "register", REGISTER, first - 1, bytes(link or b""))
    with tampered(
        database,
        sa.delete(audit).where(audit.c.writer == writer),
        sa.delete(audit_writers).where(audit_writers.c.id == writer),
        sa.delete(audit_register).where(lines.n >= first),
        sa.update(audit_register_head).values(n=first - 1, link=sealed),
    ):
        bad = make().verify().bad
    assert bad is not None
    assert bad.why == "The writer of this row is not in the register of writers."


def test_a_writer_without_a_stored_head_is_named(make: Maker, database: Database, rows: list[Any]) -> None:
    """Rows that no head stands for were put there."""
    with tampered(database, sa.delete(audit_writers).where(audit_writers.c.id == rows[0].writer)):
        bad = make().verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (rows[0].writer, 1)


def test_another_key_proves_nothing(
    database: Database, state: Path, clock: JumpingClock, rows: list[Any]
) -> None:
    """The chain cannot be checked, hence not forged, without its key."""
    stranger = Trail(database, b"x" * 32, clock=clock, state_dir=state)
    assert not stranger.verify().sound
    assert len(rows) == 11


def test_verifying_beside_a_writer_raises_no_false_alarm(make: Maker) -> None:
    """Rows that come while the proof runs are part of it or not, but never wrong."""
    trail, over = make(), threading.Event()

    def write() -> None:
        while not over.is_set():
            trail.record(entry())

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    verdicts = [trail.verify() for _ in range(10)]
    over.set()
    for writer in writers:
        writer.join()
    assert [verdict.bad for verdict in verdicts] == [None] * 10


# ---------------------------------------------------------------------------------------------- retention


def test_pruning_removes_a_prefix_that_the_kept_head_stands_for(
    make: Maker, database: Database, rows: list[Any]
) -> None:
    """Old rows go, the rest stays provable, and the kept head cannot be moved by hand."""
    trail = make()
    cut = rows[3].at
    assert trail.prune(cut) == sum(row.at < cut for row in rows)
    assert len(targets(trail)) == sum(row.at >= cut for row in rows)
    assert trail.verify().sound
    with database.read() as connection:
        left = connection.execute(sa.select(audit).order_by(audit.c.writer, audit.c.n)).first()
    assert left is not None
    writer = audit_writers.c.id == left.writer
    forged = sa.update(audit_writers).where(writer).values(kept_n=left.n, kept_mac=left.mac + b"s" * 32)
    with tampered(database, sa.delete(audit).where(at(left)), forged):
        assert not trail.verify().sound
    with tampered(database, sa.delete(audit).where(at(left))):
        bad = trail.verify().bad
    assert bad is not None
    assert (bad.writer, bad.n) == (left.writer, left.n)


def test_everything_may_be_pruned_and_the_chain_goes_on(make: Maker, clock: JumpingClock) -> None:
    """A writer whose rows are all gone continues at its kept head."""
    trail = make()
    trail.record(entry("old"))
    clock.jump(10)
    assert trail.prune(clock.now()) == 1
    trail.record(entry("new"))
    assert targets(trail) == ["new"]
    assert trail.verify() == Verdict(rows=1, writers=1, bad=None)


def test_a_broken_chain_is_not_pruned_away(make: Maker, database: Database, rows: list[Any]) -> None:
    """Retention does not remove the traces of tampering."""
    row = rows[1]
    with tampered(database, sa.update(audit).where(at(row)).values(target="c-99")):
        make().prune(rows[-1].at + timedelta(days=1))
        bad = make().verify().bad
        assert bad is not None
        assert (bad.writer, bad.n) == (row.writer, row.n)


# ---------------------------------------------------------------------------------------------- searching


def test_search_finds_by_field_and_time_page_by_page(make: Maker, rows: list[Any]) -> None:
    """Pages are newest first, without gaps or repeats, however many rows share a moment."""
    trail = make()
    found, cursor = [], None
    while True:
        page = trail.search(before=cursor, limit=3)
        found += page.rows
        cursor = page.next
        if cursor is None:
            break
    key = [(row.at, row.writer, row.n) for row in found]
    assert key == sorted(((row.at, row.writer, row.n) for row in rows), reverse=True)
    assert [row.target for row in trail.search(target="c-6").rows] == ["c-6"]
    assert trail.search(actor="caller:nobody").rows == ()
    recent = trail.search(since=rows[-1].at, until=rows[-1].at + timedelta(days=1)).rows
    assert {row.at for row in recent} == {row.at for row in rows if row.at >= rows[-1].at}


# ------------------------------------------------------------------------------------------ trouble and death


@contextmanager
def burst(url: str, state: Path, mode: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the bursting process; it is killed at the end if not before."""
    command = [sys.executable, "-m", "tests.contract.audit_burst", url, str(state), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def acknowledged_before_kill(process: subprocess.Popen[bytes], count: int) -> list[str]:
    """Read so many acknowledgements, kill -9, and read those that were under way."""
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(count)]
    process.kill()
    lines += process.stdout.readlines()
    return [line.decode().strip() for line in lines if line.endswith(b"\n")]


def test_what_was_acknowledged_survives_kill_9(make: Maker, database_url: str, state: Path) -> None:
    """Every acknowledged row of a killed writer is there once and its chain is sound."""
    with burst(database_url, state, "online") as process:
        acknowledged = acknowledged_before_kill(process, 500)
    trail = make()
    trail.adopt_orphans()
    found = targets(trail)
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert trail.verify().sound
    assert not list(state.glob("*.audit-spool"))


def test_what_was_spooled_survives_kill_9_and_is_adopted_once(
    make: Maker, database: Database, database_url: str, state: Path
) -> None:
    """A process dies while the database is away; the next one brings its rows in, in order and once."""
    with burst(database_url, state, "away") as process:
        acknowledged = acknowledged_before_kill(process, 300)
    bring_back(database)
    trail = make()
    adopted = trail.adopt_orphans()
    assert trail.adopt_orphans() == 0
    found = targets(trail)
    assert adopted >= len(acknowledged) >= 300
    assert len(found) == len(set(found)) == adopted + 1
    assert set(acknowledged) <= set(found)
    assert trail.verify().sound


def test_a_spool_of_a_living_process_is_not_adopted(make: Maker, state: Path) -> None:
    """Its lock says that somebody still writes it."""
    make().record(entry())
    assert list(state.glob("*.audit-spool"))
    assert list(orphans(state)) == []


def test_a_torn_tail_and_leftovers_of_a_spool_are_ignored(
    make: Maker, database: Database, state: Path
) -> None:
    """Only batches that follow one another count; bytes of an earlier use of the file do not."""
    trail = make()
    trail.record(entry("online"))
    take_away(database)
    for n in range(6):
        trail.record(entry(f"s-{n}"))
    (path,) = state.glob("*.audit-spool")
    whole = path.read_bytes()
    bring_back(database)
    returned(trail)
    trail.close()
    last = whole.rindex(b"\x00DBA")
    torn = whole[: last + 40] + b"\x00" * 100
    (state / f"{'0' * 32}.audit-spool").write_bytes(torn)
    stale = Spool.create(state, "1" * 32, reserve=0)
    os.pwrite(stale._descriptor, whole[last:] + whole[:last], 0)
    stale.abandon()
    fresh = make()
    assert fresh.adopt_orphans() == 6  # five of the torn one, one of the other; all known already
    assert targets(fresh) == ["online", *(f"s-{n}" for n in range(6))]
    assert fresh.verify().sound


def spooled(make: Maker, database: Database, state: Path) -> bytes:
    """The bytes of a spool of six rows that follow one in the database, left by a process that was killed."""
    trail = make()
    trail.record(entry("online"))
    take_away(database)
    for n in range(6):
        trail.record(entry(f"s-{n}"))
    (path,) = state.glob("*.audit-spool")
    whole = path.read_bytes()
    trail._stopped.set()
    returned(trail)
    chain, trail._chain = trail._chain, None
    assert chain is not None
    assert chain.spool is not None
    chain.spool.abandon()
    bring_back(database)
    return whole


def told_damage(text: str) -> list[tuple[str, int]]:
    """File and number of rows of every damage in the log."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["file"], line["entries"]) for line in lines if line["event"] == Event.AUDIT_SPOOL_DAMAGED]


def test_a_rotten_byte_does_not_lose_the_rows_behind_it(
    make: Maker, database: Database, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies before it is brought in, the file with the rest is kept under another name, and the log tells so."""
    whole = spooled(make, database, state)
    (path,) = state.glob("*.audit-spool")
    third = whole.index(b"s-2")
    rotten = whole[:third] + b"x" + whole[third + 1 :]
    path.write_bytes(rotten)
    fresh = make()
    assert fresh.adopt_orphans() == 2
    aside = state / f"{path.name}.damaged"
    assert aside.read_bytes() == rotten
    assert told_damage(capsys.readouterr().err) == [(aside.name, 3)]
    assert targets(fresh) == ["online", "s-0", "s-1"]
    assert fresh.adopt_orphans() == 0
    assert fresh.verify().sound


def test_what_an_earlier_use_left_behind_is_no_damage(
    make: Maker, database: Database, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole batches behind a cleared or torn one were brought in long ago: the file is removed as ever."""
    whole = spooled(make, database, state)
    assert make().adopt_orphans() == 6
    cleared, torn = state / f"{'0' * 32}.audit-spool", state / f"{'1' * 32}.audit-spool"
    cleared.write_bytes(bytes(12) + whole[12:])
    second = whole.index(b"\x00DBA", 1)
    torn.write_bytes(whole[: second + 40] + bytes(40) + whole[second + 80 :])
    assert make().adopt_orphans() == 1
    assert list(state.glob(f"{'0' * 32}*")) + list(state.glob(f"{'1' * 32}*")) == []
    assert told_damage(capsys.readouterr().err) == []


@pytest.mark.parametrize("how", ["returning", "closing"])
def test_a_spool_that_rots_under_its_own_process_is_kept(
    make: Maker, database: Database, state: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """The rows before the damage are brought in and the next ones go into a chain of their own; nothing is thrown away."""
    trail = make()
    take_away(database)
    for n in range(4):
        trail.record(entry(f"s-{n}"))
    (path,) = state.glob("*.audit-spool")
    place = path.read_bytes().index(b"s-2")
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"x")
    if how == "closing":
        trail._stopped.set()
        returned(trail)
        bring_back(database)
        trail.close()
    else:
        bring_back(database)
        returned(trail)
    assert told_damage(capsys.readouterr().err) == [(f"{path.name}.damaged", 1)]
    trail.record(entry("on"))
    assert sorted(targets(trail)) == ["on", "s-0", "s-1"]
    assert trail.verify().sound


def test_an_outage_is_borne_for_the_grace_and_caught_up(
    make: Maker, database: Database, clock: JumpingClock
) -> None:
    """Rows are spooled while the database is away, refused when it stays away, brought in when it is back."""
    trail = make(outage_grace=60.0)
    trail.record(entry("before"))
    take_away(database)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: trail.record(entry(f"away-{n:02}")), range(40)))
    clock.jump(59)
    trail.record(entry("away-99"))
    assert trail.standing == "spooling"
    clock.jump(2)
    with pytest.raises(AuditUnavailable):
        trail.record(entry("too late"))
    assert trail.standing == "refusing"
    bring_back(database)
    returned(trail)
    assert trail.standing == "online"
    trail.record(entry("after"))
    found = targets(trail)
    assert (found[0], found[-2:]) == ("before", ["away-99", "after"])
    assert sorted(found[1:-2]) == [f"away-{n:02}" for n in range(40)]
    assert trail.verify() == Verdict(rows=43, writers=1, bad=None)


def test_without_a_grace_nothing_is_recorded_while_the_database_is_away(
    make: Maker, database: Database
) -> None:
    """Fail closed: what cannot be recorded must not happen, and it heals by itself."""
    trail = make(outage_grace=0.0)
    trail.record(entry("before"))
    take_away(database)
    with pytest.raises(AuditUnavailable):
        trail.record(entry("lost"))
    bring_back(database)
    returned(trail)
    trail.record(entry("after"))
    assert targets(trail) == ["before", "after"]
    assert trail.verify().sound


def test_closing_brings_in_what_is_spooled(make: Maker, database: Database, state: Path) -> None:
    """A process that ends in good order leaves no spool behind."""
    trail = make()
    trail.record(entry("before"))
    take_away(database)
    trail.record(entry("away"))
    bring_back(database)
    trail.close()
    assert targets(trail) == ["before", "away"]
    assert not list(state.glob("*.audit-spool"))


def test_rows_written_behind_our_back_end_the_chain(make: Maker, database: Database) -> None:
    """A writer never forks its own chain: it refuses, and begins a new one when the database answers."""
    trail = make()
    trail.record(entry("one"))
    twin = make()
    twin._chain = trail._chain
    assert trail._chain is not None
    mac, n = trail._chain.mac, trail._chain.n
    twin.record(entry("two"))
    twin._chain = None
    trail._chain.mac, trail._chain.n = mac, n  # as if the answer to the last commit had been lost
    with pytest.raises(AuditUnavailable):
        trail.record(entry("refused"))
    returned(trail)
    trail.record(entry("three"))
    assert sorted(targets(trail)) == ["one", "three", "two"]
    assert trail.verify().sound


def test_the_head_of_a_chain_that_was_left_is_brought_up_to_its_rows(make: Maker, database: Database) -> None:
    """Else its last rows could be cut off unseen."""
    trail = make()
    for number in range(4):
        trail.record(entry(f"row-{number}"))
    assert trail._chain is not None
    writer = trail._chain.writer.id
    stray = dict.fromkeys(("actor", "action", "target", "outcome"), "x") | {"at": 0, "mac": b"x"}
    with database.write() as connection:
        connection.execute(sa.insert(audit).values(writer=writer, n=5, **stray))
    with pytest.raises(AuditUnavailable):
        trail.record(entry("refused"))
    returned(trail)
    until(lambda: any(row == (writer, 4) for row in heads(database)))
    with database.write() as connection:
        connection.execute(sa.delete(audit).where(audit.c.writer == writer, audit.c.n > 2))
    verdict = trail.verify()
    assert verdict.bad is not None
    assert (verdict.bad.writer, verdict.bad.n) == (writer, 3)


def heads(database: Database) -> list[tuple[str, int]]:
    """Read every writer's stored head."""
    with database.read() as connection:
        return [
            tuple(row) for row in connection.execute(sa.select(audit_writers.c.id, audit_writers.c.head_n))
        ]


def test_a_head_that_cannot_be_moved_is_told_and_goes_on_when_it_can(
    make: Maker, database: Database, clock: JumpingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in the way, the thread that moves it does not give up."""
    trail = make()
    trail.record(entry("one"))
    until(partial(head_stands_at, database, 1))
    with monkeypatch.context() as patched:
        patched.setattr(trail._ledger, "raise_head", broken)
        trail.record(entry("two"))
        until(lambda: trail._stuck_since is not None)
        assert trail.standing == "online"
        clock.jump(11)
        until(lambda: trail.standing == "behind")
    until(partial(head_stands_at, database, 2))
    until(lambda: trail.standing == "online")


def broken(*_: object) -> None:
    """Fail in a way nobody thought of."""
    raise RuntimeError("broken")


def test_recording_after_closing_moves_the_head_as_well(make: Maker, database: Database) -> None:
    """A closed trail that records again has a new chain, and somebody who moves its head."""
    trail = make()
    trail.record(entry("one"))
    trail.close()
    trail.record(entry("two"))
    until(lambda: sorted(n for _, n in heads(database)) == [1, 1])


def stored_head(database: Database) -> int:
    """Read the only writer's stored head."""
    with database.read() as connection:
        return int(connection.scalar(sa.select(audit_writers.c.head_n)) or 0)


def head_stands_at(database: Database, n: int) -> bool:
    """Whether the stored head is there."""
    return stored_head(database) == n


def test_the_stored_head_follows_the_rows_by_itself(make: Maker, database: Database) -> None:
    """Nobody has to ask for it, and a writer that rested for long goes on as before."""
    trail = make()
    for n in (1, 2):
        trail.record(entry())
        until(partial(head_stands_at, database, n))


def test_what_a_killed_writer_left_beyond_its_head_is_sound_and_may_be_pruned(
    make: Maker, clock: JumpingClock, database: Database
) -> None:
    """The head of a killed process stays where it was; its last rows are proved by their macs all the same."""
    killed, other = make(), make()
    killed.record(entry("one"))
    assert killed.verify().sound
    killed._stopped.set()  # nobody moves its head any more
    for target in ("two", "three"):
        killed.record(entry(target))
    assert stored_head(database) == 1
    assert other.verify() == Verdict(rows=3, writers=1, bad=None)
    clock.jump(10)
    assert other.prune(clock.now()) == 3
    assert other.verify() == Verdict(rows=0, writers=1, bad=None)
    assert stored_head(database) == 3


def test_a_backup_put_back_under_a_writer_is_noticed(make: Maker, database: Database) -> None:
    """The rows it took away are missed by `verify` for as long as rows behind them are kept."""
    trail = make()
    trail.record(entry("one"))
    trail.verify()
    with database.read() as connection:
        backup = connection.execute(sa.select(audit_writers)).one()._asdict()
    for target in ("two", "three"):
        trail.record(entry(target))
    trail.verify()
    with database.write() as connection:
        connection.execute(sa.delete(audit).where(audit.c.n > 1))
        connection.execute(sa.update(audit_writers).values(backup))
    trail.record(entry("four"))
    verdict = trail.verify()
    assert verdict.bad is not None
    assert (verdict.bad.n, verdict.bad.why) == (2, "This row is missing.")


def test_the_head_is_logged_and_can_be_held_against_the_trail(
    make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log line holds all that `verify` needs."""
    trail = make()
    trail.log_head()
    trail.record(entry())
    assert capsys.readouterr().err == ""
    trail.log_head()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = [Head(line["writer"], line["sequence"], line["digest"]) for line in lines]
    assert [head.writer for head in told] == [lines[0]["writer"], "register"]
    assert trail.verify(told).sound
    for head in told:
        assert not trail.verify([Head(head.writer, head.n, "0" * 16)]).sound
        assert not trail.verify([Head(head.writer, head.n + 1, head.mac)]).sound
    head = told[0]
    with pytest.raises(ValueError, match="sixteen"):
        trail.verify([Head(head.writer, head.n, "00")])


# -------------------------------------------------------------------------------------------------- full disk


@contextmanager
def full_disk(database: Database) -> Iterator[None]:
    """Let SQLite find no page left, as on a full disk (SQLITE_FULL)."""

    def limit(raw: Any, *_: Any) -> None:
        pages = raw.execute("PRAGMA page_count").fetchone()[0]
        raw.execute(f"PRAGMA max_page_count={pages}")

    def lift(raw: Any, *_: Any) -> None:
        raw.execute("PRAGMA max_page_count=1073741823")

    sa.event.listen(database._engine, "checkout", limit)
    try:
        yield
    finally:
        sa.event.remove(database._engine, "checkout", limit)
        sa.event.listen(database._engine, "checkout", lift)


def test_a_full_disk_is_borne_by_the_reserve_until_that_is_used_up(tmp_path: Path) -> None:
    """The preallocated reserve takes rows whatever the grace; then 503; then it heals by itself."""
    clock = Clock()
    main, database = databases(f"sqlite:///{tmp_path / 'drawbridge.db'}", tmp_path, clock)
    migrate(main, database)
    trail = Trail(database, AUDIT_KEY, clock=clock, state_dir=tmp_path, outage_grace=0.0, reserve=65_536)
    with full_disk(database):
        filled = record_until(trail, lambda: trail._chain is not None and trail._chain.full)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))  # no file grows any more, the spool neither
        try:
            spooled = record_until(trail, lambda: False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    returned(trail)
    trail.record(entry("after"))
    expected = ["row"] * (filled + spooled)
    assert spooled > 100
    assert targets(trail) == [*expected, "after"]
    assert trail.verify().sound
    trail.close()
    main.dispose()
    database.dispose()


def record_until(trail: Trail, over: Callable[[], bool]) -> int:
    """Record until told or refused; the count of rows that were acknowledged."""
    count = 0
    while not over():
        try:
            trail.record(entry("row"))
        except AuditUnavailable:
            break
        count += 1
    return count
