"""The served application with what slow clients and a crowded machine need to show themselves.

/big        as many times sixteen bytes as the query says
/echo       how long the body was, once it has been read
/hang       no answer as long as the file SLOW_HOLD/hang is there
            no more open files as long as the file SLOW_HOLD/files is there
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wsgi import application

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["application"]

_hold: Final = Path(os.environ["SLOW_HOLD"])
_usual: Final = application.wsgi_app


def _served(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path not in ("/big", "/echo", "/hang"):
        return _usual(environ, start_response)
    while path == "/hang" and (_hold / "hang").exists():
        time.sleep(0.01)
    if path == "/big":
        body = b"0123456789abcdef" * int(environ["QUERY_STRING"])
    else:
        body = b"%d" % len(environ["wsgi.input"].read())
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def _hoard() -> None:
    while True:
        hoard = []
        while (_hold / "files").exists():
            try:
                hoard.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                (_hold / "full").mkdir(exist_ok=True)  # which takes no file
                time.sleep(0.01)
        for file in hoard:
            os.close(file)
        time.sleep(0.05)


application.wsgi_app = _served  # type: ignore[method-assign]
threading.Thread(target=_hoard, name="hoard", daemon=True).start()
