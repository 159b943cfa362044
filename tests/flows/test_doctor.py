"""The doctor against real trouble: the emulated vendors refuse, fail and stay silent, and the right one is blamed for it."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from app.bootstrap import Services
from app.broker.connection import Connection, Health
from app.broker.doctor import Diagnosis
from app.broker.examination import Examiner
from app.broker.findings import open_findings
from app.broker.notices import Courier
from app.broker.refresh import EndingKind
from app.db.schema import processes
from app.jobs.housekeeping import Tidying
from app.oauth2.causes import Fault
from app.secret import Secret
from tests.broker_world import LEASE, World, connect_account, import_line, write_direct
from tests.contract.provider_stages import closed_port_url
from tests.installation import HUBSPOT, SALESFORCE
from tests.waiting import until

DAY = 86_400
MANY = 40
SETTINGS: dict[str, Any] = {
    "rotation": True,
    "refresh_policy": "infinite",
    "refresh_lifetime": 0,
    "preauthorized": True,
    "jwt_public_key": None,
}


@pytest.fixture
def made(standing: World) -> Iterator[World]:
    """The world, empty, and both apps as they were."""
    standing.clear()
    yield standing
    standing.clear()
    standing.salesforce.change_app(SALESFORCE, **SETTINGS)
    standing.salesforce.set_secrets(SALESFORCE, ["salesforce-secret"])
    standing.hubspot.set_secrets(HUBSPOT, ["hubspot-secret"])


def examined(made: World, connection: Connection) -> Diagnosis:
    """What the doctor says of the connection as it is now."""
    return made.one.examiner.examine(made.now(connection))


def judged(made: World, connection: Connection) -> tuple[str, str]:
    """Fault and cause."""
    found = examined(made, connection)
    return found.fault.value, found.cause


def lose(made: World, connection: Connection) -> None:
    """Refresh until a refusal counts: twice, a lease apart."""
    made.refresh(connection)
    made.jump(LEASE + 1)
    made.refresh(connection)
    assert made.now(connection).health is Health.NEEDS_RECONNECT


# What a provider's answer means


def test_a_healthy_connection_needs_nothing(made: World) -> None:
    """Just connected, all is well, and the evidence says since when."""
    found = examined(made, made.connected("hubspot"))
    assert (found.healthy, found.fault, found.cause, found.others) == (True, Fault.NONE, "healthy", ())
    assert any("Tokens last came" in line for line in found.evidence)


def uninstalled(made: World, connection: Connection) -> None:
    made.revoke_upstream(connection)


def hub_gone(made: World, connection: Connection) -> None:
    made.hubspot.change_account(connection.account_id, active=False)


@pytest.mark.parametrize(("trouble", "cause"), [(uninstalled, "app_uninstalled"), (hub_gone, "account_gone")])
def test_what_hubspot_refuses_is_the_accounts(
    made: World, trouble: Callable[[World, Connection], None], cause: str
) -> None:
    """Told at the first refusal as likely, and the same when it counts."""
    connection = made.expired("hubspot")
    trouble(made, connection)
    made.refresh(connection)
    assert judged(made, connection) == ("connection", cause)
    assert any("at first sight" in line for line in examined(made, connection).evidence)
    made.jump(LEASE + 1)
    made.refresh(connection)
    assert judged(made, connection) == ("connection", cause)
    assert "HubSpot account's admin" in examined(made, connection).who


def revoked(made: World, connection: Connection) -> None:
    made.revoke_upstream(connection)


def pushed_out(made: World, connection: Connection) -> None:
    """Our own reconnects count; five more approvals from elsewhere push ours out."""
    for _ in range(4):
        connect_account(
            made.one, made.made, "salesforce", name=connection.name, account=connection.account_id
        )
    for _ in range(5):
        made.salesforce.grant(SALESFORCE, account=connection.account_id, user=connection.user_id)


def idle(made: World, connection: Connection) -> None:
    made.salesforce.change_app(SALESFORCE, refresh_policy="inactivity", refresh_lifetime=30 * DAY)
    made.refresh(connection)
    made.jump(31 * DAY)


def expiring_at_once(made: World, connection: Connection) -> None:
    made.salesforce.change_app(SALESFORCE, refresh_policy="zero")


def password_changed(made: World, connection: Connection) -> None:
    made.salesforce.misbehave("error", error="authentication_failure")


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        (revoked, "token_policy"),
        (pushed_out, "approvals_exceeded"),
        (idle, "idle_expired"),
        (expiring_at_once, "token_policy"),
        (password_changed, "credentials_changed"),
    ],
)
def test_salesforces_one_refusal_is_told_apart_by_the_evidence(
    made: World, trouble: Callable[[World, Connection], None], cause: str
) -> None:
    """ "Expired access/refresh token" means many things: what we know of the grant says which comes first."""
    connection = made.expired("salesforce")
    trouble(made, connection)
    lose(made, connection)
    found = examined(made, connection)
    assert (found.fault, found.cause) == (Fault.CONNECTION, cause)
    assert "Salesforce admin" in found.who
    if trouble is not password_changed:
        assert "grant_revoked" in {found.cause, *(other.cause for other in found.others)}


def test_a_grant_that_was_refreshed_before_was_most_likely_revoked(made: World) -> None:
    """Not its first refresh, not idle, few approvals: somebody revoked it; the rest is named behind."""
    connection = made.expired("salesforce")
    made.refresh(connection)
    made.jump(7300)
    made.revoke_upstream(connection)
    lose(made, connection)
    found = examined(made, connection)
    assert (found.cause, found.code) == ("grant_revoked", "refused:expired_token")
    others = [other.cause for other in found.others]
    assert "approvals_exceeded" in others
    assert "idle_expired" not in others
    assert "lost_answer" not in others


SALESFORCE_ANSWERS = [
    ("inactive_user", "connection", "user_inactive"),
    ("inactive_org", "connection", "account_inactive"),
    ("ip_restricted", "connection", "address_not_allowed"),
    ("app_blocked", "connection", "app_blocked"),
    ("busy", "outage", "busy"),
    ("busy_2024", "outage", "busy"),
    ("rate_limit_exceeded", "outage", "rate_limited"),
    ("invalid_client_id", "app", "client_unknown"),
    ("invalid_client", "app", "client_secret_refused"),
    ("unsupported_grant_type", "app", "grant_type_off"),
    ("invalid_scope", "app", "scope_refused"),
    ("redirect_uri_mismatch", "app", "redirect_mismatch"),
]
HUBSPOT_ANSWERS = [
    ("MISMATCH_REFRESH_TOKEN_CLIENT", "connection", "other_client"),
    ("BAD_CLIENT_ID", "app", "client_unknown"),
    ("BAD_CLIENT_SECRET", "app", "client_secret_refused"),
    ("BAD_SCOPES", "app", "scope_refused"),
    ("RATE_LIMIT", "outage", "rate_limited"),
]


@pytest.mark.parametrize(
    ("provider", "error", "fault", "cause"),
    [("salesforce", *row) for row in SALESFORCE_ANSWERS] + [("hubspot", *row) for row in HUBSPOT_ANSWERS],
    ids=str,
)
def test_each_error_of_the_vendors_has_its_culprit(
    made: World, provider: str, error: str, fault: str, cause: str
) -> None:
    """One answer in the vendor's own words; no connection is marked for it."""
    connection = made.expired(provider)
    made.vendor(provider).misbehave("error", error=error)
    made.refresh(connection)
    assert judged(made, connection) == (fault, cause)
    assert made.now(connection).health is Health.RETRYING


