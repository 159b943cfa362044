"""Takes the audit database away for real, and brings it back."""

from __future__ import annotations

from pathlib import Path

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import URL

from app.db.engine import Database


def take_away(database: Database) -> None:
    """Make the database unreachable at once: the file is gone from its place, or the server lets nobody in."""
    database.dispose()
    if database.dialect == "sqlite":
        for file in _files(database.url):
            if file.exists():
                file.rename(_aside(file))
        _files(database.url)[0].mkdir()
        return
    name = database.url.database
    with _administration(database.url) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
        )


def bring_back(database: Database) -> None:
    """Undo it."""
    if database.dialect == "sqlite":
        _files(database.url)[0].rmdir()
        for file in _files(database.url):
            if _aside(file).exists():
                _aside(file).rename(file)
        return
    with _administration(database.url) as connection:
        connection.execute(f'ALTER DATABASE "{database.url.database}" ALLOW_CONNECTIONS true')


def _files(url: URL) -> list[Path]:
    return [Path(f"{url.database}{suffix}") for suffix in ("", "-wal", "-shm")]


def _aside(file: Path) -> Path:
    return file.with_name(f"away-{file.name}")


def _administration(url: URL) -> psycopg.Connection[tuple[object, ...]]:
    plain = sa.make_url(url).set(drivername="postgresql", database="postgres")
    return psycopg.connect(plain.render_as_string(hide_password=False), autocommit=True)
