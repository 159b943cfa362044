"""How a database comes to the schema of this version, on SQLite and on PostgreSQL."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from app.clock import Clock
from app.db.engine import Database
from app.db.migrate import AUDIT, MAIN, Track, migrate, require_current
from app.db.schema import epochs
from app.errors import DatabaseMismatch

ROOT = Path(__file__).parents[2]
Pair = tuple[Database, Database]


@pytest.fixture
def trail_url(database_url: str, tmp_path: Path) -> str:
    """Where the trail is kept: a file of its own on SQLite, the main database on PostgreSQL."""
    return database_url if database_url.startswith("postgresql") else f"sqlite:///{tmp_path}/trail.db"


@pytest.fixture
def pair(database_url: str, trail_url: str, tmp_path: Path) -> Iterator[Pair]:
    """Both databases, empty."""
    main = Database(database_url, clock=Clock(), state_dir=tmp_path)
    audit = main if trail_url == database_url else Database(trail_url, clock=Clock(), state_dir=tmp_path)
    yield main, audit
    main.dispose()
    audit.dispose()


def pretend(database: Database, track: Track, version: str) -> None:
    """Write another version into a database."""
    with database.write() as connection:
        table = sa.table(track.version_table, sa.column("version_num"))
        connection.execute(sa.update(table).values(version_num=version))


def test_an_empty_database_is_made_and_a_current_one_left_alone(pair: Pair) -> None:
    """`migrate` says whether it did something; afterwards the program may start."""
    with pytest.raises(DatabaseMismatch, match="run `drawbridge migrate`"):
        require_current(*pair)
    assert migrate(*pair) is True
    require_current(*pair)
    assert migrate(*pair) is False


def test_the_migrations_make_exactly_the_schema(pair: Pair) -> None:
    """Tables, columns, types, defaults, indexes and constraints are those the program is written for."""
    migrate(*pair)
    main, audit = pair
    wanted = {main: [MAIN.metadata], audit: [AUDIT.metadata]}
    if main is audit:
        wanted = {main: [MAIN.metadata, AUDIT.metadata]}
    for database, metadata in wanted.items():
        with database.read() as connection:
            context = MigrationContext.configure(
                connection,
                opts={
                    "compare_type": True,
                    "compare_server_default": True,
                    "include_name": lambda name, kind, _: kind != "table" or name not in _VERSION_TABLES,
                },
            )
            assert compare_metadata(context, metadata) == []  # type: ignore[arg-type]


_VERSION_TABLES = {MAIN.version_table, AUDIT.version_table}


def test_the_counters_begin_at_zero(pair: Pair) -> None:
    """The epochs exist from the first start."""
    migrate(*pair)
    with pair[0].read() as connection:
        assert {row.name: row.value for row in connection.execute(sa.select(epochs))} == {
            "access": 0,
            "connections": 0,
            "removed": 0,
        }


def test_four_processes_may_start_at_once(database_url: str, trail_url: str, tmp_path: Path) -> None:
    """One migrates, the others wait and find it done."""
    command = [sys.executable, "-c", _MIGRATE, database_url, trail_url, str(tmp_path / "state")]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(4)
    ]
    for process in started:  # all have imported everything before the first begins
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert 1 <= said.count("True") <= 2  # once for main, and for the trail perhaps by another one
    assert said.count("True") + said.count("False") == 4


_MIGRATE = """
import sys
from pathlib import Path
import alembic.command, alembic.config
from app.clock import Clock
from app.db.engine import Database
from app.db.migrate import migrate, require_current
main = Database(sys.argv[1], clock=Clock(), state_dir=Path(sys.argv[3]))
audit = main
if sys.argv[1] != sys.argv[2]:
    audit = Database(sys.argv[2], clock=Clock(), state_dir=Path(sys.argv[3]))
print("ready", flush=True)
sys.stdin.readline()
print(migrate(main, audit))
require_current(main, audit)
main.dispose()
audit.dispose()
"""


@pytest.mark.parametrize("track", [MAIN, AUDIT], ids=lambda track: track.name)
def test_a_newer_database_is_refused_with_both_versions(pair: Pair, track: Track) -> None:
    """Neither `migrate` nor a start touches what a newer program made."""
    migrate(*pair)
    pretend(pair[0] if track is MAIN else pair[1], track, "9999")
    for attempt in (migrate, require_current):
        with pytest.raises(DatabaseMismatch, match=f"9999, newer than the {track.head}"):
            attempt(*pair)


def test_an_older_database_asks_for_the_migration(pair: Pair) -> None:
    """The sentence says what to run."""
    migrate(*pair)
    pretend(pair[1], AUDIT, "0000")
    with pytest.raises(DatabaseMismatch, match=r"at version 0000 .* run `drawbridge migrate`"):
        require_current(*pair)


@pytest.mark.parametrize("which", [0, 1], ids=["main", "audit"])
def test_somebody_elses_database_is_refused_and_left_alone(pair: Pair, which: int) -> None:
    """A database that already holds tables is not ours to fill."""
    with pair[which].write() as connection:
        sa.Table("orders", sa.MetaData(), sa.Column("id", sa.Integer)).create(connection)
    with pytest.raises(DatabaseMismatch, match="1 tables without a version of ours"):
        migrate(*pair)
    with pair[which].read() as connection:
        assert sa.inspect(connection).get_table_names() == ["orders"]


def test_tables_of_ours_without_a_version_are_refused(pair: Pair) -> None:
    """Nobody knows what they hold."""
    with pair[1].write() as connection:
        AUDIT.metadata.create_all(connection)
    with pytest.raises(DatabaseMismatch, match="without a version"):
        migrate(*pair)


def test_a_migration_that_fails_leaves_nothing_behind(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a schema would be worse than none: the tables go back with the transaction."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("alembic.op.bulk_insert", fail)  # the last step of the first migration
    with pytest.raises(ZeroDivisionError):
        migrate(*pair)
    with pair[0].read() as connection:
        assert sa.inspect(connection).get_table_names() == []


@pytest.mark.parametrize("track", [MAIN, AUDIT], ids=lambda track: track.name)
def test_the_constants_name_the_newest_migration(track: Track) -> None:
    """`require_current` compares with a constant, so it must be the head of the folder, and the only one."""
    scripts = ScriptDirectory(track.folder.parents[1], version_locations=[track.folder])
    assert scripts.get_heads() == [track.head]
    names = [script.revision for script in scripts.walk_revisions()]
    assert all(name.isdecimal() and len(name) == 4 for name in names)


def test_a_start_does_not_load_alembic(pair: Pair, database_url: str, trail_url: str, tmp_path: Path) -> None:
    """It would cost every web process memory that only a migration needs."""
    migrate(*pair)
    code = _MIGRATE.replace("import alembic.command, alembic.config\n", "")
    code += 'print("alembic" in sys.modules)'
    command = [sys.executable, "-c", code, database_url, trail_url, str(tmp_path)]
    said = subprocess.run(command, input="go\n", capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.split() == ["ready", "False", "False"]