@pytest.mark.parametrize(
    ("fault", "options", "cause"),
    [
        ("status", {"status": 503}, "provider_down"),
        ("status", {"status": 502}, "provider_down"),
        ("status", {"status": 429}, "rate_limited"),
        ("html", {"status": 200}, "answer_unreadable"),
        ("hang", {}, "answer_missing"),
        ("drop", {}, "answer_missing"),
        ("truncated", {"mode": "length"}, "answer_missing"),
        ("truncated", {"mode": "json"}, "answer_unreadable"),
        ("no_access_token", {}, "answer_unreadable"),
        ("redirect", {}, "answer_unreadable"),
    ],
)
def test_what_is_wrong_with_an_answer_is_the_providers(
    made: World, fault: str, options: dict[str, Any], cause: str
) -> None:
    """Errors of a server, pages, silence and broken answers: nobody here has to do anything."""
    connection = made.expired("hubspot")
    made.hubspot.misbehave(fault, **options)
    made.refresh(connection)
    assert judged(made, connection) == ("outage", cause)
    made.hubspot.behave()


def test_a_hub_on_the_move_is_waited_for_alone(made: World) -> None:
    """477: the account is on its way to another data centre; the app's other connections are not held back by it."""
    moving, other = made.expired("hubspot"), made.expired("hubspot")
    made.hubspot.misbehave("status", status=477, account=moving.account_id)
    for _ in range(7):
        made.refresh(moving)
        made.jump(65)
    assert judged(made, moving) == ("outage", "account_moving")
    assert made.findings() == []
    assert made.refresh(other).kind is EndingKind.REFRESHED


