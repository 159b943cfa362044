"""What databases, keys, trail and journal tell an operator: once, with no more than an operator may know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.access.audit import Entry, Trail
from app.broker.journal import Entry as Answer
from app.broker.journal import Journal
from app.crypto.envelope import Place, Sealed, check_canary, make_canary, open_, rewrap, seal
from app.crypto.keyring import Keyring
from app.db.engine import Database
from app.db.epoch import EpochWatch, bump
from app.db.migrate import migrate
from app.errors import KeyringFault, Overloaded, Unopenable
from app.secret import Secret
from app.settings import load
from app.telemetry import Event
from tests.access_stage import AUDIT_KEY, KEYRING, JumpingClock, databases
from tests.contract.audit_outage import bring_back, take_away
from tests.telling import Heard, counted, listening
from tests.waiting import until


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Give the log of the test."""
    with listening() as heard:
        yield heard


@pytest.fixture
def clock() -> JumpingClock:
    """Give a clock that can be moved."""
    return JumpingClock()


@pytest.fixture
def opened(database_url: str, tmp_path: Path, clock: JumpingClock) -> Iterator[tuple[Database, Database]]:
    """Give the main and the audit database, still empty."""
    main, audit = databases(database_url, tmp_path / "state", clock)
    yield main, audit
    main.dispose()
    audit.dispose()


# The database


def test_a_migration_is_told_once(opened: tuple[Database, Database], heard: Heard) -> None:
    """Each of the two schemas, from which version to which; a start that changes nothing says nothing."""
    migrate(*opened)
    assert [(line["database"], line["before"]) for line in heard.of(Event.DATABASE_MIGRATED)] == [
        ("main", "none"),
        ("audit", "none"),
    ]
    migrate(*opened)
    assert len(heard.of(Event.DATABASE_MIGRATED)) == 2
    assert heard.of(Event.LIBRARY_SPOKE) == [], "the tool's own words would only say it again"


def test_an_outage_is_told_when_it_begins_and_when_it_ends(
    opened: tuple[Database, Database], clock: JumpingClock, heard: Heard
) -> None:
    """One line each, however often the database is asked meanwhile; every failed transaction is counted."""
    migrate(*opened)
    database = opened[0]
    watch = EpochWatch(database, clock)
    faults = counted("database_faults_total", database=database.dialect)
    watch.start()
    until(lambda: watch.last is not None)
    take_away(database)
    until(lambda: counted("database_faults_total", database=database.dialect) >= faults + 3)
    (lost,) = heard.of(Event.DATABASE_LOST)
    assert lost["database"] == database.dialect
    assert lost["reason"].endswith(".")
    clock.jump(20)
    until(lambda: counted("epoch_age_seconds") >= 20)
    assert heard.of(Event.DATABASE_BACK) == []
    bring_back(database)
    until(lambda: len(heard.of(Event.DATABASE_BACK)) == 1)
    assert heard.of(Event.DATABASE_BACK)[0]["seconds"] >= 20
    until(lambda: counted("epoch_age_seconds") < 20)
    watch.stop()
    assert len(heard.of(Event.DATABASE_LOST)) == 1


def test_a_clock_that_is_off_is_told_when_it_begins(
    postgres_url: str, tmp_path: Path, clock: JumpingClock, heard: Heard
) -> None:
    """By how much and which way; again only after it was right in between."""
    database = Database(postgres_url, clock=clock, state_dir=tmp_path)
    database.sample_clock()
    assert counted("clock_skew_seconds") < 5
    clock.jump(60)
    for _ in range(3):
        database.sample_clock()
    (told,) = heard.of(Event.CLOCK_SKEWED)
    assert -61 < told["seconds"] < -59
    assert 59 < counted("clock_skew_seconds") < 61
    clock.jump(-60)
    database.sample_clock()
    clock.jump(7)
    database.sample_clock()
    assert len(heard.of(Event.CLOCK_SKEWED)) == 2
    database.dispose()


def test_a_slow_write_is_told(opened: tuple[Database, Database], clock: JumpingClock, heard: Heard) -> None:
    """Every write is counted with its time; only one that took seconds is a line, and a failed one is neither."""
    migrate(*opened)
    database = opened[0]
    kind = {"database": database.dialect}
    before = counted("transaction_seconds_count", **kind)
    with database.write() as transaction:
        bump(transaction, "access")
        clock.jump(30)
    with pytest.raises(ZeroDivisionError), database.write():
        raise ZeroDivisionError
    assert counted("transaction_seconds_count", **kind) == before + 1
    # A busy machine may be slow on its own; half a minute is what was asked for.
    (told,) = [one for one in heard.of(Event.DATABASE_SLOW) if one["seconds"] >= 30]
    assert told["database"] == database.dialect


# Keys and sealed records


def test_an_invented_keyring_is_told_and_so_is_what_it_holds(tmp_path: Path, heard: Heard) -> None:
    """The first start of a development installation makes it; names of keys are told, keys are not."""
    settings = load(
        {
            "DRAWBRIDGE_STATE_DIR": str(tmp_path),
            "DRAWBRIDGE_PUBLIC_URL": "http://localhost:8000",
            "DRAWBRIDGE_ENVIRONMENT": "development",
        },
        config_file=None,
    )
    keyring = Keyring.load(settings)
    Keyring.load(settings)
    assert heard.of(Event.KEYRING_MADE) == [{"kek": "k1"}]
    keyring.add_generated()
    assert heard.of(Event.KEYRING_LOADED) == [{"source": "file", "ids": ["k1", "k2"]}]
    assert keyring.file is not None
    for key in json.loads(keyring.file.read_text())["keys"].values():
        assert key not in heard.text


