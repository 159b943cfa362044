"""Handing a connection over: whatever becomes of the output, the grant is here or in a copy that has been named."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psycopg
import pytest

from app.broker.transfer import ExportUnclear
from app.cli.sealed_file import SealedFile, sealed_file
from app.errors import Conflict
from tests.flows.cli_stage import Said, Terminal, audited, terminal
from tests.flows.test_cli_connections import key_pair
from tests.installation import Installation, connect, installation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Terminal, Installation]]:
    """An installation with one connection, and a key to seal it to in public.pem."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        connect(made.host(), made, "salesforce", name="acme")
        key_pair(tmp_path)
        yield opened, made


def export(opened: Terminal, folder: Path, output: Path) -> Said:
    """Export acme into a file."""
    return opened.type(
        "connection", "export", "acme", "--to", str(folder / "public.pem"), "--output", str(output), "--yes"
    )


def insist_on_nothing_lost(opened: Terminal) -> None:
    """The connection is still here, refreshed by us, and no export is on record."""
    assert opened.json("connection", "show", "acme")["exported_at"] is None
    assert opened.json("connection", "refresh", "acme")["state"] == "healthy"
    assert "broker:connection:exported" not in {action for _, action, _ in audited(opened)}


def insist_on_one_sentence(said: Said) -> None:
    """Refused by us, not a fault of the program."""
    assert said.code == 1
    assert said.out == ""
    assert "fault of the program" not in said.err
    assert len(said.err.splitlines()) == 1


def test_an_existing_file_is_neither_overwritten_nor_the_end_of_the_grant(
    acme: tuple[Terminal, Installation], tmp_path: Path
) -> None:
    """One sentence and exit code 1; file and connection stay as they were."""
    opened, _ = acme
    output = tmp_path / "moved.txt"
    output.write_text("precious")
    said = export(opened, tmp_path, output)
    insist_on_one_sentence(said)
    assert "exists already" in said.err
    assert output.read_text() == "precious"
    insist_on_nothing_lost(opened)


def test_a_directory_that_is_not_there_costs_nothing(
    acme: tuple[Terminal, Installation], tmp_path: Path
) -> None:
    """One sentence and exit code 1; the connection stays here."""
    opened, _ = acme
    said = export(opened, tmp_path, tmp_path / "missing" / "moved.txt")
    insist_on_one_sentence(said)
    assert "No such file or directory" in said.err
    insist_on_nothing_lost(opened)


def test_what_is_refused_leaves_no_file(acme: tuple[Terminal, Installation], tmp_path: Path) -> None:
    """An unknown connection and a private key where the public one belongs: nothing stays behind."""
    opened, _ = acme
    (tmp_path / "public.pem").write_bytes((tmp_path / "private.pem").read_bytes())
    output = tmp_path / "out" / "moved.txt"
    output.parent.mkdir()
    assert export(opened, tmp_path, output).code == 1
    assert list(output.parent.iterdir()) == []
    insist_on_nothing_lost(opened)


def test_a_copy_left_over_is_named_and_never_overwritten(
    acme: tuple[Terminal, Installation], tmp_path: Path
) -> None:
    """A process killed before the renaming leaves NAME.partial; the next export says what that may be."""
    opened, _ = acme
    output = tmp_path / "moved.txt"
    left = tmp_path / "moved.txt.partial"
    left.write_text("perhaps the only copy")
    said = export(opened, tmp_path, output)
    insist_on_one_sentence(said)
    assert str(left) in said.err
    assert "exported_at" in said.err
    assert left.read_text() == "perhaps the only copy"
    insist_on_nothing_lost(opened)


def test_a_good_export_leaves_one_private_file(acme: tuple[Terminal, Installation], tmp_path: Path) -> None:
    """One line in one file that only its owner reads, and the connection is marked."""
    opened, _ = acme
    output = tmp_path / "out" / "moved.txt"
    output.parent.mkdir()
    assert export(opened, tmp_path, output).code == 0
    assert list(output.parent.iterdir()) == [output]
    assert output.stat().st_mode & 0o777 == 0o600
    assert len(output.read_text().splitlines()) == 1
    assert opened.json("connection", "show", "acme")["exported_at"]


KILLED = """
import os, signal, sys
from app.cli.program import main
from app.cli.sealed_file import SealedFile
SealedFile.give_name = lambda file: os.kill(os.getpid(), signal.SIGKILL)
sys.argv[0] = "drawbridge"
main()
"""


def test_a_process_killed_after_the_commit_leaves_a_good_copy(
    acme: tuple[Terminal, Installation], tmp_path: Path
) -> None:
    """It lacks its name alone: the connection is marked, and the other installation takes it over from NAME.partial."""
    opened, made = acme
    words = ["connection", "export", "acme", "--yes", "--to", str(tmp_path / "public.pem")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words, "--output", str(tmp_path / "moved.txt")],
        cwd=ROOT,
        env={**os.environ, **made.environment()},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "moved.txt").exists()
    assert opened.json("connection", "show", "acme")["exported_at"]
    take_over(made, tmp_path, tmp_path / "moved.txt.partial")


