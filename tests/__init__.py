"""The tests of Drawbridge: each states a behaviour, on real databases and real HTTP over loopback.

`run.py` is what `./drawbridge test` runs, `postgres.py` brings a PostgreSQL server of its own, `loopback.py`
keeps every socket on this machine. None of them knows the product, so that the benches use them too.
"""
