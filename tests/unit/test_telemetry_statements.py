"""What SQLAlchemy says at each level of the log."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import sqlalchemy as sa
from app.telemetry import configure
configure(sys.argv[1])
with sa.create_engine("sqlite://").connect() as connection:
    connection.execute(sa.text("SELECT 1"))
"""


@pytest.mark.parametrize(("level", "told"), [("DEBUG", True), ("INFO", False), ("ERROR", False)])
def test_statements_are_told_at_debug_alone(level: str, told: bool) -> None:
    """At INFO, which is the default, a line for every SQL statement would drown everything else."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, level], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ("SELECT 1" in done.stderr) is told
