"""What the program says about itself: log lines and numbers, and the rule that nothing else gets out.

Owns the register of events, the redaction every line passes through, the one log stream and the metrics.
Everybody may use it. It must never know what a token or a connection is for, and nothing may depend on a
line having been written: logging never raises, and a lost line is counted, not repaired.

Decision: fields are let out by a register, not kept in by a blacklist; patterns are the second fence, for
the words of libraries. The price is that a new field needs a line in `events.py` before anybody can see it.
"""

from __future__ import annotations

from app.telemetry.events import REGISTER, Event, Spec
from app.telemetry.logs import configure, log
from app.telemetry.redaction import scrub

__all__ = ["REGISTER", "Event", "Spec", "configure", "log", "scrub"]
