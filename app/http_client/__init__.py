"""How requests leave this program: to providers, to the instances they name, and to addresses an operator
gave.

Owns deadlines, TLS, the list of where requests may go, and the one distinction everything above leans on:
whether a request that failed may have been *done* by the other side (`Unfinished`) or certainly was not
(`NotSent`). It must never know what a token is, retry, follow a redirect, or read a proxy from the
environment.

Decision: every request opens its own connection, and name resolution, connecting and TLS are done here,
step by step, under urllib3's HTTP. That buys exact answers to "was it sent?", a total deadline that holds
in every step, and addresses checked before they are used. The price is a TLS handshake for each request.
"""

from __future__ import annotations

from app.http_client.client import (
    Abandoned,
    Answer,
    Deadlines,
    HttpClient,
    NotSent,
    Unfinished,
    WireFault,
)
from app.http_client.destinations import Purpose

__all__ = ["Abandoned", "Answer", "Deadlines", "HttpClient", "NotSent", "Purpose", "Unfinished", "WireFault"]
