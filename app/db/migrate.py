"""Brings both databases to the schema this version was written for, and refuses those of another.

The main database and the trail have a version table each, so that the trail may live in a file of its own
(SQLite) or beside everything else (PostgreSQL). Versions are numbers with leading zeros, so "newer" is a
comparison of text.

Alembic is imported only when there is something to do: `require_current`, which every process calls at its
start, reads the version table itself and compares it with the constants below, which a test holds to the
versions folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.db.engine import Database
from app.db.schema import audit_metadata, metadata
from app.errors import DatabaseMismatch
from app.telemetry import Event, log

__all__ = ["AUDIT", "MAIN", "Track", "migrate", "require_current"]

_PATIENCE: Final = (
    60.0  # seconds: another process may be migrating, and an index on a big table takes its time
)
_FOLDER: Final = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class Track:
    """One line of versions: the tables it is about, where its version is written, the newest one."""

    name: str
    metadata: sa.MetaData
    version_table: str
    head: str

    @property
    def folder(self) -> Path:
        """Where its migrations are."""
        return _FOLDER / "versions" / self.name


MAIN: Final = Track("main", metadata, "drawbridge_version", "0001")
AUDIT: Final = Track("audit", audit_metadata, "drawbridge_audit_version", "0001")


def migrate(main: Database, audit: Database) -> bool:
    """Bring both databases up to date; true when there was something to do.

    Any number of processes may start it at once: one does it, the others wait and find it done. What fails
    leaves nothing behind. Raises `DatabaseMismatch` for a database of a newer version or of somebody else,
    `DatabaseUnavailable`.
    """
    done = [_migrate_one(database, track) for database, track in ((main, MAIN), (audit, AUDIT))]
    return any(done)


def require_current(main: Database, audit: Database) -> None:
    """Raise `DatabaseMismatch` unless both databases are exactly of this version."""
    for database, track in ((main, MAIN), (audit, AUDIT)):
        with database.read() as connection:
            version = _version(connection, track)
        if version is None or version < track.head:
            raise DatabaseMismatch(
                f"The {track.name} database is at version {version or 'none'} and this program needs "
                f"{track.head}: run `drawbridge migrate`."
            )


def _migrate_one(database: Database, track: Track) -> bool:
    with database.read() as connection:
        if _version(connection, track) == track.head:
            return False
    with database.write(patience=_PATIENCE) as connection:
        database.take_turns(connection, "migrate")
        version = _version(connection, track)
        if version == track.head:
            return False
        if version is None:
            _refuse_foreign(connection, track)
        _upgrade(connection, track)
    log(Event.DATABASE_MIGRATED, database=track.name, before=version or "none", after=track.head)
    return True


def _version(connection: Connection, track: Track) -> str | None:
    """The version written in the database, None when there is none; a newer one than ours is refused."""
    if not sa.inspect(connection).has_table(track.version_table):
        return None
    table = sa.table(track.version_table, sa.column("version_num"))
    version = connection.scalar(sa.select(table.c.version_num))
    if version is not None and version > track.head:
        raise DatabaseMismatch(
            f"The {track.name} database is at version {version}, newer than the {track.head} this program "
            "knows: start the newer program, or restore the backup made before the upgrade."
        )
    return version


def _refuse_foreign(connection: Connection, track: Track) -> None:
    present = set(sa.inspect(connection).get_table_names())
    if not present.isdisjoint({MAIN.version_table, AUDIT.version_table}):
        present &= set(
            track.metadata.tables
        )  # the other track is here already, so only our own names are in the way
    if present:
        raise DatabaseMismatch(
            f"The {track.name} database holds {len(present)} tables without a version of ours; "
            "DATABASE_URL must name an empty database or one that Drawbridge made."
        )


def _upgrade(connection: Connection, track: Track) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", _literally(_FOLDER))
    config.set_main_option("version_locations", _literally(track.folder))
    config.set_main_option("path_separator", "os")
    config.attributes.update(
        connection=connection, metadata=track.metadata, version_table=track.version_table
    )
    command.upgrade(config, "head")


def _literally(path: Path) -> str:
    """The path as Alembic's configuration wants it, where a percent sign begins an interpolation."""
    return str(path).replace("%", "%%")
