"""Metrics: in memory until prepared, then shared between processes through files that survive their
deaths.
"""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import prometheus_client.values
import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from app.telemetry import metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _metrics_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count in memory again after each test."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "unused")
    monkeypatch.setattr(prometheus_client.values, "ValueClass", prometheus_client.values.MutexValue)
    monkeypatch.setattr(metrics, "_shared", None)
    forget()
    yield
    if metrics._shared is not None:
        metrics._shared.leave()
    forget()


def forget() -> None:
    metrics._local = metrics.CollectorRegistry()
    for measure in metrics._all:
        measure.forget()


def samples() -> dict[tuple[str, ...], float]:
    """Every sample by its name and label values, in the order of the label names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.expose().decode())
        for sample in family.samples
    }


def in_child(work: Callable[[], None], *, kill: bool = False) -> None:
    """Do something in a forked child, which then leaves without tidying up."""
    child = os.fork()
    if child == 0:
        try:
            work()
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill else 0)


def test_names_are_ours_and_labels_are_few() -> None:
    """A connection or caller as a label would make as many series as there are customers."""
    names = [measure.name for measure in metrics._all]
    assert len(set(names)) == len(names)
    for measure in metrics._all:
        assert measure.name.startswith("drawbridge_")
        assert len(measure.label_names) <= 2
        assert not {"connection", "caller", "account", "portal", "user"} & set(measure.label_names)
        assert measure.says.endswith(".")


def test_counting_works_before_anything_is_prepared() -> None:
    """A command on the terminal counts too; nobody will ask it."""
    metrics.hand_outs.labels("hubspot", "cached").inc()
    metrics.waiters.inc()
    metrics.waiters.inc()
    metrics.waiters.dec()
    metrics.clock_skew_seconds.set(1.5)
    metrics.waiters_turned_away.inc(3)
    metrics.audit_seconds.observe(0.002)
    with metrics.refresh_seconds.labels("hubspot").time():
        pass
    got = samples()
    assert got["drawbridge_hand_outs_total", "hubspot", "cached"] == 1
    assert got["drawbridge_waiters",] == 1
    assert got["drawbridge_clock_skew_seconds",] == 1.5
    assert got["drawbridge_waiters_turned_away_total",] == 3
    assert got["drawbridge_audit_seconds_count",] == 1
    assert got["drawbridge_audit_seconds_bucket", "0.0025"] == 1
    assert got["drawbridge_refresh_seconds_count", "hubspot"] == 1


def test_many_counted_at_once_are_counted_as_one_by_one() -> None:
    """What falls on a bucket's bound or beyond the last one goes where the library would put it."""
    times = [0.0, 0.0005, 0.0006, 0.025, 4.9, 5.0, 31.0]
    for seconds in times:
        metrics.hand_out_seconds.labels("waited").observe(seconds)
    metrics.hand_out_seconds.observe_all(times, "kept")
    got = samples()

    def of(way: str) -> dict[tuple[str, ...], float]:
        shown = {key: value for key, value in got.items() if way in key and not key[0].endswith("_created")}
        return {tuple(part for part in key if part != way): value for key, value in shown.items()}

    assert of("kept") == of("waited")
    assert of("kept")["drawbridge_hand_out_seconds_bucket", "5.0"] == 6
    assert of("kept")["drawbridge_hand_out_seconds_count",] == 7


def test_label_values_without_end_are_counted_together() -> None:
    """A bug that puts an id into a label must not fill the memory."""
    for number in range(metrics._MOST_SERIES + 50):
        metrics.denials.labels(f"code-{number}").inc()
    got = {key: value for key, value in samples().items() if key[0] == "drawbridge_denials_total"}
    assert len(got) == metrics._MOST_SERIES + 1
    assert got["drawbridge_denials_total", "other"] == 50


def test_numbers_of_several_processes_are_added_up(tmp_path: Path) -> None:
    """Whoever is asked answers for all; a counter of a dead process stays, its level does not."""
    metrics.prepare(tmp_path)
    metrics.waiters_turned_away.inc()
    metrics.waiters.set(2)

    def work() -> None:
        metrics.waiters_turned_away.inc(10)
        metrics.waiters.set(5)
        metrics.hand_out_seconds.labels("kept").observe(0.002)

    for _ in range(3):
        in_child(work)
    in_child(work, kill=True)
    for _ in range(2):
        got = samples()
        assert got["drawbridge_waiters_turned_away_total",] == 41
        assert got["drawbridge_waiters",] == 2
        assert got["drawbridge_hand_out_seconds_count", "kept"] == 4
        assert got["drawbridge_hand_out_seconds_bucket", "0.0025", "kept"] == 4
        assert got["drawbridge_hand_out_seconds_bucket", "0.001", "kept"] == 0


