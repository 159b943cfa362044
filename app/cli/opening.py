"""From the command line to the services: the settings of this machine, opened for one command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from app.bootstrap import Services
    from app.settings import Settings

__all__ = ["ACTOR", "ROOT", "read_settings", "services"]

ACTOR: Final = "admin:cli"
ROOT: Final = Path(__file__).resolve().parents[2]


def read_settings() -> Settings:
    """The settings of this process: environment over `config/settings.toml`. Raises `ConfigurationFault`."""
    from app.settings import load

    file = ROOT / "config" / "settings.toml"
    return load(os.environ, config_file=file if file.exists() else None)


@contextmanager
def services() -> Iterator[Services]:
    """Everything a command needs, closed again at its end. Raises `StartRefused` and its kin, `DatabaseUnavailable`.

    The log is kept quiet: a person is told in one sentence, and what was changed is in the audit trail.
    """
    from app.bootstrap import bootstrap
    from app.telemetry import configure

    settings = read_settings()
    configure("CRITICAL")
    opened = bootstrap(settings, kind="command")
    try:
        opened.apps.sync_environment()
        yield opened
    finally:
        opened.close()
