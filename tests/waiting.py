"""Waiting for what must happen, without saying when."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["PATIENCE", "until"]

PATIENCE = 60.0  # seconds until something that must happen counts as not happening; machines may be slow


def until(happened: Callable[[], bool]) -> None:
    """Return as soon as something has happened."""
    give_up = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.01)
