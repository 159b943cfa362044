"""`python -m emulator.demo`: the whole main job before your eyes, with both vendors emulated.

Everything is done as an operator, an admin's browser and a caller would do it: commands, pages, HTTP. The product is
started as a process and known by its address alone. Each step is printed after it has really happened; one that does not
happen ends the tour with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import requests

from emulator.control import Control
from emulator.demo_browser import Browser, BrowserError
from emulator.demo_stage import HUBSPOT_API, Stage, StageError, on_stage

__all__ = ["main"]

LIFE: Final = 15.0
"""Seconds an access token lives here: short enough to see one expire, long enough for the steps before it."""

_TIMEOUT: Final = 20.0
_PATIENCE: Final = 45.0  # seconds until something that should happen by itself counts as not happening
_POLL: Final = 0.1
_HUBSPOT, _SALESFORCE = "acme-hubspot", "acme-salesforce"


class DemoError(RuntimeError):
    """A step did not come out as it must; the message says how."""


@dataclass(slots=True)
class Caller:
    """Somebody who asks for tokens, with one request per token and Basic or Bearer in front."""

    broker_url: str
    client_id: str
    client_secret: str
    session: requests.Session

    def ask(self, name: str, *, bearer: str | None = None, **query: str) -> requests.Response:
        """Ask for a token by Basic, or by a Bearer token of the broker's own."""
        url = f"{self.broker_url}/v1/connections/{name}/token"
        if bearer is not None:
            headers = {"Authorization": f"Bearer {bearer}"}
            return self.session.get(url, params=query, headers=headers, timeout=_TIMEOUT)
        return self.session.get(
            url, params=query, auth=(self.client_id, self.client_secret), timeout=_TIMEOUT
        )

    def token(self, name: str, **how: Any) -> dict[str, Any]:
        """The answer of a hand-out that succeeds."""
        answer = self.ask(name, **how)
        _insist(answer.status_code == 200, f"asking for {name} answered {answer.status_code}: {answer.text}")
        return dict(answer.json())

    def bearer(self) -> str:
        """An access token of the broker's own, by client credentials (RFC 6749 §4.4)."""
        form = {"grant_type": "client_credentials"}
        basic = (self.client_id, self.client_secret)
        answer = self.session.post(f"{self.broker_url}/oauth/token", data=form, auth=basic, timeout=_TIMEOUT)
        _insist(answer.status_code == 200, f"/oauth/token answered {answer.status_code}: {answer.text}")
        return str(answer.json()["access_token"])


class Watcher:
    """Asks for a token ten times a second without ever waiting for a refresh, and tries each token at HubSpot."""

    def __init__(self, caller: Caller, api: Callable[[str], int]) -> None:
        self._caller = caller
        self._api = api
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self.asked = 0
        self.slowest = 0.0
        self.generations: set[int] = set()
        self.failures: list[str] = []

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End and wait for the last request."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL):
            try:
                self._once()
            except (requests.RequestException, ValueError) as error:
                self.failures.append(type(error).__name__)

    def _once(self) -> None:
        began = time.monotonic()
        # max_wait=0: the broker must have a living token or say that it has none.
        answer = self._caller.ask(_HUBSPOT, max_wait="0", min_ttl="1")
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.asked += 1
        if answer.status_code != 200:
            self.failures.append(f"{answer.status_code} {answer.json().get('code')}")
            return
        self.generations.add(answer.json()["generation"])
        status = self._api(answer.json()["access_token"])
        if status != 200:
            self.failures.append(f"HubSpot answered {status} to a token just handed out")


