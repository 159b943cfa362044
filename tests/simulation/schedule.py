"""Tasks, virtual time, and the primitives of `threading` and `concurrent.futures` as the scheduler grants them.

A task runs until it reaches a *point*; there the seed decides whether it goes on, lets others pass, or is late. When nobody
can run, time jumps to the next moment something is due. A process that is dead gets no further than its next point: `Died`
is raised there and at every later one, so that cleaning up cannot do what a killed process could not have done.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from random import Random
from types import SimpleNamespace
from typing import Any, Final, Protocol

from greenlet import getcurrent, greenlet  # type: ignore[import-untyped,unused-ignore]

from app.errors import DrawbridgeError

__all__ = ["Died", "Owner", "Scheduler", "Signal", "Step", "Task", "threading_for"]

_STEP_SECONDS: Final = 0.0004  # what one step costs on the clock of the world
_LATE: Final = ((0.70, 0.0), (0.97, 0.02), (1.01, 0.6))  # (share of the yielding steps, seconds late at most)
_KEPT_STEPS: Final = 600

Step = tuple[int, float, str, str, str]


class Died(BaseException):
    """The process this code ran in was killed; nothing it does from now on has any effect."""


class Owner(Protocol):
    """Whoever tasks belong to: a process."""

    name: str
    dead: bool
    frozen: bool


class Signal:
    """What tasks wait for; `fire` wakes all of them."""

    __slots__ = ("_scheduler", "waiting")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.waiting: list[Task] = []

    def fire(self) -> None:
        """Let everyone who waits look again."""
        waiting, self.waiting = self.waiting, []
        for task in waiting:
            self._scheduler.make_ready(task)


class Task:
    """One thread of a process, or of the world when `owner` is None."""

    __slots__ = ("facts", "greenlet", "name", "over", "owner", "ready", "ticket")

    def __init__(self, name: str, owner: Owner | None, run: Callable[[], None], hub: greenlet) -> None:
        self.name = name
        self.owner = owner
        self.ready = False
        self.over = False
        self.ticket = 0
        self.facts: dict[str, Any] = {}
        self.greenlet = greenlet(run, parent=hub)


class Scheduler:
    """Decides who moves next; all its choices come from `random`."""

    def __init__(self, seed: int, *, keep_all_steps: bool = False) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.steps = 0
        self.trace: deque[Step] = deque(maxlen=None if keep_all_steps else _KEPT_STEPS)
        self.current: Task | None = None
        self.at_point: Callable[[Task, str], None] | None = None
        self.crashed: Callable[[Task, BaseException], None] | None = None
        self.begins_to_wait: Callable[[Task], None] | None = None  # for a future
        self.ends_waiting: Callable[[Task], None] | None = None
        self.eagerness = self.random.choice((0.3, 0.6, 0.85))
        self._hub = getcurrent()
        self._ready: list[Task] = []
        self._parked: dict[Owner, list[Task]] = {}
        self._timers: list[tuple[float, int, Task | Callable[[], None], int]] = []
        self._tasks: dict[Owner, list[Task]] = {}
        self._condemned: list[Owner] = []
        self._sequence = 0

    # What the code under test runs into

    def point(self, kind: str, detail: str = "") -> None:
        """A boundary: whatever is to happen between two moves of a task happens here."""
        task = self._living()
        self.steps += 1
        self.now += _STEP_SECONDS
        self.note(kind, detail)
        if self.at_point is not None:
            self.at_point(task, kind)
            if task.owner is not None and (task.owner.dead or task.owner.frozen):
                self._give_way(task)
                return
        if self.random.random() < self.eagerness:
            return
        share = self.random.random()
        late = next(seconds for below, seconds in _LATE if share < below)
        if late:
            self.sleep(late * self.random.random())
        else:
            self._give_way(task)

    def note(self, kind: str, detail: str = "") -> None:
        """Put a line into the trace."""
        name = self.current.name if self.current is not None else "world"
        self.trace.append((self.steps, self.now, name, kind, detail))

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass for the running task."""
        task = self._living()
        self._set_timer(self.now + max(seconds, 0.0), task, task.ticket)
        self._park(task)

    def wait(self, signal: Signal, timeout: float | None = None) -> None:
        """Wait until the signal fires or the time is over, whichever comes first; look again yourself."""
        task = self._living()
        if timeout is not None:
            self._set_timer(self.now + max(timeout, 0.0), task, task.ticket)
        signal.waiting.append(task)
        try:
            self._park(task)
        finally:
            if task in signal.waiting:
                signal.waiting.remove(task)

    def _living(self) -> Task:
        task = self.current
        assert task is not None, "only a task may reach a point"
        if task.owner is not None and task.owner.dead:
            raise Died
        return task

    def _give_way(self, task: Task) -> None:
        self.make_ready(task)
        self._park(task)

    def _park(self, task: Task) -> None:
        if task.owner is None or not task.owner.dead:
            self._hub.switch()
        task.ticket += 1
        if task.owner is not None and task.owner.dead:
            raise Died

    # What the world does

    def spawn(self, name: str, owner: Owner | None, run: Callable[[], None]) -> Task:
        """Begin a task; it runs when it is chosen."""

        def guarded() -> None:
            try:
                run()
            except Died:
                pass
            except BaseException as fault:
                if self.crashed is None:
                    raise
                self.crashed(task, fault)
            finally:
                task.over = True
                if owner is not None and task in self._tasks.get(owner, ()):
                    self._tasks[owner].remove(task)

        task = Task(name, owner, guarded, self._hub)
        if owner is not None:
            self._tasks.setdefault(owner, []).append(task)
        self.make_ready(task)
        return task

    def call_at(self, moment: float, action: Callable[[], None]) -> None:
        """Have the world do something at a time; it may not wait."""
        self._set_timer(max(moment, self.now), action, 0)

    def make_ready(self, task: Task) -> None:
        """Let a task be chosen."""
        if not task.ready and not task.over:
            task.ready = True
            self._ready.append(task)

    def condemn(self, owner: Owner) -> None:
        """The owner is dead: its tasks end, before anybody else moves."""
        self._condemned.append(owner)

    def thaw(self, owner: Owner) -> None:
        """The owner is not frozen any more."""
        self._ready += self._parked.pop(owner, [])

    def tasks_of(self, owner: Owner) -> list[Task]:
        """The tasks of this owner that are not over."""
        return self._tasks.get(owner, [])

    def run(self, until: float, *, done: Callable[[], bool] | None = None) -> None:
        """Move on until a time, or until something is so (asked when nobody can run)."""
        assert getcurrent() is self._hub
        while True:
            self._bury()
            self._ring()
            task = self._choose()
            if task is not None:
                self.current = task
                try:
                    task.greenlet.switch()
                finally:
                    self.current = None
                continue
            if self._condemned:
                continue
            if done is not None and done():
                return
            if not self._timers or self._timers[0][0] > until:
                self.now = max(self.now, until)
                return
            self.now = max(self.now, self._timers[0][0])

    def stop(self) -> None:
        """End every task, so that nothing of this run stays in memory."""
        for owner in list(self._tasks):
            owner.dead = True
            self.condemn(owner)
        self._bury()
        self._timers.clear()
        self._ready.clear()
        self._parked.clear()

    def _choose(self) -> Task | None:
        ready = self._ready
        while ready:
            place = int(self.random.random() * len(ready))
            ready[place], ready[-1] = ready[-1], ready[place]
            task = ready.pop()
            if task.over or (task.owner is not None and task.owner.dead):
                continue
            if task.owner is not None and task.owner.frozen:
                self._parked.setdefault(task.owner, []).append(task)
                continue
            task.ready = False
            return task
        return None

    def _ring(self) -> None:
        while self._timers and self._timers[0][0] <= self.now:
            _, _, what, ticket = heapq.heappop(self._timers)
            if isinstance(what, Task):
                if what.ticket == ticket:
                    self.make_ready(what)
            else:
                what()

    def _bury(self) -> None:
        while self._condemned:
            owner = self._condemned.pop()
            self._parked.pop(owner, None)
            for task in self._tasks.pop(owner, []):
                self._end(task)

    def _end(self, task: Task) -> None:
        began, self.current = self.current, task
        try:
            if task.greenlet and not task.greenlet.dead:
                task.greenlet.throw(Died)
        except Died:
            pass
        finally:
            task.over = True
            self.current = began

    def _set_timer(self, moment: float, what: Task | Callable[[], None], ticket: int) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (moment, self._sequence, what, ticket))


