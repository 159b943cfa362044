"""The journal: an appended answer survives whatever happens next, and nothing of it stays once it is committed."""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.broker.journal import Entry, Journal
from app.crypto.envelope import Sealed
from app.errors import Overloaded

ROOT = Path(__file__).parents[2]


def entry(number: int, *, attempt: str | None = None, size: int = 40) -> Entry:
    """An answer for one connection, its sealed bytes made of its number."""
    return Entry(
        attempt=attempt or f"attempt{number}",
        connection=f"connection{number}",
        generation=number,
        sealed=Sealed(blob=bytes([number]) * size, kek_id="k1"),
        facts={"life_seconds": 1800.0, "expires_at": 1_700_000_000_000_000, "scopes_granted": ["api"]},
    )


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """The journal of a living process."""
    opened = Journal(tmp_path, "living")
    yield opened
    opened.close()


def left_behind(directory: Path, *entries: Entry, name: str = "dead") -> Path:
    """The file of a process that died with these entries pending."""
    dead = Journal(directory, name)
    for one in entries:
        dead.append(one)
    file = directory / dead.name
    content = file.read_bytes()
    dead.close()
    file.write_bytes(content)
    return file


def adopted(directory: Path) -> list[Entry]:
    """What a starting process finds."""
    found: list[Entry] = []
    Journal(directory, "starting").adopt_orphans(found.append)
    return found


def test_what_was_appended_is_found_whole(tmp_path: Path) -> None:
    """Every field of every entry comes back, in order, and the file is gone afterwards."""
    file = left_behind(tmp_path, entry(1), entry(2))
    assert adopted(tmp_path) == [entry(1), entry(2)]
    assert not file.exists()
    assert adopted(tmp_path) == []


def test_a_tail_torn_at_any_byte_costs_only_itself(tmp_path: Path) -> None:
    """Wherever a crash cuts the last line, the entries before it are found and the torn one is not half believed."""
    whole = left_behind(tmp_path, entry(1), entry(2), entry(3)).read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for cut in range(last, len(whole) - 1):
        (tmp_path / "torn.journal").write_bytes(whole[:cut])
        (tmp_path / "dead.journal").unlink(missing_ok=True)
        assert adopted(tmp_path) == [entry(1), entry(2)], cut
    (tmp_path / "torn.journal").write_bytes(whole[:-1])
    assert adopted(tmp_path) == [entry(1), entry(2), entry(3)], "only the line end is missing"


def test_a_changed_byte_spoils_only_its_line(tmp_path: Path) -> None:
    """No byte of a line can change without the line being ignored, and the others are still found."""
    whole = left_behind(tmp_path, entry(1), entry(2)).read_bytes()
    end = whole.index(b"\n")
    for position in range(end):
        spoilt = bytearray(whole)
        spoilt[position] ^= 0x20 if spoilt[position] != 0x2A else 0x01
        (tmp_path / "dead.journal").write_bytes(bytes(spoilt))
        found = adopted(tmp_path)
        # Upper and lower case of the checksum's own hex digits mean the same number.
        assert found in ([entry(2)], [entry(1), entry(2)] if position < 8 else [entry(2)]), position


def test_done_entries_are_not_brought_in(tmp_path: Path) -> None:
    """A mark of done takes its entry out, wherever it stands."""
    dead = Journal(tmp_path, "dead")
    for number in (1, 2, 3):
        dead.append(entry(number))
    dead.done("attempt2")
    content = (tmp_path / dead.name).read_bytes()
    dead.close()
    (tmp_path / "copy.journal").write_bytes(content)
    (tmp_path / dead.name).unlink()
    assert adopted(tmp_path) == [entry(1), entry(3)]


def test_committed_answers_leave_no_byte_behind(tmp_path: Path, journal: Journal) -> None:
    """When nothing is pending the file is empty, and a later entry begins it anew."""
    file = tmp_path / journal.name
    for _ in range(2):
        journal.append(entry(1))
        journal.append(entry(2))
        assert base64.b64encode(entry(1).sealed.blob) in file.read_bytes()
        journal.done("attempt1")
        assert base64.b64encode(entry(2).sealed.blob) in file.read_bytes()
        journal.done("attempt2")
        assert file.read_bytes() == b""


def test_closing_keeps_what_is_pending_and_nothing_else(tmp_path: Path) -> None:
    """A process that ends in good order removes its file, unless an answer in it still waits for the database."""
    tidy, owing = Journal(tmp_path, "tidy"), Journal(tmp_path, "owing")
    tidy.append(entry(1))
    tidy.done("attempt1")
    tidy.close()
    assert not (tmp_path / "tidy.journal").exists()
    owing.append(entry(2))
    owing.close()
    assert adopted(tmp_path) == [entry(2)]


