"""What `./drawbridge test` promises: every part is there, or named as missing, or named as left out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import run

ROOT = Path(__file__).parents[2]


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command as the launcher does."""
    return subprocess.run(
        [sys.executable, "-m", "tests.run", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTEST_ADDOPTS": ""} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_part_that_cannot_be_had_fails_by_name_and_shows_no_password() -> None:
    """A named server that does not answer is a failure before any test runs, not a silent omission."""
    url = "postgresql://somebody:hidden-word@127.0.0.1:1/nothing"
    done = command("--without", "browser", DRAWBRIDGE_TEST_DATABASE_URL=url)
    assert done.returncode == 1
    assert "postgres: MISSING. DRAWBRIDGE_TEST_DATABASE_URL names 127.0.0.1:1" in done.stdout
    assert "leave it out with --without postgres" in done.stdout
    assert "hidden-word" not in done.stdout + done.stderr
    assert "running: pytest" not in done.stdout


def test_left_out_parts_are_printed_and_their_tests_counted() -> None:
    """A run without a part says so before and after the tests."""
    done = command("--without", "postgres", "--without", "browser", "tests/unit/test_postgres_server.py")
    assert "postgres: left out on request" in done.stdout
    assert "--without-postgres --without-browser tests/unit/test_postgres_server.py" in done.stdout
    assert "LEFT OUT on request: postgres (5 tests need PostgreSQL)" in done.stdout
    assert done.returncode == 0


def test_several_processes_share_the_tests_unless_one_is_wanted() -> None:
    """Who gives the number of processes, or wants a debugger, gets what was asked for."""
    shared = run.side_by_side(["tests/unit"])
    assert int(shared[shared.index("--numprocesses") + 1]) > 1
    for wish in ("-n0", "--numprocesses=1", "--pdb"):
        assert run.side_by_side([wish]) == []


def test_exit_code_and_other_arguments_are_pytests() -> None:
    """What the command does not know goes to pytest, whose exit code it ends with: 5 says no test ran."""
    done = command(
        "--without=postgres", "--without=browser", "-k", "named_by_nobody", "tests/unit/test_run.py"
    )
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_unknown_part_is_a_usage_error() -> None:
    """A misspelt part is refused, for else the run would be smaller or larger than was meant."""
    done = command("--without", "postgre")
    assert done.returncode == 2
    assert "invalid choice: 'postgre'" in done.stderr


def test_install_only_makes_parts_ready_and_runs_nothing() -> None:
    """A build machine can separate installing from running."""
    done = command("--install-only", "--without", "browser")
    assert done.returncode == 0
    assert "postgres: " in done.stdout
    assert "running" not in done.stdout


def test_browser_that_can_be_neither_found_nor_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With browser tests to run, no browser and no apt-get, the next step is named."""
    (tmp_path / "tests" / "browser").mkdir(parents=True)
    (tmp_path / "tests" / "browser" / "test_console.py").touch()
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(run.BROWSER_VARIABLE, raising=False)
    with pytest.raises(run.MissingPartError, match="apt-get install chromium-headless-shell"):
        run.ready_browser()
    monkeypatch.setenv(run.BROWSER_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(run.MissingPartError, match="absent, which is not a program"):
        run.ready_browser()


def test_no_browser_is_asked_for_while_no_test_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is installed for tests that do not exist."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.ready_browser() == "no test needs one"
