"""The processes of the demo: both vendors, and the program under show with a state of its own, all on loopback."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

__all__ = ["HUBSPOT_API", "Stage", "StageError", "on_stage"]

HUBSPOT_API: Final = "2026-09"
_PREFIX: Final = "DRAWBRIDGE_"
_END_SECONDS: Final = 40.0  # a refresh under way is finished first
_COMMAND_SECONDS: Final = 60.0
_HUBSPOT_SCOPES: Final = ("oauth", "crm.objects.contacts.read")
_HUBSPOT_OPTIONAL: Final = ("crm.objects.companies.read", "crm.objects.leads.read")
_SALESFORCE_SCOPES: Final = ("api", "refresh_token", "openid")


class StageError(RuntimeError):
    """A process did not do what it was started for; the message says which and what it said."""


@dataclass(slots=True)
class Stage:
    """What runs: the addresses, and a way to type commands."""

    folder: Path
    broker_url: str
    vendors: Mapping[str, str]
    environment: Mapping[str, str]
    ending: ExitStack

    def command(self, *words: str) -> Any:
        """Run one command of the program and return its JSON."""
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-P", "-m", "app", *words, "--json"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise StageError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def serve(self) -> Any:
        """Start web and worker under their supervisor and return what it says once they answer."""
        log = self.ending.enter_context((self.folder / "log.jsonl").open("w"))
        return json.loads(
            _started(self.ending, ["app", "up", "--json"], environment=self.environment, log=log)
        )

    def last_words(self) -> str:
        """The end of the program's log: what to look at when something failed."""
        file = self.folder / "log.jsonl"
        return "\n".join(file.read_text().splitlines()[-20:]) if file.exists() else ""


@contextmanager
def on_stage(*, life: float) -> Iterator[Stage]:
    """Both vendors running, with access tokens of `life` seconds, and everything that the program needs to start.

    All processes end and all files go at the end, in that order.
    """
    with tempfile.TemporaryDirectory(prefix="drawbridge-demo-") as name, ExitStack() as ending:
        folder = Path(name)
        port = _free_port()
        broker_url = f"http://localhost:{port}"
        client_secrets = {vendor: secrets.token_urlsafe(24) for vendor in ("hubspot", "salesforce")}
        world = folder / "world.json"
        world.write_text(json.dumps(_world(broker_url, client_secrets, life=life)))
        plain = {key: value for key, value in os.environ.items() if not key.startswith(_PREFIX)}
        emulator = ["emulator", "--json", "--config", str(world)]
        vendors = json.loads(_started(ending, emulator, environment=plain, log=None))
        settings = _settings(folder, vendors, client_secrets, broker_url=broker_url, port=port)
        yield Stage(folder, broker_url, vendors, plain | settings, ending)


def _started(
    ending: ExitStack, module: list[str], *, environment: Mapping[str, str], log: IO[str] | None
) -> str:
    """Start a module of this folder that says one line when it is ready; that line."""
    process = subprocess.Popen(  # noqa: S603 - our own modules
        [sys.executable, "-P", "-m", *module],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # Ctrl-C is for the demo, which then ends its processes in order
    )
    ending.callback(_end, process)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise StageError(f"`{' '.join(module[:2])}` ended with {process.wait()} before it was ready")
    return line


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _world(broker_url: str, client_secrets: Mapping[str, str], *, life: float) -> dict[str, Any]:
    """One app and one account at each vendor, in the words of the emulator's configuration."""
    return {
        "hubspot": {
            "settings": {"token_lifetime": life},
            "apps": [
                {
                    "client_id": "demo-hubspot-app",
                    "name": "Drawbridge demo",
                    "secrets": [client_secrets["hubspot"]],
                    "redirect_uris": [f"{broker_url}/connect/hubspot/callback"],
                    "scopes": list(_HUBSPOT_SCOPES),
                    "optional_scopes": list(_HUBSPOT_OPTIONAL),
                }
            ],
            "accounts": [
                {
                    "id": "1111111",
                    "domain": "acme.example",
                    "users": [{"id": "11", "name": "ada@acme.example"}],
                }
            ],
        },
        "salesforce": {
            "apps": [
                {
                    "client_id": "demo-salesforce-app",
                    "name": "Drawbridge demo",
                    "secrets": [client_secrets["salesforce"]],
                    "redirect_uris": [f"{broker_url}/connect/salesforce/callback"],
                    "scopes": list(_SALESFORCE_SCOPES),
                    "rotation": True,
                    "pkce_required": True,
                    "token_lifetime": life,
                }
            ],
            "accounts": [
                {"id": "00Dxx0000001gPF", "domain": "acme.example", "users": [{"name": "ada@acme.example"}]}
            ],
        },
    }


def _settings(
    folder: Path, vendors: Mapping[str, str], client_secrets: Mapping[str, str], *, broker_url: str, port: int
) -> dict[str, str]:
    """The program's settings, which name the emulated vendors where an operator names the real ones."""
    values = {
        "DATABASE_URL": f"sqlite:///{folder / 'drawbridge.db'}",
        "STATE_DIR": str(folder / "state"),
        "PUBLIC_URL": broker_url,
        "BIND": f"127.0.0.1:{port}",
        "ENVIRONMENT": "development",
        "ALLOW_LOOPBACK_PROVIDERS": "true",
        "PROVIDER_TIMEOUT_SECONDS": "5",
        "LEASE_SECONDS": "16",
        "HUBSPOT_CLIENT_ID": "demo-hubspot-app",
        "HUBSPOT_CLIENT_SECRET": client_secrets["hubspot"],
        "HUBSPOT_API_URL": vendors["hubspot"],
        "HUBSPOT_AUTHORIZE_URL": f"{vendors['hubspot']}/oauth/authorize",
        "HUBSPOT_SCOPES": " ".join(_HUBSPOT_SCOPES),
        "HUBSPOT_OPTIONAL_SCOPES": " ".join(_HUBSPOT_OPTIONAL),
        "SALESFORCE_CLIENT_ID": "demo-salesforce-app",
        "SALESFORCE_CLIENT_SECRET": client_secrets["salesforce"],
        "SALESFORCE_LOGIN_URL": vendors["salesforce"],
        "SALESFORCE_SCOPES": " ".join(_SALESFORCE_SCOPES),
    }
    return {f"{_PREFIX}{name}": value for name, value in values.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