def test_a_living_process_keeps_its_journal(tmp_path: Path, journal: Journal) -> None:
    """A file somebody holds is left alone, by processes and by another journal of the same process alike."""
    journal.append(entry(1))
    assert adopted(tmp_path) == []
    child = textwrap.dedent(f"""
        from pathlib import Path
        from app.broker.journal import Journal
        print(Journal(Path({str(tmp_path)!r}), "child").adopt_orphans(lambda entry: None))
    """)
    answer = subprocess.run(
        [sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "0"
    assert (tmp_path / journal.name).stat().st_size > 0


def test_a_file_has_no_name_before_it_is_held(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that adopts at the very moment another begins its file cannot take it away from under it."""
    real = fcntl.flock
    met: list[Entry] = []

    def adopted_meanwhile(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        Journal(tmp_path, "starting").adopt_orphans(met.append)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", adopted_meanwhile)
    journal.append(entry(1))
    Journal(tmp_path, "starting").adopt_orphans(met.append)
    assert met == []
    assert [file.name for file in tmp_path.iterdir()] == [journal.name]
    assert b"attempt1" in (tmp_path / journal.name).read_bytes()


def test_an_entry_that_is_left_is_adopted_while_the_process_lives(tmp_path: Path, journal: Journal) -> None:
    """It lies in a file nobody holds; the others stay with the process, and of this one nothing stays there."""
    journal.append(entry(1))
    journal.append(entry(2))
    journal.leave("attempt1")
    journal.leave("unheard-of")
    assert adopted(tmp_path) == [entry(1)]
    assert adopted(tmp_path) == []
    journal.done("attempt2")
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [0]


def test_an_entry_that_cannot_be_left_stays(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes no new file: it is adopted when the process has ended."""
    journal.append(entry(1))

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        journal.leave("attempt1")
    assert adopted(tmp_path) == []
    journal.close()
    assert adopted(tmp_path) == [entry(1)]


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    """Folder and file are made for this user alone."""
    made = Journal(tmp_path / "journal", "mine")
    made.append(entry(1))
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "journal" / made.name).stat().st_mode & 0o777 == 0o600
    made.close()


def test_adoption_that_fails_half_way_begins_again(tmp_path: Path) -> None:
    """While the database refuses, the file stays; what was brought in already is offered again, which its fence allows."""
    file = left_behind(tmp_path, entry(1), entry(2))
    seen: list[Entry] = []

    def settle(one: Entry) -> None:
        seen.append(one)
        if len(seen) == 2:
            raise Overloaded("The database is away.")

    with pytest.raises(Overloaded):
        Journal(tmp_path, "starting").adopt_orphans(settle)
    assert file.exists()
    assert adopted(tmp_path) == [entry(1), entry(2)]


def test_the_keks_of_pending_entries_are_named(tmp_path: Path, journal: Journal) -> None:
    """A KEK can be given up only when no journal of the host names it, a living process's or a dead one's."""
    journal.append(entry(1))
    left_behind(tmp_path, entry(2))
    assert journal.pending_keks() == {"k1"}
    journal.done("attempt1")
    assert journal.pending_keks() == {"k1"}
    adopted(tmp_path)
    assert journal.pending_keks() == set()


def test_an_empty_or_foreign_folder_is_no_trouble(tmp_path: Path) -> None:
    """No folder, an empty file and a file of rubbish all hold nothing."""
    assert Journal(tmp_path / "none", "p").adopt_orphans(lambda _: None) == 0
    (tmp_path / "empty.journal").touch()
    (tmp_path / "rubbish.journal").write_bytes(b"\x00\xff\n\n zzzz {}\nnot a line\n")
    assert adopted(tmp_path) == []


FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from app.broker.journal import Journal
from app.errors import Overloaded
from tests.unit.test_broker_journal import entry

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails with an error, as on a full disk
journal = Journal(Path(sys.argv[1]), "full")
journal.append(entry(1))
journal.append(entry(2))
size = os.stat(Path(sys.argv[1]) / journal.name).st_size
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (size + {room}, hard))
try:
    {action}
except Overloaded as error:
    print("refused:", error.code, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
journal.append(entry(3))
os.kill(os.getpid(), signal.SIGKILL)
"""


def on_a_full_disk(directory: Path, action: str, *, room: int) -> str:
    """Run an action in a process whose files may grow by `room` bytes only, then append once more and die."""
    script = FULL_DISK.format(action=action, room=room)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(directory)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return ended.stdout


def test_a_disk_that_fills_up_refuses_and_tears_nothing(tmp_path: Path) -> None:
    """An answer that does not fit is refused, and what is appended once there is room again is found."""
    assert (
        on_a_full_disk(tmp_path, "journal.append(entry(9, size=4000))", room=100) == "refused: overloaded\n"
    )
    assert adopted(tmp_path) == [entry(1), entry(2), entry(3)]


def test_a_done_mark_that_does_not_fit_spoils_nothing(tmp_path: Path) -> None:
    """The mark only saves a replay: without room for it nothing is raised, and the next entry is not torn by half of it."""
    assert on_a_full_disk(tmp_path, 'journal.done("attempt1")', room=10) == ""
    assert adopted(tmp_path) == [entry(1), entry(2), entry(3)]


def test_an_append_is_on_the_disk_when_it_returns(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced after the line is written, and its folder when it is made."""
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def noting(descriptor: int) -> None:
        real(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        synced.append((path.name, path.stat().st_size if path.is_file() else -1))

    monkeypatch.setattr(os, "fsync", noting)
    journal.append(entry(1))
    size = (tmp_path / journal.name).stat().st_size
    assert synced == [(tmp_path.name, -1), (journal.name, size)]


def test_a_disk_that_cannot_sync_promises_nothing(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing fsync refuses the entry and takes its line back."""
    journal.append(entry(1))

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken)
        with pytest.raises(Overloaded):
            journal.append(entry(2))
    content = (tmp_path / journal.name).read_bytes()
    assert content.count(b"\n") == 1
    assert b"attempt2" not in content
