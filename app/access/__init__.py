"""Who may ask, what each may have, and the record of every answer.

Owns callers and their credentials, permissions, the audit trail and the authorization server that gives
callers short tokens of ours. A caller is known before anything else happens, one call decides and records,
and nothing leaves that is not on record: `broker`, `sync` and `web` all come in through `Access.require`
and `Access.record`.

Must never know: providers and their tokens, connections (a target is only a name here), Flask, request
objects.

    credentials   what an Authorization header says, before anybody believes it
    callers       the register: add, allow, rotate, disable, …
    authentication  the hot path: header in, verified `Caller` out
    keysets       public keys of callers that sign instead of sharing a secret
    signing       our own keys and the RFC 9068 tokens made with them
    authorization_server  POST /oauth/token
    policy        `Access`: decides and records
    chain, ledger, spool, audit, inspection
                  the trail: its bytes, SQL, refuge when the database is away, writer and proof

One decision and its price: a verified credential and a decision once made are believed until the epoch
"access" moves, so the hot path costs two dictionary look-ups instead of three queries. The price is that a
removed permission may be honoured for as long as an epoch may be old (under one second), and that whoever
changes these tables must bump the epoch in the same transaction; that is why only this package writes them.
"""
