"""The broker under a scheduler that owns every choice: one number decides all that happens, and replays it.

Several simulated hosts run the real broker code against one real SQLite file and a simulated provider. Whenever that code
reaches the outside (a statement, a commit, a request, the journal, a lock, a wait) it stops and the scheduler decides who
goes on, what breaks, and what time it is. After each step that matters the promises are checked against what the
simulation knows and the broker cannot: which refresh token the provider holds valid, and where each process stood.

    schedule    tasks, virtual time, locks, events, futures and pools of threads that obey the scheduler
    provider    token endpoints that rotate strictly, do not rotate, or mint; they process late, lose answers, lie
    database    the real `Database` over real SQLite, stopping at each statement
    host        machines, and the starts of the broker on them
    disk        their disks and file locks
    world       callers, admins, the operator, and the faults that befall all of them
    checks      the promises

    python -m tests.simulation --seed 12345 --trace

Decision: tasks are greenlets in one thread, so a step costs a microsecond and a run is the same byte for byte wherever it
is repeated; the price is that nothing here shows what two CPUs do at the same moment inside one Python function.
"""
