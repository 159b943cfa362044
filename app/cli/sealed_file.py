"""The file a connection is handed over in: it has its name only once the connection is marked as moved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from app.errors import DrawbridgeError

__all__ = ["SealedFile", "sealed_file"]

_UNFINISHED: Final = ".partial"


class SealedFile:
    """A file being written beside the name it will have, so that nobody takes it for good too early.

    A process killed half-way leaves it under that name with `.partial` added; it is never overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + _UNFINISHED)
        self.delivered = False
        self.named = False
        self._descriptor = self._create()

    def deliver(self, line: str) -> None:
        """Write the line and return when it survives a loss of power. Raises `click.ClickException`."""
        try:
            with os.fdopen(self._descriptor, "w", closefd=False) as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
            _keep_names(self.path.parent)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.delivered = True

    def give_name(self) -> None:
        """Let it have its name; from now on it is the connection's only copy. Raises `click.ClickException`."""
        try:
            _rename_to_free(self.partial, self.path)
            _keep_names(self.path.parent)
        except OSError as error:
            raise click.ClickException(
                f"The connection was exported and its copy is {self.partial}; it could not be renamed to {self.path}"
                f" ({error.strerror}). Import it from there."
            ) from error
        self.named = True

    def withdraw(self) -> None:
        """Remove it, because the connection stays here. Raises `click.ClickException`."""
        try:
            self.partial.unlink(missing_ok=True)
        except OSError as error:
            raise click.ClickException(
                f"Nothing was exported, and {self.partial} cannot be deleted ({error.strerror}): it must not be used."
            ) from error

    def close(self) -> None:
        """Close it, whatever became of it."""
        os.close(self._descriptor)

    def _create(self) -> int:
        if os.path.lexists(self.path):
            raise click.ClickException(f"{self.path} exists already; nothing was exported.")
        try:
            return os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise click.ClickException(
                f"{self.partial} is left over from an export that did not end; nothing was exported now. {_what_to_do(self)}"
            ) from None
        except OSError as error:
            raise _unwritable(self.path, error) from error


@contextmanager
def sealed_file(path: Path) -> Iterator[SealedFile]:
    """A file to deliver to and then to give its name; removed again where it is certain that nothing was exported.

    Raises `click.ClickException`, before anything else is done, when the file cannot be made there.
    """
    file = SealedFile(path)
    try:
        yield file
    except BaseException as error:
        if not file.named:
            _clear_up(file, error)
        raise
    finally:
        file.close()


def _clear_up(file: SealedFile, error: BaseException) -> None:
    refused = isinstance(error, DrawbridgeError) and not _is_unclear(error)
    if not file.delivered or refused:
        file.withdraw()
    elif not isinstance(error, click.ClickException):  # that one has named the file
        click.echo(f"It is not certain that {file.partial} must not be used. {_what_to_do(file)}", err=True)


def _is_unclear(error: DrawbridgeError) -> bool:
    from app.broker.transfer import ExportUnclear

    return isinstance(error, ExportUnclear)


def _what_to_do(file: SealedFile) -> str:
    return (
        "Look at `drawbridge connection show NAME`: if exported_at says when, this file is the connection's only copy,"
        f" so rename it to {file.path}; if it says nothing, delete the file and export again."
    )


def _rename_to_free(old: Path, new: Path) -> None:
    """Rename, but never over a file that somebody has put there meanwhile."""
    try:
        os.link(old, new)
    except OSError:
        if os.path.lexists(new):
            raise
        old.rename(new)  # a file system without hard links
    else:
        old.unlink()


def _keep_names(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> click.ClickException:
    return click.ClickException(f"{path} cannot be written ({error.strerror}); nothing was exported.")
