"""How the trail comes back to a database that was away."""

import time
from pathlib import Path

import sqlalchemy as sa

from app.access.audit import Entry, Trail
from app.clock import Clock
from app.db.engine import Database
from app.db.migrate import migrate
from app.telemetry import Event
from tests.contract.audit_outage import bring_back, take_away

ROWS = 400


def wait_for_rows(database: Database, count: int) -> int:
    """Wait until the trail has as many rows as that; how many transactions brought them."""
    counted = sa.text("SELECT count(*), count(DISTINCT xmin::text) FROM audit")
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with database.read() as connection:
            rows, transactions = connection.execute(counted).one()
        if rows >= count:
            return int(transactions)
        time.sleep(0.05)
    raise AssertionError(f"{rows} of {count} rows came")


def test_what_was_spooled_one_by_one_is_brought_in_together(postgres_url: str, tmp_path: Path) -> None:
    """A minute of hand-outs is thousands of commits to the spool; the database gets them in a few transactions."""
    clock = Clock()
    database = Database(postgres_url, clock=clock, state_dir=tmp_path)
    migrate(database, database)
    trail = Trail(database, b"k" * 32, clock=clock, state_dir=tmp_path)
    entry = Entry("caller:reader", str(Event.TOKEN_ISSUED), "one", "issued")
    trail.record(entry)
    take_away(database)
    for _ in range(ROWS):
        trail.record(entry)
    bring_back(database)
    transactions = wait_for_rows(database, ROWS + 1)
    verdict = trail.verify()
    trail.close()
    database.dispose()
    assert verdict.sound
    assert verdict.rows == ROWS + 1
    assert transactions <= 4