class Tour:
    """The steps in order; `told` collects what was printed, for `--json`."""

    def __init__(self, stage: Stage, *, quiet: bool) -> None:
        self._stage = stage
        self._quiet = quiet
        self._control = Control(stage.vendors["control"])
        self._browser = Browser()
        self._began = time.monotonic()
        self.told: list[dict[str, Any]] = []

    def walk(self) -> None:
        """Take every step; raises DemoError and its kin at the first that fails."""
        self._start()
        self._sign_in()
        self._connect("hubspot", _HUBSPOT)
        self._connect("salesforce", _SALESFORCE)
        apex, workflow = self._make_callers()
        first = self._fetch(apex, workflow)
        self._use(first)
        watcher = Watcher(apex, self._call_hubspot)
        watcher.start()
        try:
            self._cross_expiry(first[_HUBSPOT], watcher)
            self._cut_off(watcher)
        finally:
            watcher.stop()
        self._take_away(workflow)
        self._verify()

    def login_url(self) -> str:
        """A fresh one-time login for the console."""
        return str(self._stage.command("admin", "login-link")["url"])

    # The steps

    def _start(self) -> None:
        vendors = self._stage.vendors
        self._tell(
            "HubSpot and Salesforce are emulated on loopback", vendors["hubspot"], vendors["salesforce"]
        )
        self._stage.command("migrate")
        self._tell("The database is there: SQLite in a temporary folder", str(self._stage.folder))
        up = self._stage.serve()
        self._tell("Web and worker run", up["url"])

    def _sign_in(self) -> None:
        self._browser.go(self.login_url())
        self._browser.submit("/admin/login")
        self._tell("An admin signed in with a one-time link", *self._browser.visited)

    def _connect(self, provider: str, name: str) -> None:
        self._browser.go(f"{self._stage.broker_url}/connect/{provider}?name={name}")
        self._browser.submit(f"/connect/{provider}")
        passed = self._browser.visited
        self._browser.submit("", decision="approve")
        _insist(name in self._browser.page, f"the page after connecting does not name {name}")
        self._tell(f"{provider} is connected through its own consent page", *passed, *self._browser.visited)

    def _make_callers(self) -> tuple[Caller, Caller]:
        wanted = (("apex", "acme-*"), ("workflow", _SALESFORCE))
        with ThreadPoolExecutor(len(wanted)) as pool:
            apex, workflow = pool.map(lambda one: self._make_caller(*one), wanted)
        self._tell(
            "Two callers were made",
            "apex may have tokens of acme-*",
            f"workflow may have those of {_SALESFORCE}",
        )
        return apex, workflow

    def _make_caller(self, name: str, pattern: str) -> Caller:
        added = self._stage.command("caller", "add", name, "--allow", f"token:issue@{pattern}")
        session = requests.Session()
        session.trust_env = False  # a proxy of the machine's owner knows nothing of this loopback
        return Caller(self._stage.broker_url, added["client_id"], added["client_secret"], session)

    def _fetch(self, apex: Caller, workflow: Caller) -> dict[str, dict[str, Any]]:
        by_basic = apex.token(_HUBSPOT)
        by_bearer = apex.token(_SALESFORCE, bearer=apex.bearer())
        refused = workflow.ask(_HUBSPOT)
        _insist(
            refused.status_code == 403, f"workflow got {refused.status_code} for {_HUBSPOT} instead of 403"
        )
        self._tell(
            "Tokens were fetched",
            f"apex by Basic: {_HUBSPOT}, generation {by_basic['generation']}, {by_basic['expires_in']} s left",
            f"apex by Bearer from /oauth/token: {_SALESFORCE}, {by_bearer['expires_in']} s left",
            f"workflow asked for {_HUBSPOT} and was refused: 403",
        )
        return {_HUBSPOT: by_basic, _SALESFORCE: by_bearer}

    def _use(self, tokens: dict[str, dict[str, Any]]) -> None:
        status = self._call_hubspot(tokens[_HUBSPOT]["access_token"])
        _insist(status == 200, f"HubSpot's API answered {status} to the token")
        found = self._query_salesforce(tokens[_SALESFORCE])
        self._tell(
            "Both APIs accept the tokens", "HubSpot: account details", f"Salesforce: {found} accounts by SOQL"
        )

    def _cross_expiry(self, first: dict[str, Any], watcher: Watcher) -> None:
        _until(lambda: self._call_hubspot(first["access_token"]) == 401, "the first token to expire")
        self._insist_unbroken(watcher)
        _insist(len(watcher.generations) > 1, "no newer token was handed out before the first one expired")
        self._tell(
            "A token expired and nobody noticed",
            f"the first one is dead: 401; the worker had replaced it (generations {_range(watcher.generations)})",
            f"{watcher.asked} hand-outs meanwhile, none waited for a refresh; slowest {watcher.slowest * 1000:.0f} ms",
        )

    def _cut_off(self, watcher: Watcher) -> None:
        hubspot = self._control.hubspot
        seen = len(hubspot.requests())
        asked, generation = watcher.asked, max(watcher.generations)
        fault = hubspot.misbehave("status", status=503)
        _until(
            lambda: any(one.status == 503 for one in hubspot.requests()[seen:]), "a refresh during the outage"
        )
        time.sleep(1.0)
        during = watcher.asked - asked
        self._insist_unbroken(watcher)
        hubspot.behave(fault)
        _until(lambda: max(watcher.generations) > generation, "the refresh after the outage")
        self._insist_unbroken(watcher)
        self._tell(
            "HubSpot answered 503 to every refresh, and hand-outs went on",
            f"{during} hand-outs of the living token during the outage, each accepted by the API",
            "afterwards it was refreshed by itself",
        )

    def _take_away(self, workflow: Caller) -> None:
        workflow.token(_SALESFORCE)
        self._stage.command("caller", "deny", "workflow", f"token:issue@{_SALESFORCE}")
        began = time.monotonic()
        _until(lambda: workflow.ask(_SALESFORCE).status_code == 403, "the permission to be gone")
        seconds = time.monotonic() - began
        _insist(seconds < 1.0, f"the permission worked for {seconds:.2f} s after it was taken away")
        self._tell(
            "A permission was taken away", f"403 from every process {seconds * 1000:.0f} ms after the command"
        )

    def _verify(self) -> None:
        verdict = self._stage.command("audit", "verify")
        _insist(verdict["sound"], "the audit trail is broken")
        self._tell("The audit trail is sound", f"{verdict['rows']} rows by {verdict['writers']} writers")

    # Underneath

    def _call_hubspot(self, token: str) -> int:
        url = f"{self._stage.vendors['hubspot']}/account-info/{HUBSPOT_API}/details"
        return requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=_TIMEOUT).status_code

    def _query_salesforce(self, token: dict[str, Any]) -> int:
        answer = requests.get(
            f"{token['instance_url']}/services/data/v67.0/query",
            params={"q": "SELECT Id, Name FROM Account"},
            headers={"Authorization": f"Bearer {token['access_token']}"},
            timeout=_TIMEOUT,
        )
        _insist(answer.status_code == 200, f"Salesforce's API answered {answer.status_code}: {answer.text}")
        return int(answer.json()["totalSize"])

    def _insist_unbroken(self, watcher: Watcher) -> None:
        _insist(not watcher.failures, f"a hand-out failed: {', '.join(watcher.failures[:3])}")

    def _tell(self, what: str, *details: str) -> None:
        seconds = round(time.monotonic() - self._began, 1)
        self.told.append({"step": what, "at_seconds": seconds, "details": list(details)})
        out = sys.stderr if self._quiet else sys.stdout
        print(
            f"{len(self.told):2}. {what}  ({seconds} s)",
            *(f"      {line}" for line in details),
            sep="\n",
            file=out,
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    """Walk the tour; 0 when every step came out right, 1 when one did not."""
    options = _parser().parse_args(arguments)
    _hear(_interrupted)
    with on_stage(life=LIFE) as stage:
        tour = Tour(stage, quiet=options.json)
        try:
            tour.walk()
            url = tour.login_url()
        except (DemoError, BrowserError, StageError, requests.RequestException, OSError) as error:
            print(f"demo: {error}", stage.last_words(), sep="\n", file=sys.stderr)
            return 1
        if options.json:
            print(
                json.dumps({"ok": True, "url": stage.broker_url, "login_url": url, "steps": tour.told}),
                flush=True,
            )
        else:
            print(f"\nThe console, signed in by this one-time link:\n  {url}", flush=True)
        if not options.exit:
            _stay(tour)
    return 0


def _stay(tour: Tour) -> None:
    """Stay up until somebody ends it, which is no failure; on a terminal, Enter makes another login link."""
    _hear(_left)
    if not sys.stdin.isatty():
        signal.pause()
    print("Press Enter for another login link, Ctrl-C to end.", flush=True)
    while True:
        select.select([sys.stdin], [], [])
        if not sys.stdin.readline():
            signal.pause()
        print(f"  {tour.login_url()}", flush=True)


def _interrupted(number: int, _: object) -> NoReturn:
    _hear(signal.SIG_IGN)  # asked once is enough; the processes are being ended
    raise SystemExit(128 + number)


def _left(*_: object) -> NoReturn:
    _hear(signal.SIG_IGN)
    raise SystemExit(0)


def _hear(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _until(happened: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + _PATIENCE
    while not happened():
        if time.monotonic() > give_up:
            raise DemoError(f"waited {_PATIENCE:.0f} s in vain for {what}")
        time.sleep(_POLL / 2)


def _insist(true: bool, otherwise: str) -> None:
    if not true:
        raise DemoError(otherwise)


def _range(numbers: set[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m emulator.demo", description="A tour with both vendors emulated."
    )
    parser.add_argument("--exit", action="store_true", help="end after the tour")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end of the tour")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
