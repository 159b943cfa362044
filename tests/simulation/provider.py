"""Token endpoints that behave as badly as real ones, and know the truth.

A *family* is one consent: its refresh token and every access token that came of it. A rotating family replaces the refresh
token at each refresh and is revoked as a whole when a replaced one is presented, as Salesforce does. A request is carried
out when it arrives, whether or not whoever sent it still waits or lives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from app.http_client import Abandoned, Answer, Deadlines, NotSent, Unfinished
from app.providers.salesforce import full_id
from app.secret import Secret
from tests.simulation.schedule import Signal, Task

if TYPE_CHECKING:
    from tests.simulation.host import Process
    from tests.simulation.world import World

__all__ = ["FATES", "Account", "Exchange", "Family", "Network", "SimulatedProvider", "Weather"]

# What may become of a request: (carried out, how it ends for whoever asked).
FATES: Final[Mapping[str, tuple[bool, str]]] = {
    "good": (True, "answer"),
    "slow_work": (True, "answer"),  # carried out late
    "slow_answer": (True, "answer"),  # answered late
    "unreachable": (False, "not_sent"),
    "reset_before": (False, "reset"),
    "reset_after": (True, "reset"),
    "lost": (True, "silence"),
    "dropped": (False, "silence"),
    "limited": (False, "429"),
    "unavailable": (False, "503"),
    "failed_before": (False, "500"),
    "failed_after": (True, "500"),
    "gateway_after": (True, "504"),
    "page_before": (False, "page"),
    "page_after": (True, "page"),
    "broken_after": (True, "broken"),
    "client_refused": (False, "client"),
    "busy": (False, "busy"),
    "refused_once": (False, "refused"),
}
_TOKENS_ONLY: Final = frozenset({"busy", "refused_once", "client_refused"})


@dataclass
class Account:
    """One account at a provider, and how its tokens behave."""

    provider: str
    name: str
    number: int
    rotating: bool
    minted: bool = False
    families: list[Family] = field(default_factory=list)

    @property
    def org(self) -> str:
        """The id of the org, or of the portal."""
        if self.provider == "hubspot":
            return str(1000 + self.number)
        return full_id(f"00D0000000000{self.number:02d}") or ""

    @property
    def user(self) -> str:
        """The id of the user; empty where the portal alone is the account."""
        return "" if self.provider == "hubspot" else full_id(f"0050000000000{self.number:02d}") or ""


@dataclass
class Family:
    """One consent and what came of it."""

    number: int
    account: Account
    count: int = 0
    alive: bool = True
    died_of: str = ""
    current: str = ""  # the refresh token that is good now
    refresh_tokens: set[str] = field(default_factory=set)
    access: dict[str, float] = field(default_factory=dict)  # when each dies


@dataclass
class Weather:
    """How badly the provider behaves: a share of the requests meets one of `kinds`; in a spell, all meet its kind."""

    share: float = 0.0
    kinds: tuple[str, ...] = ()
    spells: list[tuple[float, float, str]] = field(default_factory=list)
    latest: float = 8.0  # seconds a slow one may take


@dataclass(eq=False)
class Exchange:
    """One request on its way, and what the world knows of it."""

    number: int
    process: Process
    task: Task
    what: str  # refresh, code, mint, introspect, revoke, delete
    form: dict[str, str]
    fate: str
    family: Family | None = None
    token: str = ""
    began_at: float = 0.0
    looked_at: float = 0.0  # when it began its last checks
    checked_at: float = 0.0
    generation: int = -1  # the row's then, for a refresh
    access_then: str = ""  # the access token that was stored when it looked at the clock last
    written_at: float | None = None
    worked_at: float | None = None
    ended_at: float | None = None  # for whoever asked: answered, given up, or dead
    reply: tuple[int, dict[str, str], bytes] | None = None
    replied_at: float | None = None
    broken_off: bool = False
    disturbances: int = 0  # of its process when it began
    issued: str = ""  # the refresh token the answer carries
    arrived: Signal | None = None


class SimulatedProvider:
    """Both vendors' token endpoints and what they remember."""

    def __init__(self, world: World, *, life: float, names_life: bool) -> None:
        self._world = world
        self.life = life
        self.names_life = names_life
        self.weather = Weather()
        self.families: list[Family] = []
        self.by_refresh: dict[str, Family] = {}
        self.by_access: dict[str, Family] = {}
        self.codes: dict[str, Account] = {}
        self.open: list[Exchange] = []
        self.count = 0

    # Consents

    def family(self, account: Account) -> Family:
        """A new consent of this account."""
        made = Family(len(self.families) + 1, account)
        self.families.append(made)
        account.families.append(made)
        return made

    def issue(self, family: Family, *, renew: bool = True, life: float | None = None) -> dict[str, object]:
        """Give out a new access token, and a new refresh token where it is time for one."""
        family.count += 1
        now = self._world.scheduler.now
        access = f"A-{family.number}-{family.count}"
        family.access[access] = now + (self.life if life is None else life)
        self.by_access[access] = family
        answer: dict[str, object] = {"access_token": access, "token_type": "Bearer"}
        if renew and not family.account.minted and (family.account.rotating or not family.current):
            family.current = f"R-{family.number}-{family.count}"
            family.refresh_tokens.add(family.current)
            self.by_refresh[family.current] = family
            answer["refresh_token"] = family.current
        if family.account.provider == "hubspot":
            answer |= {"refresh_token": family.current, "hub_id": int(family.account.org)}
        else:
            answer["id"] = f"https://login.salesforce.com/id/{family.account.org}/{family.account.user}"
            answer["instance_url"] = "https://sim.my.salesforce.com"
        if self.names_life or family.account.provider == "hubspot":
            answer["expires_in"] = int(self.life)
        return answer

    def revoke(self, family: Family, reason: str) -> None:
        """End a family with all its tokens."""
        if family.alive:
            family.alive, family.died_of = False, reason
            self._world.scheduler.note("provider.revoked", f"family {family.number}: {reason}")

    def lives(self, access: str, now: float) -> bool:
        """Whether the provider would take this access token."""
        family = self.by_access.get(access)
        return family is not None and family.alive and family.access[access] > now

    # Requests

    def fate(self, what: str) -> str:
        """What will become of the next request."""
        world = self._world
        for start, end, kind in self.weather.spells:
            if start <= world.scheduler.now < end:
                return "unavailable" if what not in ("refresh", "mint") and kind in _TOKENS_ONLY else kind
        if not self.weather.kinds or world.scheduler.random.random() >= self.weather.share:
            return "good"
        kind = world.scheduler.random.choice(self.weather.kinds)
        return "good" if kind in _TOKENS_ONLY and what not in ("refresh", "mint") else kind

    def take(self, exchange: Exchange) -> None:
        """A request has left its process: have it arrive, be carried out and answered in its time."""
        scheduler, random = self._world.scheduler, self._world.scheduler.random
        carried_out, _ = FATES[exchange.fate]
        work = scheduler.now + 0.01 + 0.2 * random.random()
        if exchange.fate == "slow_work":
            work += random.random() * self.weather.latest
        if carried_out:
            self.open.append(exchange)
            scheduler.call_at(work, lambda: self._work(exchange))
        else:
            scheduler.call_at(work, lambda: self._reply(exchange, {}))

    def _work(self, exchange: Exchange) -> None:
        exchange.worked_at = self._world.scheduler.now
        self.open.remove(exchange)
        answer = self._carry_out(exchange)
        scheduler = self._world.scheduler
        delay = 0.01 + 0.1 * scheduler.random.random()
        if exchange.fate == "slow_answer":
            delay += scheduler.random.random() * self.weather.latest
        scheduler.call_at(scheduler.now + delay, lambda: self._reply(exchange, answer))

    def _carry_out(self, exchange: Exchange) -> dict[str, object]:
        self._world.scheduler.note("provider.works", f"#{exchange.number} {exchange.what} {exchange.token}")
        match exchange.what:
            case "refresh":
                return self._refresh(exchange)
            case "code":
                answer = self.issue(self.family(self.codes.pop(exchange.form["code"])))
                exchange.issued = str(answer["refresh_token"])
                self._world.issued.add(exchange.issued)
                return answer
            case "mint":
                account = self._world.accounts["minted"]
                return self.issue(account.families[-1], renew=False)
            case "introspect":
                return self._introspect(exchange.form["token"])
            case _:
                family = self.by_refresh.get(exchange.token) or self.by_access.get(exchange.token)
                if family is not None:
                    self.revoke(family, "given_back")
                return {}

    def _refresh(self, exchange: Exchange) -> dict[str, object]:
        family = exchange.family
        self._world.checks.worked(exchange)
        if family is None or not family.alive:
            return {"error": "invalid_grant", "error_description": "expired access/refresh token"}
        if exchange.token != family.current:
            self.revoke(family, "reuse")
            return {"error": "invalid_grant", "error_description": "expired access/refresh token"}
        answer = self.issue(family)
        if family.account.rotating:
            exchange.issued = family.current
            self._world.issued.add(exchange.issued)
        return answer

    def _introspect(self, token: str) -> dict[str, object]:
        now = self._world.scheduler.now
        family = self.by_access.get(token)
        if family is None or not self.lives(token, now):
            return {"active": False}
        end = family.access[token]
        answer: dict[str, object] = {
            "active": True,
            "exp": int(self._world.true_time(end)),
            "iat": int(self._world.true_time(end - self.life)),
        }
        if family.account.provider == "hubspot":
            answer["hub_id"] = int(family.account.org)
        return answer

    def _reply(self, exchange: Exchange, answer: dict[str, object]) -> None:
        _, ending = FATES[exchange.fate]
        random = self._world.scheduler.random
        head: dict[str, str] = {}
        match ending:
            case "silence":
                return
            case "reset":
                exchange.broken_off = True
            case "429" | "503":
                if random.random() < 0.5:
                    head["Retry-After"] = str(int(1 + 20 * random.random()))
                exchange.reply = (int(ending), head, b"{}")
            case "500" | "504":
                exchange.reply = (int(ending), head, b"<html>sorry</html>")
            case "page":
                exchange.reply = (200, head, b"<html>sign in</html>")
            case "broken":
                exchange.reply = (200, head, json.dumps(answer).encode()[:-7])
            case "client":
                exchange.reply = (401, head, b'{"error":"invalid_client"}')
            case "busy":
                body = {
                    "error": "invalid_grant",
                    "error_description": "token request is already being processed",
                }
                exchange.reply = (400, head, json.dumps(body).encode())
            case "refused":
                exchange.reply = (400, head, b'{"error":"invalid_grant","error_description":"no such token"}')
            case _:
                exchange.reply = (400 if "error" in answer else 200, head, json.dumps(answer).encode())
        exchange.replied_at = self._world.scheduler.now
        if exchange.arrived is not None:
            exchange.arrived.fire()