class _Lock:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._free = Signal(scheduler)
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._held and not blocking:
            return False
        until = None if timeout < 0 else self._scheduler.now + timeout
        while self._held:
            if until is not None and self._scheduler.now >= until:
                return False
            self._scheduler.wait(self._free, None if until is None else until - self._scheduler.now)
        self._held = True
        return True

    def release(self) -> None:
        if not self._held:
            raise RuntimeError("release unlocked lock")
        self._held = False
        self._free.fire()

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Semaphore:
    def __init__(self, scheduler: Scheduler, value: int = 1) -> None:
        self._free = Signal(scheduler)
        self._scheduler = scheduler
        self._value = value

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        until = None if timeout is None else self._scheduler.now + timeout
        while self._value == 0:
            if not blocking or (until is not None and self._scheduler.now >= until):
                return False
            self._scheduler.wait(self._free, None if until is None else until - self._scheduler.now)
        self._value -= 1
        return True

    def release(self) -> None:
        self._value += 1
        self._free.fire()


class _Event:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._changed = Signal(scheduler)
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._changed.fire()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        until = None if timeout is None else self._scheduler.now + timeout
        while not self._set and (until is None or self._scheduler.now < until):
            self._scheduler.wait(self._changed, None if until is None else until - self._scheduler.now)
        return self._set