def test_another_org_behind_the_grant_is_a_refreshed_sandbox(made: World) -> None:
    """The answer names another org: its token is not stored, and the admin is told to connect it as a new one."""
    connection = made.expired("salesforce")
    other = made.salesforce.grant(SALESFORCE)
    identity = f"{made.made.emulator.salesforce.url}/id/{other.account}/{other.user}"
    made.salesforce.misbehave("edit", set={"id": identity}, count=1)
    made.refresh(connection)
    found = examined(made, connection)
    assert (found.fault, found.cause) == (Fault.CONNECTION, "account_changed")
    assert "sandbox" in found.sentence


def test_a_lost_answer_is_told_with_the_host_and_its_journal(made: World) -> None:
    """While the token lives it is a silence of the provider's; refused at the one last try it is a lost answer."""
    connection = made.connected("salesforce")
    made.salesforce.misbehave("drop", when="after", count=1)
    made.refresh(connection)
    waiting = examined(made, connection)
    assert (waiting.fault, waiting.cause) == (Fault.OUTAGE, "answer_missing")
    assert "lost_answer" in {other.cause for other in waiting.others}
    made.jump(7300)
    made.refresh(connection)
    found = examined(made, connection)
    assert (found.fault, found.cause) == (Fault.CONNECTION, "lost_answer")
    place = f"host {made.one.process.host}, process {made.one.process.id}, journal {made.one.journal.name}"
    assert any(place in line for line in found.evidence)


def test_a_lost_answer_still_names_its_host_after_the_weekend(made: World) -> None:
    """The attempt stays on record beyond the others, until the connection has other tokens."""
    connection = made.connected("salesforce")
    made.salesforce.misbehave("drop", when="after", count=1)
    made.refresh(connection)
    made.jump(7300)
    made.refresh(connection)
    made.jump(5 * DAY)
    tidying = Tidying(made.one.database, made.one.clock)
    tidying.run()
    assert made.attempts(connection) == [("unknown", "no_answer")], "the refusal that ended it is gone"
    assert any(made.one.journal.name in line for line in examined(made, connection).evidence)
    connect_account(made.one, made.made, "salesforce", name=connection.name, account=connection.account_id)
    tidying.run()
    assert made.attempts(connection) == []


def test_a_holder_that_died_is_our_own_fault(made: World) -> None:
    """The attempt was never ended: the operator is told on which host to look, while the token still lives."""
    connection = made.connected("salesforce")
    assert made.two.refresher._take(made.now(connection)) is not None
    assert judged(made, connection) == ("none", "refreshing")
    made.jump(LEASE + 1)
    found = examined(made, connection)
    assert (found.fault, found.cause) == (Fault.OWN, "holder_died")
    assert any(made.two.journal.name in line for line in found.evidence)


