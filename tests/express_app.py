"""The served application with a mark on what its express lane answered, and with faults to be had by `min_ttl`.

7.5     finishing fails
8.5     an answer is missing
9.5     finishing takes as long as the file EXPRESS_HOLD is there; meanwhile there is a second one, named `.held` after it
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from app.broker.issue import Ready
from app.web.tokens import EXPRESS, Express
from wsgi import application

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["application"]

_express: Final[Express] = application.extensions[EXPRESS]
_finish: Final = _express.finish
_hold: Final = Path(os.environ["EXPRESS_HOLD"])
_held: Final = _hold.with_suffix(".held")


def _marked(those: Sequence[tuple[WSGIEnvironment, Ready]]) -> list[tuple[bytes, bytes] | None]:
    queries = {environ["QUERY_STRING"] for environ, _ in those}
    if "min_ttl=7.5" in queries:
        raise RuntimeError("on purpose")
    if "min_ttl=9.5" in queries:
        _wait()
    mark = f"X-Together: {len(those)} {threading.current_thread().name}\r\n".encode()
    answers = [None if one is None else (one[0] + mark, one[1]) for one in _finish(those)]
    return answers[1:] if "min_ttl=8.5" in queries else answers


def _wait() -> None:
    try:
        while _hold.exists():
            _held.touch()
            time.sleep(0.01)
    finally:
        _held.unlink(missing_ok=True)


_express.finish = _marked  # type: ignore[method-assign]
