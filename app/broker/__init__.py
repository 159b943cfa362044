"""The heart: connections, the tokens they hold, and the one way to refresh, hand out and take away.

Owns the states of a connection (`connection`, pure), the rows and their sealed tokens (`store`), the refresh protocol
(`refresh`, `journal`), installing (`connect`), handing out (`issue`), taking away (`revoke`), moving (`transfer`), keys
(`rekey`) and what people must know (`doctor`, `findings`, `notices`). Must never know HTTP, Flask or a terminal, nor what
a vendor calls things: vendors are files under `providers`.

Decision: every write to a connection is a compare-and-set on its `generation`. No transaction and no database lock is held
while a provider is asked, so the broker runs behind any pooler; the price is that each writer must say what it does when it
comes too late, and that each of those cases has a test.
"""