# Minted tokens


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    """One RSA key for all assertions."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_pem(key: rsa.RSAPrivateKey) -> str:
    """What the app at Salesforce knows of a key."""
    shown = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, shown).decode()


@pytest.fixture
def minted(made: World, key: rsa.RSAPrivateKey) -> Connection:
    """A connection whose tokens are minted by JWT bearer, its first token dead."""
    account = made.salesforce.add_account(users=[{"name": f"{made.name()}@minted.example"}])
    made.salesforce.change_app(SALESFORCE, jwt_public_key=public_pem(key))
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    connection = made.one.connect.add_minted(
        made.one.apps.find("salesforce"),
        name=made.name(),
        grant_type="jwt_bearer",
        subject=account["users"][0]["name"],
        private_key=Secret(pem.decode()),
    )
    made.jump((connection.life_seconds or 0) + 1)
    return connection


def not_approved(made: World, connection: Connection) -> None:
    made.salesforce.change_app(SALESFORCE, preauthorized=False)


def user_off(made: World, connection: Connection) -> None:
    made.salesforce.change_user(connection.account_id, connection.user_id, active=False)


def other_certificate(made: World, connection: Connection) -> None:
    another = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    made.salesforce.change_app(SALESFORCE, jwt_public_key=public_pem(another))


def wrong_audience(made: World, connection: Connection) -> None:
    made.salesforce.misbehave("error", error="audience")


@pytest.mark.parametrize(
    ("trouble", "fault", "cause"),
    [
        (not_approved, "connection", "user_not_approved"),
        (user_off, "connection", "user_inactive"),
        (other_certificate, "app", "certificate_refused"),
        (wrong_audience, "app", "wrong_audience"),
    ],
)
def test_minted_tokens_fail_for_reasons_of_their_own(
    made: World,
    minted: Connection,
    trouble: Callable[[World, Connection], None],
    fault: str,
    cause: str,
) -> None:
    """No approval of the user, an inactive user, a certificate that does not fit, an audience that is wrong."""
    trouble(made, minted)
    made.refresh(minted)
    assert judged(made, minted) == (fault, cause)


# Our own side


def elsewhere(made: World, provider: str, client_id: str) -> Connection:
    """A connection through an app whose token endpoint is a port where nobody listens."""
    app = made.one.apps.add(
        provider,
        made.name(),
        client_id=client_id,
        secrets=[Secret("s")],
        scopes=["oauth"],
        options={"token_endpoint": closed_port_url()},
    )
    grant = made.vendor(provider).grant({"hubspot": HUBSPOT, "salesforce": SALESFORCE}[provider])
    line = import_line(provider, grant, living=False, app=app.name, name=made.name())
    (result,) = made.one.transfer.import_lines([line])
    return made.one.store.named(result.name or "")


def test_a_provider_nobody_reaches_while_others_answer_is_its_own_outage(made: World) -> None:
    """Nobody listens there, and Salesforce answered a moment ago: our network is well."""
    connection = elsewhere(made, "hubspot", made.name())
    other = made.expired("salesforce")
    made.refresh(connection)
    assert made.refresh(other).kind is EndingKind.REFRESHED
    found = examined(made, connection)
    assert (found.fault, found.cause) == (Fault.OUTAGE, "provider_unreachable")
    assert any("Other providers answered" in line for line in found.evidence)


def test_when_no_provider_is_reached_it_is_our_network(made: World) -> None:
    """Both are out of reach at once: the operator is told, with the host that tried."""
    connection = elsewhere(made, "hubspot", made.name())
    other = elsewhere(made, "salesforce", made.name())
    made.refresh(connection)
    made.refresh(other)
    found = examined(made, connection)
    assert (found.fault, found.cause) == (Fault.OWN, "network_blocked")
    assert any(made.one.process.host in line for line in found.evidence)


def test_findings_on_apps_that_are_not_reached_blame_our_network_as_well(made: World) -> None:
    """Five failures each: both findings are told with what the other one says of the way out."""
    for provider in ("hubspot", "salesforce"):
        connection = elsewhere(made, provider, made.name())
        for _ in range(6):
            made.refresh(connection)
            made.jump(65)
    told = made.one.examiner.tell(open_findings(made.one.database))
    assert [one.finding.kind for one in told] == ["provider_down"] * 2
    assert {one.diagnosis.cause for one in told} == {"network_blocked"}


def test_a_host_that_is_reached_elsewhere_has_a_network_of_its_own(made: World) -> None:
    """Another host gets answers of the same provider: then it is this one's way out."""
    connection = elsewhere(made, "hubspot", made.name())
    other = made.expired("hubspot")
    made.refresh(connection)
    real, made.two.refresher._process = made.two.refresher._process, _named("web-far-away")
    try:
        assert made.refresh(other, host=made.two).kind is EndingKind.REFRESHED
    finally:
        made.two.refresher._process = real
    found = examined(made, connection)
    assert (found.fault, found.cause) == (Fault.OWN, "network_blocked")
    assert any("web-far-away" in line for line in found.evidence)


def _named(host: str) -> Any:
    from app.broker.refresh import Process

    return Process(id="f" * 32, host=host)


def test_a_missing_key_names_the_hosts_that_lack_it(made: World) -> None:
    """The row is sealed under a key that no keyring here holds."""
    connection = made.connected("hubspot")
    write_direct(made.one.database, connection, kek_id="k9")
    found = examined(made, connection)
    assert (found.fault, found.cause) == (Fault.OWN, "keyring_lacks_key")
    assert any(made.one.process.host in line for line in found.evidence)


