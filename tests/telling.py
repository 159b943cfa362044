"""What the program told while something was done: its own events from the log, and how far its numbers moved."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from app.telemetry import Event, configure, metrics

__all__ = ["Heard", "counted", "listening"]


class Heard:
    """The log, as far as it was written."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        """All of it."""
        return self.stream.getvalue()

    def of(self, event: Event) -> list[dict[str, Any]]:
        """The fields of each line of this event, without its time, level and name."""
        lines = [json.loads(line) for line in self.text.splitlines()]
        mine = [line for line in lines if line["event"] == event.value]
        assert not any("fields_left_out" in line for line in mine)
        return [
            {key: value for key, value in line.items() if key not in ("time", "level", "event")}
            for line in mine
        ]


@contextmanager
def listening(level: str = "INFO") -> Iterator[Heard]:
    """Hear what is logged from now on; the log is put back at the end of the test."""
    heard = Heard()
    configure(level, stream=heard.stream)
    yield heard


def counted(name: str, **labels: str) -> float:
    """The value of a sample (`hand_outs_total`, `job_seconds_count`) as /metrics shows it; 0 before its first use."""
    for family in text_string_to_metric_families(metrics.expose().decode()):
        for sample in family.samples:
            if sample.name == f"drawbridge_{name}" and sample.labels == labels:
                return float(sample.value)
    return 0.0
