"""Keeps what may not be read at rest: seals single records and proves that they belong where they lie.

Owns the key encryption keys, the sealed format and the sealing of an export to somebody else's key. Must
never know what a record means, where it is stored or how to reach a database or a network; it is given bytes
and a `Place`.

Decision: every record has a data key of its own, wrapped by a KEK. A rotation re-wraps 32 bytes a row and
touches no token, and destroying the wrapped key destroys the record; the price is 60 bytes and one more AES
call per record.
"""