def test_a_copied_database_wants_to_be_adopted(made: World) -> None:
    """Another PUBLIC_URL than the database was made for."""
    connection = made.connected("hubspot")
    copy = made.made.host(PUBLIC_URL="http://localhost:9000")
    try:
        found = copy.examiner.examine(made.now(connection))
    finally:
        copy.close()
    assert (found.fault, found.cause) == (Fault.OWN, "adoption_needed")
    assert "PUBLIC_URL" in found.evidence[0]


def test_a_state_dir_that_takes_nothing_is_told_before_a_token_rotates(made: World, tmp_path: Path) -> None:
    """Where the journal cannot be written a healthy connection is one crash from a lost answer."""
    connection = made.connected("salesforce")
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    found = examiner_on(made.one, blocked / "state").examine(made.now(connection))
    assert (found.fault, found.cause) == (Fault.OWN, "disk_full")
    assert examined(made, connection).healthy


def examiner_on(host: Services, state_dir: Path) -> Examiner:
    """The host's examiner with another STATE_DIR."""
    return Examiner(
        host.database,
        host.store,
        apps=host.apps,
        adoption=host.adoption,
        keyring=host.keyring,
        clock=host.clock,
        host=host.process.host,
        state_dir=state_dir,
    )


def test_a_clock_that_is_off_is_told(made: World) -> None:
    """More than five seconds beside the database's on any host."""
    connection = made.connected("hubspot")
    with made.one.database.write() as transaction:
        transaction.execute(
            sa.update(processes).where(processes.c.id == made.two.process.id).values(skew_seconds=12.0)
        )
    try:
        found = examined(made, connection)
    finally:
        made.two.presence.beat()
    assert (found.fault, found.cause) == (Fault.OWN, "clock_wrong")
    assert "+12 s" in found.evidence[0]


def test_without_a_worker_what_is_overdue_says_so(made: World) -> None:
    """Nobody refreshes ahead of time: the operator is told to start one."""
    connection = made.connected("hubspot")
    made.jump(1700)
    assert judged(made, connection) == ("own", "no_worker")


def test_what_an_admin_took_away_is_said_first(made: World) -> None:
    """Disabled and disconnecting connections are nobody else's fault."""
    connection = made.connected("hubspot")
    made.one.revoker.disable(connection.name)
    assert judged(made, connection) == ("own", "disabled")
    made.one.revoker.enable(connection.name)
    made.one.revoker.disconnect(connection.name)
    assert judged(made, connection) == ("own", "disconnecting")


# Facts of a grant


def test_vitals_follow_a_salesforce_grant(made: World) -> None:
    """Rotation and life are learned, idle days fall, approvals are counted and warned of, the fifth by name."""
    connection = made.connected("salesforce")

    def told() -> Any:
        return made.one.examiner.vitals([made.now(connection)])[connection.id]

    assert (told().rotation, told().idle_days_left, told().approvals_known) == ("unknown", 30.0, 1)
    assert told().life_measured
    made.jump(12 * DAY)
    assert told().idle_days_left == pytest.approx(18.0, abs=0.1)
    made.refresh(connection)
    assert (told().rotation, told().idle_days_left, told().approvals_warning) == ("seen", 30.0, None)
    for _ in range(4):
        connect_account(
            made.one, made.made, "salesforce", name=connection.name, account=connection.account_id
        )
    assert told().approvals_known == 5
    assert "the next pushes the oldest out" in told().approvals_warning


def test_an_imported_grant_counts_as_one_approval_of_unknown_age(made: World) -> None:
    """When it was last used is not known until it is used here."""
    (connection,) = made.imported("salesforce", 1)
    told = made.one.examiner.vitals([connection])[connection.id]
    assert (told.idle_days_left, told.approvals_known, told.life_measured) == (None, 1, None)
    hub = made.connected("hubspot")
    told = made.one.examiner.vitals([hub])[hub.id]
    assert (told.rotation, told.idle_days_left, told.approvals_known) == ("not_seen", None, None)


# One finding for many


