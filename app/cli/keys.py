"""`keys`: the key encryption keys."""

from __future__ import annotations

import click

from app.cli.opening import services
from app.cli.output import Output, reporting

__all__ = ["keys"]


@click.group()
def keys() -> None:
    """The keys everything is sealed with. To change them: add, rotate, retire; all while it runs."""


@keys.command("list")
@reporting
def list_(out: Output) -> None:
    """List the keys and how many records are sealed under each; never a key itself.

    \b
    Example:
      drawbridge keys list
    """
    with services() as opened:
        rows = [
            {
                "id": row.id,
                "active": row.active,
                "held": row.held,
                "records": row.records,
                "created_at": row.created_at,
                "retired_at": row.retired_at,
            }
            for row in opened.keys.list()
        ]
    columns = {
        "id": "KEY",
        "active": "ACTIVE",
        "held": "IN KEYRING",
        "records": "RECORDS",
        "retired_at": "RETIRED",
    }
    out.table(rows, columns, nothing="No key; run: drawbridge migrate.")


@keys.command()
@reporting
def add(out: Output) -> None:
    """Make one more key known: one the keyring already holds, else a new one in the keyring's file.

    \b
    Example:
      drawbridge keys add
    """
    with services() as opened:
        kek = opened.keys.add()
    out.tell({"id": kek}, f"Added {kek}; seal under it with: drawbridge keys rotate.")


@keys.command()
@click.option("--to", "target", metavar="KEY", help="The key to seal under; default: the newest.")
@reporting
def rotate(out: Output, *, target: str | None) -> None:
    """Seal everything under another key while it runs. Stopped half-way, run it again: it goes on.

    Exit code 1 when records do not open with this keyring; they are named, and the others are done.

    \b
    Example:
      drawbridge keys rotate
    """
    with services() as opened, out.progress("re-sealing") as move:
        done, unopenable = 0, list[str]()
        for step in opened.keys.rotate(target):
            done, unopenable = step.done, list(step.unopenable)
            move(step.done, step.total)
        active = next(row.id for row in opened.keys.list() if row.active)
    data = {"active": active, "resealed": done, "unopenable": unopenable}
    out.tell(data, f"{done} record(s) re-sealed under {active}.")
    if unopenable:
        raise click.ClickException(
            f"{len(unopenable)} record(s) do not open with this keyring and stay under their old key, which must not be "
            f"retired: {', '.join(unopenable)}. Give this host the whole keyring and run it again; else disconnect these "
            "connections, and give these apps their secrets again with: drawbridge app rotate."
        )


@keys.command()
@click.argument("key")
@reporting
def retire(out: Output, key: str) -> None:
    """Give up a key that nothing is sealed under; afterwards it may leave the keyring.

    \b
    Example:
      drawbridge keys retire k1
    """
    with services() as opened:
        opened.keys.retire(key)
    out.tell(
        {"id": key, "retired": True}, f"Retired {key}; take it out of the keyring when all backups are newer."
    )