class _Future(Future[Any]):
    """A future whose waiting is the scheduler's."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._ended = Signal(scheduler)
        self.add_done_callback(lambda _: self._ended.fire())

    def result(self, timeout: float | None = None) -> Any:
        until = None if timeout is None else self._scheduler.now + timeout
        scheduler, task = self._scheduler, self._scheduler.current
        assert task is not None
        if not self.done():
            task.facts["waits_since"] = scheduler.now
            if scheduler.begins_to_wait is not None:
                scheduler.begins_to_wait(task)
        try:
            while not self.done():
                if until is not None and scheduler.now >= until:
                    raise FutureTimeout
                scheduler.wait(self._ended, None if until is None else until - scheduler.now)
        finally:
            waited = task.facts.pop("waits_since", None)
        if waited is not None and scheduler.ends_waiting is not None:
            scheduler.ends_waiting(task)
        return super().result(0)


class _Pool:
    """A pool of threads of whichever process made it."""

    def __init__(self, scheduler: Scheduler, threads: int, thread_name_prefix: str = "pool") -> None:
        task = scheduler.current
        assert task is not None
        self._scheduler = scheduler
        self._owner = task.owner
        self._name = f"{task.owner.name if task.owner else 'world'}/{thread_name_prefix}"
        self._threads = threads
        self._busy = 0
        self._queue: deque[tuple[_Future, Callable[[], Any]]] = deque()
        self._idle = Signal(scheduler)
        self._closed = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> _Future:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = _Future(self._scheduler)
        self._queue.append((future, lambda: function(*arguments)))
        if self._busy < self._threads:
            self._busy += 1
            self._scheduler.spawn(self._name, self._owner, self._work)
        return future

    def map(self, function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
        futures = [self.submit(function, item) for item in items]
        return iter([future.result() for future in futures])

    def shutdown(self, *, wait: bool = True, cancel_futures: bool = False) -> None:
        self._closed = True
        if cancel_futures:
            while self._queue:
                self._queue.popleft()[0].cancel()
        while wait and self._busy:
            self._scheduler.wait(self._idle)

    def _work(self) -> None:
        try:
            while self._queue:
                future, work = self._queue.popleft()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    result = work()
                except Exception as error:
                    future.set_exception(error)
                    if not isinstance(error, DrawbridgeError):
                        raise  # a mistake, whether or not somebody waits
                else:
                    future.set_result(result)
        finally:
            self._busy -= 1
            self._idle.fire()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def threading_for(scheduler: Scheduler) -> tuple[SimpleNamespace, Callable[..., _Pool]]:
    """What stands in for the module `threading`, and for `ThreadPoolExecutor`."""
    namespace = SimpleNamespace(
        Lock=lambda: _Lock(scheduler),
        BoundedSemaphore=lambda value=1: _Semaphore(scheduler, value),
        Event=lambda: _Event(scheduler),
        CancelledError=CancelledError,
    )

    def pool(threads: int, thread_name_prefix: str = "pool") -> _Pool:
        return _Pool(scheduler, threads, thread_name_prefix)

    return namespace, pool