@dataclass
class Receiver:
    """An operator's system that believes a notice only with a right and fresh signature over the bytes it got."""

    secret: bytes
    now: Callable[[], float]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    turned_away: int = 0

    def take(self, request: Request) -> Response:
        """204 for what is genuine, 401 for the rest; a repeated id is taken once."""
        raw = request.get_data()
        parts = dict(part.split("=", 1) for part in request.headers["Drawbridge-Signature"].split(","))
        expected = hmac.new(self.secret, parts["t"].encode() + b"." + raw, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(expected, parts["v1"]) or abs(self.now() - int(parts["t"])) > 300:
            self.turned_away += 1
            return Response(status=401)
        body = json.loads(raw)
        if body["id"] not in {known["id"] for known in self.bodies}:
            self.bodies.append(body)
        return Response(status=204)


@pytest.fixture
def receiver(made: World, httpserver: HTTPServer) -> Receiver:
    """The operator's system on a real socket."""
    host = made.one
    opened = Receiver(b"a secret of at least sixteen", host.clock.timestamp)
    httpserver.expect_request("/notices").respond_with_handler(opened.take)
    host.http.allow(httpserver.url_for("").rstrip("/"))
    return opened


def deliver(made: World, httpserver: HTTPServer, *, secret: str = "a secret of at least sixteen") -> int:
    """Take what is due to the receiver; how many it believed."""
    host = made.one
    url = httpserver.url_for("/notices")
    return Courier(host.database, host.http, host.clock, url=url, secret=Secret(secret)).deliver_due()


def down(made: World) -> None:
    made.hubspot.misbehave("status", status=503)


def silent(made: World) -> None:
    made.hubspot.misbehave("hang")


def rotated(made: World) -> None:
    made.hubspot.set_secrets(HUBSPOT, ["another"])


def mismatched(made: World) -> None:
    made.hubspot.misbehave("error", error="MISMATCH_REFRESH_TOKEN_CLIENT")


def refusing(made: World) -> None:
    made.hubspot.misbehave("error", error="BAD_REFRESH_TOKEN")


@pytest.mark.parametrize(
    ("trouble", "finding", "fault", "cause"),
    [
        (down, "provider_down", "outage", "provider_down"),
        (silent, "provider_down", "outage", "answer_missing"),
        (rotated, "app_misconfigured", "app", "client_secret_refused"),
        (mismatched, "mass_failure", "app", "client_swapped"),
        (refusing, "mass_refusal", "outage", "mass_refusal"),
    ],
)
def test_trouble_of_many_is_one_finding_that_ends_by_itself(
    made: World,
    receiver: Receiver,
    httpserver: HTTPServer,
    trouble: Callable[[World], None],
    finding: str,
    fault: str,
    cause: str,
) -> None:
    """P9: forty fail at once: none is marked, one finding, one signed notice when it begins and one when it ends."""
    connections = made.imported("hubspot", MANY)
    trouble(made)
    for _ in range(2):
        for connection in connections:
            made.refresh(connection)
        made.jump(LEASE + 1)
    assert Health.NEEDS_RECONNECT not in {made.now(connection).health for connection in connections}
    assert made.findings() == [finding]
    tried = [one for one in map(made.now, connections) if one.last_error]
    assert judged(made, tried[-1]) == (fault, cause)
    assert deliver(made, httpserver) == 1

    made.hubspot.behave()
    made.hubspot.set_secrets(HUBSPOT, ["hubspot-secret"])
    made.jump(121)
    for connection in connections:
        assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert made.findings() == []
    assert deliver(made, httpserver) == 1
    assert deliver(made, httpserver) == 0
    assert [body["event"] for body in receiver.bodies] == ["finding.opened", "finding.closed"]
    opened, closed = receiver.bodies
    assert opened["finding_id"] == closed["finding_id"]
    assert (opened["finding"], opened["app"], opened["connection"]) == (finding, "hubspot/default", None)
    assert opened["sentence"].endswith(".")
    assert opened["who"]
    assert all(judged(made, connection) == ("none", "healthy") for connection in connections[:3])


def test_an_outage_for_some_is_told_once_and_does_not_flicker(made: World) -> None:
    """Every fifth of forty fails, never five in a row: told at the eighth, over when no crowd of them is left."""
    connections = made.imported("hubspot", MANY)
    failing = connections[::5]
    faults = [
        made.hubspot.misbehave("status", status=503, account=connection.account_id) for connection in failing
    ]
    for connection in connections[: MANY - 5]:
        made.refresh(connection)
    assert made.findings() == []
    for connection in connections[MANY - 5 :]:
        made.refresh(connection)
    assert made.findings() == ["provider_down"]
    assert made.one.apps.breaker(failing[0].app_id) is None, "the others are not held back"
    made.jump(10)
    for connection in connections:
        made.refresh(connection)
    assert made.findings() == ["provider_down"]
    made.hubspot.behave(faults[0])
    made.jump(10)
    for connection in connections:
        made.refresh(connection)
    assert made.findings() == [], "seven of forty are no crowd"
    assert [event for event, _ in made.notices()] == ["finding.opened", "finding.closed"]
    assert {made.now(connection).health for connection in failing[1:]} == {Health.RETRYING}


def test_a_connection_that_was_not_tried_speaks_of_the_apps_trouble(made: World) -> None:
    """The breaker keeps most from being tried; the doctor blames the app for all of them, as the finding does."""
    connections = made.imported("hubspot", 3)
    rotated(made)
    made.refresh(connections[0])
    assert made.now(connections[2]).last_error is None
    assert judged(made, connections[2]) == ("app", "client_secret_refused")
    (told,) = made.one.examiner.tell(open_findings(made.one.database))
    assert told.diagnosis.sentence == examined(made, connections[2]).sentence


def test_a_receiver_can_tell_a_forged_notice(made: World, receiver: Receiver, httpserver: HTTPServer) -> None:
    """Signed with another key it is turned away and tried again; with the right one it is believed, once."""
    connection = made.expired("hubspot")
    made.revoke_upstream(connection)
    lose(made, connection)
    assert deliver(made, httpserver, secret="another secret, as long") == 0
    assert receiver.turned_away == 1
    made.jump(5)
    assert deliver(made, httpserver) == 1
    (body,) = receiver.bodies
    assert (body["event"], body["connection"]) == ("connection.needs_reconnect", connection.name)
    assert (body["fault"], body["cause"]) == ("connection", "app_uninstalled")


def test_findings_of_connections_carry_the_doctors_sentence(made: World) -> None:
    """Each in the words its own evidence leads to."""
    uninstalled_one, lost_one = made.expired("hubspot"), made.connected("salesforce")
    made.revoke_upstream(uninstalled_one)
    lose(made, uninstalled_one)
    made.salesforce.misbehave("drop", when="after", count=1)
    made.refresh(lost_one)
    made.jump(7300)
    made.refresh(lost_one)
    told = {
        one.finding.connection_id: one.diagnosis
        for one in made.one.examiner.tell(open_findings(made.one.database))
    }
    assert told[uninstalled_one.id].cause == "app_uninstalled"
    assert told[lost_one.id].cause == "lost_answer"
    assert any("journal" in line for line in told[lost_one.id].evidence)


def test_a_finding_nothing_confirms_any_more_ends_and_is_told(made: World) -> None:
    """The app's connections were taken away while their provider was down: after an hour the finding ends."""
    connections = made.imported("hubspot", 6)
    down(made)
    for connection in connections:
        made.refresh(connection)
    assert made.findings() == ["provider_down"]
    for connection in connections:
        made.one.revoker.disable(connection.name)
    made.jump(3000)
    assert made.one.examiner.lapse() == 0
    made.jump(1000)
    assert made.one.examiner.lapse() == 1
    assert made.findings() == []
    assert [event for event, _ in made.notices()] == ["finding.opened", "finding.closed"]


def test_a_mass_refusal_believed_after_an_hour_ends_as_well(made: World) -> None:
    """Then each connection has its own finding, and the one on them all is over when nothing more is refused."""
    connections = made.imported("hubspot", 4)
    refusing(made)
    for pause in (LEASE + 1, LEASE + 1, 1800, 1800, LEASE + 1):
        for connection in connections:
            made.refresh(connection)
        made.jump(pause)
    assert sorted(set(made.findings())) == ["mass_refusal", "needs_reconnect"]
    made.jump(3700)
    assert made.one.examiner.lapse() == 1
    assert set(made.findings()) == {"needs_reconnect"}
    events = [event for event, _ in made.notices()]
    assert (events.count("finding.opened"), events.count("finding.closed")) == (1, 1)


def test_a_closed_finding_is_a_fresh_one_the_next_time(made: World) -> None:
    """A second outage is told again."""
    connections = made.imported("hubspot", 6)
    for _ in range(2):
        down(made)
        for connection in connections:
            made.refresh(connection)
        made.hubspot.behave()
        made.jump(61)
        for connection in connections:
            made.refresh(connection)
        made.jump(1900)
    until(lambda: made.findings() == [])
    events = [event for event, _ in made.notices()]
    assert events == ["finding.opened", "finding.closed"] * 2
