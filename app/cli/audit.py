"""`audit`: the trail of who did what."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from app.cli.opening import services
from app.cli.output import Output, reporting

if TYPE_CHECKING:
    from app.access.chain import Head

__all__ = ["audit"]


@click.group()
def audit() -> None:
    """The trail: every hand-out, denial and change."""


@audit.command()
@click.option(
    "--head", "heads", multiple=True, metavar="WRITER:N:MAC", help="A head from the log; may be repeated."
)
@reporting
def verify(out: Output, *, heads: Sequence[str]) -> None:
    """Check that no row was edited, removed or moved; with heads from the log also that none was cut off.

    \b
    Example:
      drawbridge audit verify --head 5f0c…:1207:9a31c4d07be2f581
    """
    given = [_head(text) for text in heads]
    with services() as opened:
        verdict = opened.trail.verify(given)
    bad = verdict.bad
    data = {
        "sound": verdict.sound,
        "rows": verdict.rows,
        "writers": verdict.writers,
        "bad": None if bad is None else {"writer": bad.writer, "n": bad.n, "why": bad.why},
    }
    if bad is None:
        out.tell(data, f"Sound: {verdict.rows} row(s) of {verdict.writers} writer(s).")
        return
    if out.as_json:
        out.tell(data)
    raise click.ClickException(f"The trail is broken at row {bad.n} of writer {bad.writer}: {bad.why}")


@audit.command()
@click.option(
    "--since", type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]), help="Only rows from then on (UTC)."
)
@reporting
def export(out: Output, *, since: datetime | None) -> None:
    """Print every row as one line of JSON, by writer and number, with or without --json.

    \b
    Example:
      drawbridge audit export --since 2026-01-01 > audit.jsonl
    """
    with services() as opened:
        for line in opened.trail.export(since=None if since is None else since.replace(tzinfo=UTC)):
            click.echo(line)


def _head(text: str) -> Head:
    from app.access.chain import Head

    writer, _, rest = text.partition(":")
    n, _, mac = rest.partition(":")
    if not (writer and n.isascii() and n.isdigit() and len(mac) >= 16):
        raise click.UsageError("--head takes WRITER:N:MAC, with at least 16 hex digits of the MAC.")
    return Head(writer, int(n), mac)