def test_a_record_that_does_not_open_names_its_row(heard: Heard) -> None:
    """Another generation, foreign bytes, a missing key; opened or wrapped anew. Nothing of the record is told."""
    place = Place("connections", "sealed", "0123456789abcdef" * 2, 4)
    blob = seal(b"tell-nobody", place, kek=KEYRING.get("k1"))
    foreign = Keyring.from_text(Secret(json.dumps({"active": "k9", "keys": {"k9": "A" * 43 + "="}})))
    before = counted("unopenable_records_total")
    with pytest.raises(Unopenable):
        open_(blob, Place("connections", "sealed", place.row_id, 5), KEYRING)
    with pytest.raises(Unopenable):
        open_(b"nonsense", place, KEYRING)
    with pytest.raises(Unopenable):
        rewrap(blob, place, foreign, to=foreign.get("k9"))
    assert counted("unopenable_records_total") == before + 3
    told = heard.of(Event.RECORD_UNOPENABLE)
    assert [(line["table"], line["column"], line["row"]) for line in told] == [
        ("connections", "sealed", place.row_id)
    ] * 3
    assert [line["kek"] for line in told] == ["k1", None, "k1"]
    assert "tell-nobody" not in heard.text
    open_(blob, place, KEYRING)
    assert counted("unopenable_records_total") == before + 3


def test_a_canary_that_fails_is_told_as_that_alone(heard: Heard) -> None:
    """The wrong key of the right name, and a name the keyring lacks; no record is blamed for it."""
    wrong = Keyring.from_text(Secret(json.dumps({"active": "k1", "keys": {"k1": "A" * 43 + "="}})))
    other = Keyring.from_text(Secret(json.dumps({"active": "k9", "keys": {"k9": "A" * 43 + "="}})))
    canary = make_canary(KEYRING.get("k1"))
    check_canary(canary, KEYRING)
    assert heard.text == ""
    for keyring in (wrong, other):
        with pytest.raises(KeyringFault):
            check_canary(canary, keyring)
    assert [line["kek"] for line in heard.of(Event.CANARY_FAILED)] == ["k1", "k1"]
    assert heard.of(Event.RECORD_UNOPENABLE) == []


# The trail


def test_audit_entries_are_counted_by_where_they_went(
    opened: tuple[Database, Database], clock: JumpingClock, tmp_path: Path
) -> None:
    """Into the database, or into the spool while that is away; what waits there is a level that goes back to nothing."""
    migrate(*opened)
    trail = Trail(opened[1], AUDIT_KEY, clock=clock, state_dir=tmp_path / "state")
    stored, spooled = (
        counted("audit_entries_total", way="database"),
        counted("audit_entries_total", way="spool"),
    )
    commits = counted("audit_seconds_count")
    entry = Entry("caller:crm", Event.TOKEN_ISSUED, "hubspot-1", "issued")
    trail.record(entry)
    trail.record_all([entry, entry])
    trail.count()
    assert counted("audit_entries_total", way="database") == stored + 3
    assert counted("audit_seconds_count") == commits + 2
    take_away(opened[1])
    trail.record(entry)
    trail.count()
    assert counted("audit_entries_total", way="spool") == spooled + 1
    assert counted("audit_spooled") == 1
    bring_back(opened[1])
    until(lambda: trail.standing == "online")
    trail.count()
    assert counted("audit_spooled") == 0
    trail.record(entry)
    trail.close()
    assert counted("audit_entries_total", way="database") == stored + 4, "closing counts what is left"
    assert counted("audit_entries_total", way="spool") == spooled + 1


# The journal


def _answer(number: int) -> Answer:
    return Answer(
        attempt=f"attempt{number}",
        connection=f"connection{number}",
        generation=number,
        sealed=Sealed(blob=b"sealed-bytes" * number, kek_id="k1"),
        facts={},
    )


def test_the_journal_of_a_dead_process_is_told_with_what_lay_in_it(tmp_path: Path, heard: Heard) -> None:
    """How many answers, and how many bytes were torn; the answers themselves stay where they are."""
    written = counted("journal_entries_total", outcome="written")
    dead = Journal(tmp_path, "dead")
    dead.append(_answer(1))
    dead.append(_answer(2))
    assert counted("journal_entries_total", outcome="written") == written + 2
    file = tmp_path / dead.name
    whole = file.read_bytes()
    dead.close()
    file.write_bytes(whole[:-20])
    cut = len(whole.splitlines()[1]) - 19
    living = Journal(tmp_path, "living")
    assert living.pending_keks() == {"k1"}
    told = (*heard.of(Event.JOURNAL_TORN), *heard.of(Event.JOURNAL_ADOPTED))
    assert not told, "looking is no taking over"
    assert living.adopt_orphans(lambda _: None) == 1
    assert heard.of(Event.JOURNAL_TORN) == [{"file": "dead.journal", "bytes": cut}]
    assert heard.of(Event.JOURNAL_ADOPTED) == [{"file": "dead.journal", "entries": 1}]
    living.adopt_orphans(lambda _: None)
    assert len(heard.of(Event.JOURNAL_ADOPTED)) == 1


def test_an_answer_the_disk_refuses_is_counted(tmp_path: Path) -> None:
    """Where the folder of the journal cannot be."""
    (tmp_path / "journal").write_text("in the way")
    before = counted("journal_entries_total", outcome="refused")
    with pytest.raises(Overloaded):
        Journal(tmp_path / "journal", "living").append(_answer(1))
    assert counted("journal_entries_total", outcome="refused") == before + 1
