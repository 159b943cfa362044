"""`python -m emulator` runs the emulator; the first line on stdout is JSON with the three addresses."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from emulator.model import SetUpError
from emulator.process import running
from emulator.world import DEMO


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 then, 2 when the configuration cannot be used."""
    options = _parser().parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        config = _config(options.config)
        return _serve(options, config=config, stop=stop)
    except (SetUpError, OSError, ValueError) as error:
        print(f"emulator: {error}", file=sys.stderr)
        return 2


def _serve(options: argparse.Namespace, *, config: dict[str, Any], stop: threading.Event) -> int:
    with running(
        host=options.host,
        hubspot_port=options.hubspot_port,
        salesforce_port=options.salesforce_port,
        control_port=options.control_port,
        seed=options.seed,
        config=config,
    ) as emulator:
        print(json.dumps(emulator.addresses()), flush=True)
        if not options.json:
            print(_welcome(config), flush=True)
        stop.wait()
    return 0


def _config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return DEMO
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise SetUpError(f"{path} holds no JSON object")
    return config


def _welcome(config: dict[str, Any]) -> str:
    lines = ["Emulated vendors, for loopback only. Apps:"]
    for vendor, part in config.items():
        lines += [
            f"  {vendor}: {app['client_id']}, redirect {app.get('redirect_uris')}"
            for app in part.get("apps", [])
        ]
    return "\n".join([*lines, "Stop with Ctrl-C."])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m emulator", description="HubSpot and Salesforce on loopback."
    )
    parser.add_argument("--host", default="127.0.0.1")
    for name in ("hubspot", "salesforce", "control"):
        parser.add_argument(f"--{name}-port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--seed", type=int, help="make ids and tokens repeatable")
    parser.add_argument(
        "--config", type=Path, help="JSON with settings, apps, accounts and faults per vendor"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the line of addresses")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
