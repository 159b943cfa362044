"""The simulation from the command line.

    python -m tests.simulation --seed 12345 --trace            replay one schedule
    python -m tests.simulation --schedules 10000               as CI runs it
    python -m tests.simulation --schedules 200000 --state run.json    in pieces: stopped and begun again at will

Exit 0 when every promise held, 1 when one was broken (the seed and the last steps are printed), 130 when interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.simulation.plan import Outcome, run_schedule
from tests.simulation.report import Sums, shown
from tests.simulation.template import Template, make_template

_SAVE_EVERY: Final = 3.0
_ENOUGH: Final = 5  # broken schedules after which the rest is not worth the time
_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a file system in memory, where there is one

_template: Template | None = None
_directory: Path | None = None


def main(arguments: list[str]) -> int:
    """Replay one schedule or run many; the exit code."""
    options = _parser().parse_args(arguments)
    warnings.simplefilter("ignore", ResourceWarning)
    if options.seed is not None:
        return _replay(options.seed, trace=options.trace, as_json=options.json)
    return _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="replay the schedule of this seed")
    parser.add_argument("--trace", action="store_true", help="print every step of it")
    parser.add_argument("--schedules", type=int, default=1000, help="how many to run")
    parser.add_argument("--start", type=int, default=1, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--state", type=Path, help="keep progress in this file and go on from it")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


# One schedule


def _replay(seed: int, *, trace: bool, as_json: bool) -> int:
    with _scratch() as directory:
        outcome = run_schedule(
            seed, make_template(directory / "template"), directory / "world", keep_all_steps=True
        )
    if as_json:
        sums = Sums(start=seed)
        sums.add(outcome)
        print(json.dumps(sums.plain() | {"trace": [shown(step) for step in outcome.trace] if trace else []}))
    else:
        for step in outcome.trace if trace else ():
            print(shown(step))
        print(_sentence(outcome))
    return 1 if outcome.violation else 0


def _sentence(outcome: Outcome) -> str:
    ending = f"BROKEN {outcome.violation}" if outcome.violation else "every promise held"
    return f"seed {outcome.seed}: {ending} ({outcome.steps} steps, {outcome.seconds:.0f} s of virtual time)"


@contextmanager
def _scratch() -> Iterator[Path]:
    place = _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="drawbridge-simulation-", dir=place))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# Many


def _run(options: argparse.Namespace) -> int:
    sums = Sums(start=options.start)
    if options.state is not None and options.state.exists():
        sums = Sums.load(options.state)
    stop = _Stop()
    with _scratch() as directory:
        _run_all(sums, options, directory, stop)
    if options.state is not None:
        sums.save(options.state)
    _tell(sums, as_json=options.json)
    if sums.broken:
        return 1
    return 130 if stop.asked else 0


class _Stop:
    """Notes that somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _run_all(sums: Sums, options: argparse.Namespace, directory: Path, stop: _Stop) -> None:
    batches = -(-options.schedules // sums.batch)
    finished = set(sums.done)
    waiting = iter([number for number in range(batches) if number not in finished])
    began, before, saved = time.monotonic(), sums.seconds, time.monotonic()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        options.processes, mp_context=context, initializer=_prepare, initargs=(directory,)
    ) as pool:
        running: dict[Future[Sums], int] = {}
        while True:
            while len(running) < 2 * options.processes and not stop.asked and len(sums.broken) < _ENOUGH:
                number = next(waiting, None)
                if number is None:
                    break
                most = min(sums.batch, options.schedules - number * sums.batch)
                running[pool.submit(_batch, sums.start + number * sums.batch, most)] = number
            if not running:
                return
            _progress(sums, options.schedules)
            ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                sums.done.append(running.pop(future))
                sums.join(future.result())
            sums.seconds = before + time.monotonic() - began
            if options.state is not None and time.monotonic() - saved > _SAVE_EVERY:
                saved = time.monotonic()
                sums.save(options.state)


def _prepare(directory: Path) -> None:
    """Begin a worker: signals are the parent's, and collecting garbage happens between batches."""
    global _template, _directory
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _directory = directory / str(os.getpid())
    _template = make_template(_directory / "template")
    gc.collect()
    gc.freeze()
    gc.disable()


def _batch(first: int, number: int) -> Sums:
    assert _template is not None
    assert _directory is not None
    sums = Sums(start=first)
    for seed in range(first, first + number):
        sums.add(run_schedule(seed, _template, _directory / "world"))
    gc.collect()
    return sums


_told: list[float] = [0.0]


def _progress(sums: Sums, wanted: int) -> None:
    terminal = sys.stderr.isatty()
    if time.monotonic() - _told[0] < (0.5 if terminal else 15.0):
        return
    _told[0] = time.monotonic()
    rate = sums.schedules / sums.seconds if sums.seconds else 0.0
    line = f"{sums.schedules}/{wanted} schedules, {rate:.0f} a second, {len(sums.broken)} violations"
    print(f"\r{line}  " if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


def _tell(sums: Sums, *, as_json: bool) -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if as_json:
        print(json.dumps(sums.plain()))
        return
    for one in sums.broken:
        print(f"seed {one.seed}: BROKEN {one.violation}; its last steps:")
        print("\n".join(f"    {step}" for step in one.steps))
        print(f"    replay: python -m tests.simulation --seed {one.seed} --trace")
    print(sums.text())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