class Network:
    """The `HttpClient` of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world

    def allow(self, *_: str) -> None:
        """Everything it may reach is simulated."""

    def send(
        self,
        method: str,
        url: str,
        *,
        deadlines: Deadlines,
        form: Mapping[str, str | Secret] | None = None,
        before_body: Callable[[], None] | None = None,
        bearer: Secret | None = None,
        **_: Any,
    ) -> Answer:
        """One request as the product's client would make it: the same errors at the same moments."""
        clock, scheduler = self._process.clock, self._world.scheduler
        until = clock.elapsed() + deadlines.total
        exchange = self._exchange(method, url, form or {}, bearer)
        self._world.checks.calls(exchange)
        scheduler.point("http.connect", f"#{exchange.number} {exchange.what} {exchange.fate}")
        if exchange.fate == "unreachable":
            scheduler.sleep(deadlines.connect * scheduler.random.random())
            raise NotSent("refused")
        self._late_before(until)
        scheduler.point("http.check")
        exchange.looked_at = scheduler.now
        if before_body is not None:
            try:
                before_body()
            except Abandoned:
                raise NotSent("abandoned") from None
        exchange.checked_at = scheduler.now
        self._world.checks.looked_at_the_clock(exchange)
        scheduler.point("http.checked")
        self._late_before(until)
        sent_at = clock.now()
        scheduler.point("http.stamped")
        exchange.written_at = scheduler.now
        exchange.arrived = Signal(scheduler)
        self._process.exchanges.append(exchange)
        self._world.checks.presented(exchange)
        self._world.provider.take(exchange)
        try:
            return self._answer(exchange, until, sent_at)
        finally:
            if not self._process.dead:
                exchange.ended_at = scheduler.now
                self._process.exchanges.remove(exchange)

    def _answer(self, exchange: Exchange, until: float, sent_at: Any) -> Answer:
        scheduler, clock = self._world.scheduler, self._process.clock
        assert exchange.arrived is not None
        scheduler.point("http.written", f"#{exchange.number} {exchange.token}")
        while exchange.reply is None and not exchange.broken_off and clock.elapsed() < until:
            scheduler.wait(exchange.arrived, until - clock.elapsed())
        # An answer that lies in the buffer of a process that was frozen may be read or cut off by its own watchdog.
        cut = clock.elapsed() >= until and (exchange.reply is None or scheduler.random.random() < 0.5)
        if cut:
            scheduler.note("http.deadline", f"#{exchange.number}")
            raise Unfinished("deadline")
        if exchange.broken_off or exchange.reply is None:
            raise Unfinished("reset")
        status, head, body = exchange.reply
        if exchange.issued and status == 200:
            self._process.read_answers.append(exchange.issued)
        scheduler.point("http.answered", f"#{exchange.number} {status}")
        return Answer(status, head, body, sent_at)

    def _late_before(self, until: float) -> None:
        if self._process.clock.elapsed() >= until and self._world.scheduler.random.random() < 0.7:
            raise NotSent("deadline")

    def _exchange(
        self, method: str, url: str, form: Mapping[str, str | Secret], bearer: Secret | None
    ) -> Exchange:
        world = self._world
        clear = {name: text.reveal() if isinstance(text, Secret) else text for name, text in form.items()}
        kinds = {"refresh_token": "refresh", "authorization_code": "code", "client_credentials": "mint"}
        what = kinds.get(clear.get("grant_type", ""), url.rsplit("/", 1)[-1])
        token = clear.get("refresh_token") or clear.get("token") or (bearer.reveal() if bearer else "")
        task = world.scheduler.current
        assert task is not None
        world.provider.count += 1
        fate = world.provider.fate(what)
        family = world.provider.by_refresh.get(token)
        if fate == "refused_once" and not world.may_refuse_once(family):
            fate = "good"
        if fate == "busy" and "salesforce" not in url:
            fate = "unavailable"  # only that vendor says it with an `invalid_grant`
        return Exchange(
            number=world.provider.count,
            process=self._process,
            task=task,
            what=what,
            form=clear,
            fate=fate,
            family=family,
            token=token,
            began_at=world.scheduler.now,
            disturbances=self._process.disturbances,
        )