def test_the_files_of_the_dead_do_not_pile_up(tmp_path: Path) -> None:
    """Workers that are restarted every thousand requests leave nothing but their sum."""
    metrics.prepare(tmp_path)
    for _ in range(5):
        in_child(metrics.waiters_turned_away.inc)
    assert len(list((tmp_path / "metrics").glob("counter_*.db"))) == 6
    metrics.expose()
    assert len(list((tmp_path / "metrics").glob("counter_*.db"))) == 2
    assert len(list((tmp_path / "metrics").glob("*.owner"))) == 1


def test_a_living_process_keeps_its_level_and_files(tmp_path: Path) -> None:
    """It is known by its lock, not by a process number another container may have too."""
    program = """
import sys
from pathlib import Path
from app.telemetry import metrics
metrics.prepare(Path(sys.argv[1]))
metrics.waiters.set(7)
metrics.waiters_turned_away.inc(4)
print("ready", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"ready\n"
        metrics.prepare(tmp_path)
        metrics.waiters.set(1)
        got = samples()
        assert (got["drawbridge_waiters",], got["drawbridge_waiters_turned_away_total",]) == (8, 4)
        other.stdin.close()
        other.wait(60)
    got = samples()
    assert (got["drawbridge_waiters",], got["drawbridge_waiters_turned_away_total",]) == (1, 4)


def test_a_start_with_nobody_alive_begins_at_zero(tmp_path: Path) -> None:
    """Series of an older version would be told for ever otherwise."""

    def work() -> None:
        metrics.prepare(tmp_path)
        metrics.waiters_turned_away.inc(9)

    in_child(work)
    metrics.prepare(tmp_path)
    metrics.waiters_turned_away.inc()
    assert samples()["drawbridge_waiters_turned_away_total",] == 1


def test_a_damaged_file_is_left_out(tmp_path: Path) -> None:
    """One bad file must not hide all the numbers."""
    metrics.prepare(tmp_path)
    metrics.waiters_turned_away.inc()
    for name, content in (
        ("counter_1-aa.db", b"\xff\x00\x00\x00" + b"\xff" * 60),
        ("counter_2-bb.db", b""),
        ("histogram_3-cc.db", b"\x40\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00" + b"nonsense" * 7),
    ):
        (tmp_path / "metrics" / name).write_bytes(content)
    assert samples()["drawbridge_waiters_turned_away_total",] == 1


def test_blocks_are_set_aside_before_they_are_written(tmp_path: Path) -> None:
    """A page without a block on a full disk is a SIGBUS."""
    metrics.prepare(tmp_path)
    for file in (tmp_path / "metrics").glob("*.db"):
        assert file.stat().st_blocks * 512 >= metrics._BLOCKS


def test_a_full_disk_makes_a_process_count_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts all the same, and leaves no file without blocks behind."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    metrics.prepare(tmp_path)
    metrics.waiters_turned_away.inc()
    assert samples()["drawbridge_waiters_turned_away_total",] == 1
    assert list((tmp_path / "metrics").glob("*.db")) == []


def test_a_fork_on_a_full_disk_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the files of its parent; nothing is raised into a request."""
    metrics.prepare(tmp_path)
    metrics.waiters_turned_away.inc()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work() -> None:
        monkeypatch.setattr(os, "posix_fallocate", full)
        metrics.waiters_turned_away.inc()
        metrics.waiters_turned_away.inc()

    in_child(work)
    assert ("drawbridge_waiters_turned_away_total",) in samples()


def test_numbers_counted_for_the_answer_are_shown_with_it() -> None:
    """Such as connections by state, which are asked of the database when somebody wants to know."""
    family = GaugeMetricFamily("drawbridge_connections", "Connections.", labels=["state"])
    family.add_metric(["enabled"], 3)
    assert b'drawbridge_connections{state="enabled"} 3.0' in metrics.expose([family])
