"""How rows go to PostgreSQL."""

import json

import psycopg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.access.ledger import _array

TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))


@given(
    texts=st.lists(st.none() | TEXT | TEXT.map(json.dumps), max_size=8),
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8),
    blobs=st.lists(st.binary(max_size=40), max_size=8),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
def test_arrays_arrive_as_they_were(
    postgres_url: str, texts: list[str | None], numbers: list[int], blobs: list[bytes]
) -> None:
    """Whatever is in a row, PostgreSQL reads the array literal back as the same values."""
    url = postgres_url.replace("postgresql+psycopg://", "postgresql://")
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT %s::text[], %s::bigint[], %s::bytea[]", (_array(texts), _array(numbers), _array(blobs))
        ).fetchone()
    assert found == (texts, numbers, blobs)
