"""Shows the table of what ran of the short profile at the end of a test run."""

import pytest

table_key = pytest.StashKey[str]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the scenarios counted, whether they held or not."""
    table = config.stash.get(table_key, None)
    if table is not None:
        terminalreporter.section("chaos, parts of the short profile")
        terminalreporter.write_line(table)
