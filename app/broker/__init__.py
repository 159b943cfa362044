"""The heart: connections, the tokens they hold, and the one way to refresh, hand out and take away.

Owns the states of a connection (`connection`, pure), the rows and their sealed tokens (`store`), the refresh protocol
(`refresh`, `journal`), installing (`connect`), handing out (`issue`), taking away (`revoke`), moving (`transfer`), keys
(`rekey`) and what people must know (`doctor`, `findings`, `notices`). Must never know HTTP, Flask or a terminal, nor what
a vendor calls things: vendors are files under `providers`.

What is promised of refresh tokens: one is presented by one holder at a time, and never again once a newer one is stored; an
answer with a new one is on the disk before it is committed; an attempt whose end is unknown is never overtaken while the
access token lives.

What is not: a process frozen between its last look at the clock and the write of the request, or while it waits for the
answer, for longer than the access token lives may spend a token twice. An answer that nobody reads, or that is read by a
process killed before the journal's fsync, is lost; that is found out and named (`lost_answer`), and costs the connection
only when the provider rotates. `tests/simulation` and `tests/chaos` hold the one and measure the other.

Decision: every write to a connection is a compare-and-set on its `generation`. No transaction and no database lock is held
while a provider is asked, so the broker runs behind any pooler; the price is that each writer must say what it does when it
comes too late, and that each of those cases has a test.
"""
