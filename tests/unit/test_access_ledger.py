"""How rows go to PostgreSQL."""

import json

import psycopg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.access.chain import Row
from app.access.ledger import _columns

TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))
NUMBER = st.integers(-(2**63), 2**63 - 1)
ROWS = st.builds(
    Row,
    writer=st.just("w"),
    n=NUMBER,
    at=NUMBER,
    actor=TEXT,
    action=TEXT,
    target=TEXT,
    outcome=TEXT,
    detail=st.none() | TEXT.map(json.dumps),
    mac=st.binary(max_size=40),
)


@given(rows=st.lists(ROWS, min_size=1, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
def test_rows_arrive_as_they_were(postgres_url: str, rows: list[Row]) -> None:
    """Whatever is in a row, PostgreSQL reads the columns back as the same values."""
    _, (writer, *columns) = _columns(rows)
    url = postgres_url.replace("postgresql+psycopg://", "postgresql://")
    kinds = ["bigint", "bigint", "text", "text", "text", "text", "text", "bytea"]
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT " + ", ".join(f"%s::{kind}[]" for kind in kinds), columns
        ).fetchone()
    assert found is not None
    assert [Row(writer, *values) for values in zip(*found, strict=True)] == rows
