"""The served application with a count of what its express lane answered, in an answer's header, for tests that serve it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from app.broker.issue import Ready
from app.web.tokens import EXPRESS, Express
from wsgi import application

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["application"]

_express: Final[Express] = application.extensions[EXPRESS]
_finish: Final = _express.finish


def _marked(those: Sequence[tuple[WSGIEnvironment, Ready]]) -> list[tuple[bytes, bytes] | None]:
    mark = f"X-Together: {len(those)} {threading.current_thread().name}\r\n".encode()
    return [None if one is None else (one[0] + mark, one[1]) for one in _finish(those)]


_express.finish = _marked  # type: ignore[method-assign]
