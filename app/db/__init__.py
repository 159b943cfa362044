"""Where everything that must survive is kept: one schema, two databases, the same behaviour.

Owns the engine, the column types, the schema and its migrations, and the epoch that tells other processes that something
changed. Must never know what a connection, a caller or a token is for: rules live above. `engine` is the only file that
knows SQLite from PostgreSQL; everything else writes one SQL for both.

Decision: instants are stored as integers, microseconds since 1970 UTC. One arithmetic and one comparison on both databases
and no time zone anywhere; the price is that a person reading a table needs `to_timestamp(x / 1e6)`.
"""
