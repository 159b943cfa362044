"""Column types and the one SQL function that both databases must mean alike."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import BigInteger, Dialect, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import expression
from sqlalchemy.types import TypeDecorator

__all__ = ["Instant", "Json", "db_now"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime, stored as microseconds since 1970; a naive one is refused.

    An integer of microseconds may be added to or compared with the column in SQL.
    """

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> int | None:
        if value is None or isinstance(value, int):
            return value
        if value.tzinfo is None:
            raise ValueError("a naive datetime says nothing about when")
        return int((value - _EPOCH) // _MICROSECOND)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else _EPOCH + timedelta(microseconds=value)

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        return BigInteger() if isinstance(value, int) else self


class Json(TypeDecorator[Any]):
    """A JSON value stored as text, so that both databases return exactly what was put in."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"), sort_keys=True)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class db_now(expression.FunctionElement[int]):  # noqa: N801 - reads like the SQL function it is
    """The database's clock in microseconds since 1970; on SQLite the engine registers it, fed by our `Clock`."""

    type = BigInteger()
    inherit_cache = True


@compiles(db_now, "postgresql")
def _postgresql_now(element: Any, compiler: Any, **_: Any) -> str:
    return "(extract(epoch from clock_timestamp()) * 1000000)::bigint"


@compiles(db_now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **_: Any) -> str:
    return "drawbridge_now()"
