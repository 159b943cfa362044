"""How secrets come in: from a file, standard input, or a prompt that shows nothing. Never as arguments."""

from __future__ import annotations

import sys
from typing import IO, Final

import click

from app.secret import Secret

__all__ = ["read_bytes", "read_secret", "read_secrets"]

_LARGEST: Final = 65_536


def read_bytes(file: IO[bytes]) -> bytes:
    """The content of a key file; refuses one that is too large to be one."""
    content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise click.UsageError(f"{file.name} is larger than {_LARGEST} bytes; that is no key.")
    return content


def read_secret(file: IO[bytes]) -> Secret:
    """The text of a file as one secret."""
    try:
        return Secret(read_bytes(file).decode())
    except UnicodeDecodeError:
        raise click.UsageError(f"{file.name} is not text.") from None


def read_secrets(file: IO[bytes] | None, *, what: str) -> tuple[Secret, ...]:
    """Secrets, newest first: one a line or a comma list, from the file, else standard input, else asked for."""
    if file is not None:
        text = read_secret(file).reveal()
    elif sys.stdin.isatty():
        text = click.prompt(what, hide_input=True, err=True, default="", show_default=False)
    else:
        text = sys.stdin.read(_LARGEST)
    found = tuple(Secret(part.strip()) for part in text.replace(",", "\n").splitlines() if part.strip())
    if not found:
        raise click.UsageError(f"No {what.lower()} was given.")
    return found