def take_over(made: Installation, folder: Path, moved: Path) -> None:
    """Import the file at another installation, and refresh there."""
    there = Terminal(made.environment(host="there", DATABASE_URL=f"sqlite:///{folder / 'there.db'}"))
    there.done("migrate")
    key = str(folder / "private.pem")
    taken = there.json("connection", "import", "--key-file", key, standard_input=moved.read_text())
    assert taken["stored"] == 1
    assert there.json("connection", "refresh", "acme")["state"] == "healthy"


# Standard output


def shell(made: Installation, folder: Path, redirection: str, *, words: str | None = None) -> Said:
    """The program as a process of its own, with its standard output redirected by a shell."""
    command = words or f"connection export acme --to {folder / 'public.pem'} --yes"
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m app {command} {redirection}"],
        cwd=ROOT,
        env={**os.environ, **made.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_standard_output_that_takes_nothing_costs_nothing(
    acme: tuple[Terminal, Installation], tmp_path: Path, redirection: str
) -> None:
    """A full disk and a closed output are exit code 1 and one sentence; the connection stays here."""
    opened, made = acme
    said = shell(made, tmp_path, redirection)
    insist_on_one_sentence(said)
    assert "Nothing was exported" in said.err
    insist_on_nothing_lost(opened)


def test_a_reader_who_has_gone_costs_nothing(acme: tuple[Terminal, Installation], tmp_path: Path) -> None:
    """What nobody reads was not handed over: exit code 1, and the connection stays here."""
    opened, made = acme
    reading, writing = os.pipe()
    os.close(reading)
    words = ["connection", "export", "acme", "--yes", "--to", str(tmp_path / "public.pem"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "app", *words],
        cwd=ROOT,
        env={**os.environ, **made.environment()},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    insist_on_one_sentence(Said(done.returncode, "", done.stderr))
    insist_on_nothing_lost(opened)


def test_standard_output_into_a_file_is_an_export(
    acme: tuple[Terminal, Installation], tmp_path: Path
) -> None:
    """The line arrives, and another installation takes the connection over."""
    opened, made = acme
    moved = tmp_path / "moved.txt"
    said = shell(made, tmp_path, f">{moved}")
    assert said.code == 0, said
    assert opened.json("connection", "show", "acme")["exported_at"]
    take_over(made, tmp_path, moved)


# The file by itself


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file grows beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def deliver(output: Path, *, and_then: BaseException) -> None:
    """Write a sealed line, and fail before it has its name."""
    with sealed_file(output) as file:
        file.deliver("sealed")
        raise and_then


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """Half a line is no copy: it is removed and said."""
    with (
        pytest.raises(click.ClickException, match="cannot be written"),
        sealed_file(tmp_path / "moved.txt") as file,
        small_disk(10),
    ):
        file.deliver("a line of more than ten bytes")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_mark_removes_the_copy(tmp_path: Path) -> None:
    """What was delivered and then refused by the database must not lie around."""
    with pytest.raises(Conflict):
        deliver(tmp_path / "moved.txt", and_then=Conflict("A refresh came in between."))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ExportUnclear("Not confirmed.")])
def test_a_copy_that_may_be_the_only_one_is_kept_and_named(
    tmp_path: Path, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted or unconfirmed after the delivery: the copy stays, not under its good name, and is spoken of."""
    with pytest.raises(type(error)):
        deliver(tmp_path / "moved.txt", and_then=error)
    left = tmp_path / "moved.txt.partial"
    assert list(tmp_path.iterdir()) == [left]
    assert left.read_text() == "sealed\n"
    assert str(left) in capsys.readouterr().err


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Both files stay, and where the copy is, is said."""
    output = tmp_path / "moved.txt"
    file = SealedFile(output)
    file.deliver("sealed")
    output.write_text("precious")
    with pytest.raises(click.ClickException, match=r"its copy is .*moved\.txt\.partial"):
        file.give_name()
    file.close()
    assert output.read_text() == "precious"
    assert (tmp_path / "moved.txt.partial").read_text() == "sealed\n"


# The database


# The session ends itself where the deferred check runs, which is inside COMMIT.
_CUT_AT_COMMIT = """
CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER cut AFTER UPDATE OF exported_at ON connections
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION cut();
"""


@pytest.mark.postgres
def test_a_mark_that_is_not_confirmed_keeps_the_copy(postgres_url: str, tmp_path: Path) -> None:
    """The line to the database breaks inside COMMIT: nobody knows whether it is marked, so the copy stays."""
    with installation(postgres_url, tmp_path) as made:
        host = made.host()
        connect(host, made, "salesforce", name="acme")
        key_pair(tmp_path)
        url = postgres_url.replace("postgresql+psycopg", "postgresql")
        with psycopg.connect(url, autocommit=True) as session:
            session.execute(_CUT_AT_COMMIT)
        out = tmp_path / "out"
        out.mkdir()
        said = shell(
            made,
            tmp_path,
            "",
            words=f"connection export acme --to {tmp_path / 'public.pem'} --yes --output {out / 'moved.txt'}",
        )
        assert said.code == 1
        assert "did not confirm" in said.err
        assert f"{out / 'moved.txt.partial'}" in said.err
        assert [file.name for file in out.iterdir()] == ["moved.txt.partial"]
        printed = shell(made, tmp_path, "--json")
        assert printed.code == 1
        assert json.loads(printed.out)["name"] == "acme"
        assert "not certain" in printed.err
        assert host.store.named("acme").exported_at is None
