"""Connections coming, changing hands and going: what admins do, and what the vendors and other processes see of it."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from app.bootstrap import Services
from app.broker.connect import CallbackRefused, Start
from app.broker.connection import AdminState, Connection, Health
from app.broker.notices import Courier, signature
from app.broker.refresh import EndingKind
from app.crypto.sealed_box import open_from
from app.db.schema import connections
from app.errors import (
    AccountMismatch,
    Conflict,
    ConnectionDisabled,
    InvalidRequest,
    NeedsReconnect,
    NotFound,
    ProviderMisconfigured,
    ProviderUnavailable,
)
from app.secret import Secret
from tests.broker_world import LEASE, World, connect_account, import_line, paused, together
from tests.installation import HUBSPOT, SALESFORCE
from tests.waiting import PATIENCE, until

# The trip through the consent page


def a_trip(made: World, provider: str = "hubspot") -> tuple[Start, str, Secret]:
    """A trip that has come back from the provider: its start, state and code."""
    account = made.vendor(provider).add_account(users=[{"name": "ada"}])
    start = made.one.connect.start(made.one.apps.find(provider), started_by="admin:cli", name=made.name())
    consent = made.vendor(provider).consent(start.url, account=account["id"])
    code, state = consent.answer("code"), consent.answer("state")
    assert code is not None
    assert state is not None
    return start, state, Secret(code)


def test_a_callback_works_once(made: World) -> None:
    """The same callback a second time, from the same browser, connects nothing and spends no code."""
    start, state, code = a_trip(made)
    made.one.connect.finish("hubspot", state=state, code=code, error=None, browser=start.browser)
    before = made.hubspot.totals().endpoints["token"]
    with pytest.raises(CallbackRefused, match="finished already"):
        made.two.connect.finish("hubspot", state=state, code=code, error=None, browser=start.browser)
    assert made.hubspot.totals().endpoints["token"] == before


def test_two_callbacks_at_once_connect_once(made: World) -> None:
    """A double click on two hosts: one of the two finishes."""
    start, state, code = a_trip(made)

    def finish(number: int) -> bool:
        host = (made.one, made.two)[number % 2]
        try:
            host.connect.finish("hubspot", state=state, code=code, error=None, browser=start.browser)
        except CallbackRefused:
            return False
        return True

    assert together(6, finish).count(True) == 1


def test_a_callback_needs_its_browser_its_provider_and_its_time(made: World) -> None:
    """A state that is unknown, another browser's, another provider's or too old is refused, and nothing is stored."""
    start, state, code = a_trip(made)
    finish = made.one.connect.finish
    with pytest.raises(CallbackRefused, match="belongs to no connect"):
        finish("hubspot", state="guessed", code=code, error=None, browser=start.browser)
    with pytest.raises(CallbackRefused, match="no state"):
        finish("hubspot", state=None, code=code, error=None, browser=start.browser)
    with pytest.raises(CallbackRefused, match="another browser"):
        finish("hubspot", state=state, code=code, error=None, browser=Secret("somebody else's"))
    with pytest.raises(CallbackRefused, match="another browser"):
        finish("hubspot", state=state, code=code, error=None, browser=None)
    with pytest.raises(CallbackRefused, match="belongs to no connect"):
        finish("salesforce", state=state, code=code, error=None, browser=start.browser)
    made.jump(601)
    with pytest.raises(CallbackRefused, match="ten minutes"):
        finish("hubspot", state=state, code=code, error=None, browser=start.browser)
    assert made.one.store.page() == []
    assert made.hubspot.totals().endpoints.get("token", 0) == 0


def test_a_declined_consent_stores_nothing(made: World) -> None:
    """The provider's error comes back in place of a code; a strange one is not repeated to the browser."""
    start, state, _ = a_trip(made)
    with pytest.raises(CallbackRefused, match="declined"):
        made.one.connect.finish(
            "hubspot", state=state, code=None, error="access_denied", browser=start.browser
        )
    start, state, _ = a_trip(made)
    with pytest.raises(CallbackRefused) as caught:
        made.one.connect.finish(
            "hubspot", state=state, code=None, error="<script>x</script>", browser=start.browser
        )
    assert "script" not in caught.value.detail
    assert made.one.store.page() == []


def test_a_code_that_the_provider_does_not_answer_for_stores_nothing(made: World) -> None:
    """An outage at the exchange leaves no half connection; whoever was at it may simply begin again."""
    start, state, code = a_trip(made)
    made.hubspot.misbehave("status", status=503, count=1)
    with pytest.raises(ProviderUnavailable):
        made.one.connect.finish("hubspot", state=state, code=code, error=None, browser=start.browser)
    assert made.one.store.page() == []
    assert made.connected("hubspot").health is Health.HEALTHY


def test_a_grant_nobody_can_name_is_given_back(made: World) -> None:
    """Without knowing whose token it is nothing is stored, and the grant does not stay open."""
    start, state, code = a_trip(made)
    made.hubspot.misbehave("status", status=503, endpoint="introspect")
    with pytest.raises(ProviderUnavailable):
        made.one.connect.finish("hubspot", state=state, code=code, error=None, browser=start.browser)
    assert made.one.store.page() == []
    (grant,) = [g for g in made.made.emulator.control.grants(vendor="hubspot") if g.live][-1:] or [None]
    assert made.hubspot.totals().endpoints["revoke"] == 1
    assert grant is None or grant.created_at < made.hubspot.requests()[-1].at


def test_connecting_the_same_account_again_is_the_same_connection(made: World) -> None:
    """Another user of the portal installs the app once more: same row, next generation, and health starts anew."""
    first = made.connected("hubspot")
    made.hubspot.add_user(first.account_id, name="grace")
    made.revoke_upstream(first, access_tokens=False)
    made.refresh(first)
    made.jump(LEASE + 1)
    made.refresh(first)
    assert made.now(first).health is Health.NEEDS_RECONNECT
    start = made.one.connect.start(made.one.apps.find("hubspot"), started_by="admin:cli", name=made.name())
    consent = made.hubspot.consent(start.url, account=first.account_id)
    done = made.one.connect.finish(
        "hubspot",
        state=consent.answer("state"),
        code=Secret(consent.answer("code") or ""),
        error=None,
        browser=start.browser,
    )
    assert (done.again, done.connection.id, done.connection.name) == (True, first.id, first.name)
    assert (done.connection.generation, done.connection.health) == (2, Health.HEALTHY)
    assert made.findings() == []
    assert [event for event, _ in made.notices()] == [
        "connection.needs_reconnect",
        "connection.recovered",
    ]


def test_a_reconnect_with_another_account_stores_nothing(made: World) -> None:
    """Signed in to the wrong account: refused, the connection stays as it was, the new grant is given back."""
    connection = made.connected("salesforce")
    wrong = made.salesforce.add_account(users=[{"name": "eve"}])
    with pytest.raises(AccountMismatch):
        connect_account(made.one, made.made, "salesforce", name=connection.name, account=wrong["id"])
    assert made.now(connection) == connection
    (given_back,) = made.made.emulator.control.grants(vendor="salesforce", account=wrong["id"])
    assert not given_back.live
    assert made.grant_of(connection).live


def test_a_mismatch_with_a_connected_account_revokes_nothing(made: World) -> None:
    """The account that came back is connected under another name: its grant may be the stored one and is left alone."""
    connection, other = made.connected("hubspot"), made.connected("hubspot")
    with pytest.raises(AccountMismatch):
        connect_account(made.one, made.made, "hubspot", name=connection.name, account=other.account_id)
    assert made.now(other).generation == other.generation
    assert made.hubspot.totals().endpoints.get("revoke", 0) == 0
    assert made.refresh(other).kind is EndingKind.REFRESHED


def test_a_connect_link_works_once(made: World) -> None:
    """Looked at as often as one likes, used by one; on two hosts at once as well; and not after a day."""
    app = made.one.apps.find("hubspot")
    token, _ = made.one.connect.make_link(app, name=made.name())
    made.two.connect.look_at_link(token)

    def use(number: int) -> bool:
        try:
            (made.one, made.two)[number % 2].connect.use_link(token)
        except NotFound:
            return False
        return True

    assert together(6, use).count(True) == 1
    with pytest.raises(NotFound):
        made.one.connect.look_at_link(token)
    late, _ = made.one.connect.make_link(app, name=None)
    made.jump(86_401)
    with pytest.raises(NotFound):
        made.one.connect.use_link(late)
    with pytest.raises(NotFound):
        made.one.connect.use_link(Secret("guessed"))


# Going


def sealed_of(made: World, connection: Connection) -> bytes:
    """The sealed record as it lies in the row."""
    with made.one.database.read() as transaction:
        query = sa.select(connections.c.sealed).where(connections.c.id == connection.id)
        return bytes(transaction.execute(query).scalar_one())


@pytest.mark.parametrize("provider", ["hubspot", "salesforce"])
def test_disconnecting_revokes_and_shreds(made: World, provider: str) -> None:
    """Nothing is handed out once it is marked; revoked upstream; then no byte of the record is left in the database."""
    connection = made.connected(provider)
    sealed = sealed_of(made, connection)
    made.issue(connection)
    made.one.revoker.disconnect(connection.name)
    made.jump(0.8)
    with pytest.raises(ConnectionDisabled):
        made.issue(connection)
    assert made.one.revoker.carry_out(connection.id)
    assert not made.grant_of(connection).live
    with pytest.raises(NotFound):
        made.issue(connection)
    assert made.one.revoker.carry_out(connection.id), "once more does nothing"
    if made.one.database.dialect == "sqlite":
        with made.one.database.write() as transaction:
            transaction.execute(sa.text("SELECT 1"))
        with made.one.database.read() as transaction:
            transaction.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        for file in made.made.directory.glob("drawbridge.db*"):
            assert sealed[-24:] not in file.read_bytes(), file.name


def test_a_connection_deleted_unseen_is_not_handed_out(made: World) -> None:
    """P6: marked, revoked and deleted between two looks of another process: that process stops handing it out as well."""
    connection, other = made.connected("hubspot"), made.connected("hubspot")
    caller = made.caller()
    for one in (connection, other):
        made.two.issuer.issue(caller, one.name)
    made.one.revoker.disconnect(connection.name)
    assert made.one.revoker.carry_out(connection.id)
    made.refresh(other)
    made.jump(1)
    with pytest.raises(NotFound):
        made.two.issuer.issue(caller, connection.name)
    assert made.two.issuer.issue(caller, other.name).generation == other.generation + 1


def test_what_is_taken_away_is_gone_everywhere_within_a_second(made: World) -> None:
    """P6: disabled, renamed, withdrawn from the caller: the other host acts on it with its next look at the epochs."""
    connection, caller = made.connected("hubspot"), made.caller()
    made.two.issuer.issue(caller, connection.name)
    made.one.revoker.disable(connection.name)
    made.jump(0.8)
    with pytest.raises(ConnectionDisabled):
        made.two.issuer.issue(caller, connection.name)
    made.one.revoker.enable(connection.name)
    made.jump(0.8)
    assert made.two.issuer.issue(caller, connection.name).generation == connection.generation
    renamed = made.name()
    made.one.revoker.rename(connection.name, renamed)
    made.jump(0.8)
    with pytest.raises(NotFound):
        made.two.issuer.issue(caller, connection.name)
    assert made.two.issuer.issue(caller, renamed).connection == renamed
    assert made.refreshes("hubspot") == []


def test_a_failed_revocation_is_tried_for_a_day(made: World) -> None:
    """The provider is away: tried again with growing pauses, given up after 24 h with a finding, and shredded."""
    connection = made.connected("hubspot")
    made.hubspot.misbehave("status", status=503, endpoint="revoke")
    made.one.revoker.disconnect(connection.name)
    pauses = []
    for _ in range(4):
        assert not made.one.revoker.carry_out(connection.id)
        row = made.now(connection)
        assert row.retry_at is not None
        pauses.append(round((row.retry_at - made.one.clock.now()).total_seconds()))
        assert row.last_error == "revoke_failed"
    assert pauses == [1, 2, 4, 8]
    made.jump(86_400)
    assert made.one.revoker.carry_out(connection.id)
    assert made.one.store.get(connection.id) is None
    assert made.findings() == ["revoke_gave_up"]


def test_a_connect_during_a_failing_revocation_wins_unharmed(made: World) -> None:
    """Installed anew while the old grant is revoked: enabled, healthy, and no back-off of the revocation sticks."""
    connection = made.connected("hubspot")
    made.one.revoker.disconnect(connection.name)
    made.hubspot.misbehave("status", status=503, endpoint="revoke")
    with paused(made.one.revoker, "_later") as pause:
        results: list[bool] = []
        together(
            2,
            lambda n: (
                results.append(made.one.revoker.carry_out(connection.id))
                if n == 0
                else reinstall(made, connection, pause.wait, pause.let_go)
            ),
        )
    assert results == [False]
    fresh = made.now(connection)
    assert (fresh.admin_state, fresh.health) == (AdminState.ENABLED, Health.HEALTHY)
    assert (fresh.retry_at, fresh.failures, fresh.last_error) == (None, 0, None)
    made.hubspot.behave()
    assert not made.one.revoker.carry_out(connection.id)
    assert made.issue(fresh).generation == fresh.generation


def reinstall(made: World, connection: Connection, wait: object, go: object) -> None:
    """Connect the account again at the right moment."""
    assert callable(wait)
    assert callable(go)
    wait()
    connect_account(made.two, made.made, "hubspot", name=connection.name, account=connection.account_id)
    go()


def test_uninstalling_removes_the_app_from_the_portal(made: World) -> None:
    """Asked for, the app leaves the whole account; a passing failure is tried again, not answered with a mere revocation."""
    connection = made.connected("hubspot")
    made.one.revoker.disconnect(connection.name, uninstall=True)
    made.hubspot.misbehave("status", status=503, endpoint="api", count=1)
    assert not made.one.revoker.carry_out(connection.id)
    assert made.grant_of(connection).live
    assert made.one.revoker.carry_out(connection.id)
    assert not made.grant_of(connection).live
    assert made.hubspot.totals().endpoints.get("revoke", 0) == 0
    with pytest.raises(InvalidRequest):
        made.one.revoker.disconnect(made.connected("salesforce").name, uninstall=True)


# Import


def test_every_form_of_a_line_is_understood(made: World) -> None:
    """With and without tokens, times as text and as number, names given and made; bad lines are told one by one."""
    living, bare, other = made.hubspot.grant_many(HUBSPOT, 3)
    org = made.salesforce.grant(SALESFORCE)
    lines = [
        import_line("hubspot", living, living=True, name="by-text"),
        "",
        import_line("hubspot", bare, living=False, user_id=None),
        import_line("salesforce", org, living=True, expires_at=org.expires_at, scopes=["api"], app="default"),
        "not json",
        "[1]",
        import_line("hubspot", other, living=False, acess_token="typo-secret-9"),
        import_line("hubspot", other, living=False, refresh_token=None),
        import_line("hubspot", other, living=False, name="By Text"),
        import_line("hubspot", other, living=False, name="by-text"),
        import_line("hubspot", other, living=True, expires_at="tomorrow-secret-9"),
        import_line("hubspot", other, living=False, account_id="no number"),
        import_line("nowhere", other, living=False),
        import_line("hubspot", other, living=False, app="unknown"),
        import_line("salesforce", org, living=False, instance_url="secret-9 is no url"),
    ]
    results = list(made.one.transfer.import_lines(lines))
    assert [result.outcome for result in results] == ["added"] * 3 + ["failed"] * 11
    assert [result.line for result in results] == [1, 3, 4, *range(5, 16)]
    assert all(result.problem for result in results[3:])
    assert not any("secret-9" in (result.problem or "") for result in results)
    assert results[1].name == f"hubspot-{bare.account}"
    first = made.one.store.named("by-text")
    assert made.issue(first).access_token == Secret(living.access_token)
    imported = made.one.store.named(results[2].name or "")
    assert imported.expires_at == datetime.fromtimestamp(org.expires_at, UTC)
    assert imported.scopes_granted == ("api",)
    assert made.issue(imported).instance_url == org.instance_url
    assert made.issue(made.one.store.named(results[1].name or "")).generation == 2


def test_a_token_of_unknown_age_is_not_handed_out(made: World) -> None:
    """Imported without an expiry, an access token might be dead: the refresh token brings the first that leaves."""
    grant = made.hubspot.grant(HUBSPOT)
    line = import_line("hubspot", grant, living=False, access_token=grant.access_token, name=made.name())
    (result,) = made.one.transfer.import_lines([line])
    token = made.issue(made.one.store.named(result.name or ""))
    assert token.generation == 2
    assert token.access_token != Secret(grant.access_token)


def test_an_access_token_alone_is_good_until_it_dies(made: World) -> None:
    """Without a refresh token the connection serves its token's life and then asks to be connected."""
    grant = made.hubspot.grant(HUBSPOT)
    line = import_line("hubspot", grant, living=True, refresh_token=None, name=made.name())
    (result,) = made.one.transfer.import_lines([line])
    connection = made.one.store.named(result.name or "")
    assert made.issue(connection).generation == 1
    made.jump(1801)
    with pytest.raises(NeedsReconnect):
        made.issue(connection)


@pytest.mark.parametrize("before", ["disconnecting", "needs_reconnect", "jwt_bearer"])
def test_importing_over_a_connection_replaces_it_whole(made: World, before: str) -> None:
    """Whatever the row was, afterwards it is an ordinary connection with the imported grant, and people are told."""
    connection = made.connected("salesforce")
    if before == "disconnecting":
        made.one.revoker.disconnect(connection.name)
    elif before == "needs_reconnect":
        made.revoke_upstream(connection, access_tokens=False)
        made.refresh(connection)
        made.jump(LEASE + 1)
        made.refresh(connection)
        assert made.findings() == ["needs_reconnect"]
    else:
        with made.one.database.write() as transaction:
            transaction.execute(sa.update(connections).values(grant_type="jwt_bearer"))
    grant = made.salesforce.grant(SALESFORCE, account=connection.account_id, user=connection.user_id)
    (result,) = made.one.transfer.import_lines([import_line("salesforce", grant, living=False)])
    assert (result.outcome, result.name) == ("replaced", connection.name)
    after = made.now(connection)
    assert (after.state, after.grant_type, after.revoke_since) == ("healthy", "authorization_code", None)
    assert made.findings() == []
    assert not made.one.revoker.carry_out(connection.id)
    assert made.issue(connection).generation == connection.generation + 2


def test_a_file_imported_twice_does_not_spend_what_was_spent(made: World) -> None:
    """The second time the row holds newer tokens than the file: the line is refused, and only --replace stores it."""
    (grant,) = made.salesforce.grant_many(SALESFORCE, 1)
    line = import_line("salesforce", grant, living=False, name=made.name())
    (added,) = made.one.transfer.import_lines([line])
    (again,) = made.one.transfer.import_lines([line])
    assert (added.outcome, again.outcome) == ("added", "replaced"), "nothing was refreshed in between"
    connection = made.one.store.named(added.name or "")
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    (refused,) = made.one.transfer.import_lines([line])
    assert (refused.outcome, "--replace" in (refused.problem or "")) == ("failed", True)
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert made.salesforce.totals().reuses == 0
    (forced,) = made.one.transfer.import_lines([line], replace=True)
    assert forced.outcome == "replaced"


def test_a_file_may_be_imported_twice_where_nothing_rotates(made: World) -> None:
    """The refresh token in the row is still the one of the file."""
    (grant,) = made.hubspot.grant_many(HUBSPOT, 1)
    line = import_line("hubspot", grant, living=False, name=made.name())
    (added,) = made.one.transfer.import_lines([line])
    assert made.refresh(made.one.store.named(added.name or "")).kind is EndingKind.REFRESHED
    (again,) = made.one.transfer.import_lines([line])
    assert again.outcome == "replaced"


def test_an_import_does_not_wake_a_token_that_may_be_spent(made: World) -> None:
    """After a lost answer the same line again would have it presented while the access token lives."""
    (grant,) = made.salesforce.grant_many(SALESFORCE, 1)
    line = import_line("salesforce", grant, living=True, name=made.name())
    (added,) = made.one.transfer.import_lines([line])
    connection = made.one.store.named(added.name or "")
    made.salesforce.misbehave("drop", when="after", count=1)
    made.refresh(connection)
    assert made.now(connection).health is Health.UNCERTAIN
    (again,) = made.one.transfer.import_lines([line])
    assert (again.outcome, "may be spent" in (again.problem or "")) == ("failed", True)
    assert made.now(connection).health is Health.UNCERTAIN


def test_an_import_does_not_push_a_refresh_aside(made: World) -> None:
    """The answer that is on its way would come too late for a row that was replaced meanwhile."""
    (grant,) = made.salesforce.grant_many(SALESFORCE, 1)
    line = import_line("salesforce", grant, living=False, name=made.name())
    (added,) = made.one.transfer.import_lines([line])
    connection = made.one.store.named(added.name or "")
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(connection)
        pause.wait()
        (meanwhile,) = made.two.transfer.import_lines([line])
        pause.let_go()
        assert future.result(PATIENCE).kind is EndingKind.REFRESHED
    assert (meanwhile.outcome, "under way" in (meanwhile.problem or "")) == ("failed", True)


# Export


@pytest.fixture
def key() -> X25519PrivateKey:
    """The receiving installation's key."""
    return X25519PrivateKey.generate()


def public(key: X25519PrivateKey) -> bytes:
    """Its public half in PEM."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def private(key: X25519PrivateKey) -> Secret:
    """Its private half in PEM."""
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Secret(pem.decode())


def export(host: Services, connection: Connection, key: X25519PrivateKey) -> bytes:
    """What an export delivers, once it is over."""
    delivered: list[bytes] = []
    host.transfer.export(connection.name, public_key_pem=public(key), deliver=delivered.append)
    (blob,) = delivered
    return blob


def refuse(_: bytes) -> None:
    """An output that takes nothing."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_exported_connection_is_left_alone_here(made: World, key: X25519PrivateKey) -> None:
    """The export holds all that an import needs; here it is not handed out, refreshed, exported or revoked again."""
    connection = made.connected("salesforce")
    made.issue(connection)
    blob = export(made.one, connection, key)
    line = json.loads(open_from(private(key), blob))
    assert line["refresh_token"].encode() not in blob
    assert (
        hashlib.sha256(line["refresh_token"].encode()).hexdigest() == made.grant_of(connection).refresh_sha256
    )
    made.jump(0.8)
    with pytest.raises(ConnectionDisabled, match="moved"):
        made.issue(connection)
    assert made.refresh(connection).kind is EndingKind.HELD
    made.jump(86_400)
    assert made.one.store.claim_due(limit=10, hold=1.0) == []
    with pytest.raises(Conflict, match="moved already"):
        export(made.one, connection, key)
    assert made.refreshes("salesforce", connection) == []
    made.one.revoker.disconnect(connection.name)
    assert made.one.revoker.carry_out(connection.id)
    assert made.grant_of(connection).live, "it is in use at the other installation"
    (back,) = made.two.transfer.import_lines([json.dumps(line)])
    assert back.outcome == "added"
    assert made.issue(made.one.store.named(back.name or "")).generation == 2


def test_an_export_waits_for_a_refresh_to_end(made: World, key: X25519PrivateKey) -> None:
    """While a refresh is under way the tokens may be void in a moment: told to come again."""
    connection = made.connected("salesforce")
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        with pytest.raises(Conflict):
            export(made.two, connection, key)
        pause.let_go()
        future.result()
    export(made.two, connection, key)


def test_a_token_that_may_be_spent_is_not_exported(made: World, key: X25519PrivateKey) -> None:
    """After a lost answer whoever takes it over would present it at once, and lose the living access token as well."""
    connection = made.connected("salesforce")
    made.salesforce.misbehave("drop", when="after", count=1)
    made.refresh(connection)
    assert made.now(connection).health is Health.UNCERTAIN
    with pytest.raises(Conflict, match="may be spent"):
        export(made.one, connection, key)
    assert made.now(connection).exported_at is None


def test_an_export_needs_a_public_key(made: World, key: X25519PrivateKey) -> None:
    """A private key, rubbish or a key of another kind is refused, and nothing is marked as moved."""
    connection = made.connected("hubspot")
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    wrong = rsa_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for pem in (private(key).reveal().encode(), b"rubbish", wrong):
        with pytest.raises(InvalidRequest):
            made.one.transfer.export(connection.name, public_key_pem=pem, deliver=refuse)
    assert made.now(connection).exported_at is None


def test_an_export_that_cannot_be_delivered_changes_nothing(made: World, key: X25519PrivateKey) -> None:
    """Marked as moved only after the delivery: when that fails, the grant goes on being used and refreshed here."""
    connection = made.connected("salesforce")
    with pytest.raises(OSError, match="No space left"):
        made.one.transfer.export(connection.name, public_key_pem=public(key), deliver=refuse)
    assert made.now(connection).exported_at is None
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert export(made.one, connection, key)


def test_an_export_that_took_too_long_is_void(made: World, key: X25519PrivateKey) -> None:
    """A refresh during the delivery voids the copy: a conflict, and the connection stays here."""
    connection = made.connected("salesforce")
    with pytest.raises(Conflict, match="in between"):
        made.one.transfer.export(
            connection.name, public_key_pem=public(key), deliver=lambda _: void(made.refresh(connection))
        )
    assert made.now(connection).exported_at is None
    assert made.issue(connection).generation == 2


def test_only_one_of_two_exports_is_good(made: World, key: X25519PrivateKey) -> None:
    """Two deliveries at once would be two installations with one grant: the later mark is a conflict."""
    connection = made.connected("hubspot")
    with pytest.raises(Conflict, match="in between"):
        made.two.transfer.export(
            connection.name,
            public_key_pem=public(key),
            deliver=lambda _: void(export(made.one, connection, key)),
        )
    moves = made.one.trail.search(action="broker:connection:exported", target=connection.name).rows
    assert len(moves) == 1


def void(_: object) -> None:
    """Nothing, whatever came out."""


# Minted


def test_a_signed_assertion_mints_tokens(made: World, key: X25519PrivateKey) -> None:
    """JWT bearer: minted when added, minted anew when it runs out, with no refresh token anywhere; not to be exported."""
    signing = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = signing.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shown = signing.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    made.salesforce.change_app(SALESFORCE, jwt_public_key=shown.decode())
    user = f"{made.name()}@customer.example"
    made.salesforce.add_account(users=[{"name": user}])
    app = made.one.apps.find("salesforce")
    connection = made.one.connect.add_minted(
        app, name=made.name(), grant_type="jwt_bearer", subject=user, private_key=Secret(pem.decode())
    )
    assert made.issue(connection).generation == 1
    made.jump(7300)
    assert made.issue(connection).generation == 2
    assert {seen.grant_type for seen in made.salesforce.requests()} == {
        "urn:ietf:params:oauth:grant-type:jwt-bearer"
    }
    # Nothing rotates: a lost answer is just asked for again.
    made.jump(7300)
    made.salesforce.misbehave("drop", when="after", count=1)
    with pytest.raises(ProviderUnavailable):
        made.issue(connection)
    made.jump(2)
    assert made.issue(connection).generation == 3
    with pytest.raises(InvalidRequest, match="mints"):
        export(made.one, connection, key)
    with pytest.raises(Conflict, match="already connected"):
        made.one.connect.add_minted(
            app, name=made.name(), grant_type="jwt_bearer", subject=user, private_key=Secret(pem.decode())
        )
    made.one.revoker.disconnect(connection.name)
    assert made.one.revoker.carry_out(connection.id)


def test_client_credentials_mint_tokens(made: World) -> None:
    """The app's own user: minted when added and again when it runs out; refused where the app has no such user."""
    app = made.one.apps.find("salesforce")
    with pytest.raises((CallbackRefused, ProviderMisconfigured)):
        made.one.connect.add_minted(
            app, name=made.name(), grant_type="client_credentials", subject=None, private_key=None
        )
    user = f"{made.name()}@customer.example"
    made.salesforce.add_account(users=[{"name": user}])
    made.salesforce.change_app(SALESFORCE, run_as=user)
    connection = made.one.connect.add_minted(
        app, name=made.name(), grant_type="client_credentials", subject=None, private_key=None
    )
    made.jump(7300)
    assert made.issue(connection).generation == 2


# The app


def test_the_second_client_secret_is_tried(made: World) -> None:
    """Two secrets in force while the vendor's is changed: the refused one is followed by the other, in one refresh."""
    made.hubspot.register_app(
        "rotating-client",
        secrets=["old-secret"],
        redirect_uris=["http://localhost:8000/connect/hubspot/callback"],
        scopes=["oauth"],
    )
    options = {"api_url": made.made.emulator.hubspot.url}
    app = made.one.apps.add(
        "hubspot",
        made.name(),
        client_id="rotating-client",
        secrets=[Secret("new-secret"), Secret("old-secret")],
        scopes=["oauth"],
        options=options,
    )
    grant = made.hubspot.grant("rotating-client")
    line = import_line("hubspot", grant, living=False, app=app.name, name=made.name())
    (result,) = made.one.transfer.import_lines([line])
    connection = made.one.store.named(result.name or "")
    assert made.issue(connection).generation == 2
    assert [seen.outcome for seen in made.refreshes("hubspot")][-1] == "granted"
    assert made.findings() == []
    made.hubspot.set_secrets("rotating-client", ["third-secret"])
    made.jump(1801)
    with pytest.raises(ProviderMisconfigured):
        made.issue(connection)
    assert made.findings() == ["app_misconfigured"]
    made.one.apps.rotate(made.one.apps.row(app.id), secrets=[Secret("third-secret")])
    made.jump(2)
    assert made.issue(connection).generation == 3
    assert made.findings() == ["app_misconfigured"], "the vendor's servers may still disagree"
    made.jump(120)
    assert made.one.examiner.lapse() == 1
    assert made.findings() == [], "the finding ends by itself once nothing was refused for two minutes"


# Notices


def test_notices_arrive_signed_and_once(made: World, httpserver: HTTPServer) -> None:
    """Told of a loss and of the recovery, each once, with a signature over the very body; a failure is tried again."""
    seen: list[tuple[bytes, str]] = []
    answers = iter([500, 200, 204])

    def receive(request: Request) -> Response:
        seen.append((request.get_data(), request.headers["Drawbridge-Signature"]))
        return Response(status=next(answers))

    httpserver.expect_request("/notices").respond_with_handler(receive)
    secret = Secret("a secret of at least sixteen")
    host = made.one
    courier = Courier(host.database, host.http, host.clock, url=httpserver.url_for("/notices"), secret=secret)
    host.http.allow(httpserver.url_for("").rstrip("/"))
    connection = made.connected("hubspot")
    made.revoke_upstream(connection, access_tokens=False)
    made.refresh(connection)
    made.jump(LEASE + 1)
    made.refresh(connection)
    assert courier.deliver_due() == 0
    assert courier.deliver_due() == 0, "not before its pause is over"
    made.jump(5)
    assert courier.deliver_due() == 1
    connect_account(host, made.made, "hubspot", name=connection.name, account=connection.account_id)
    assert courier.deliver_due() == 1
    made.jump(3600)
    assert courier.deliver_due() == 0
    bodies = [json.loads(body) for body, _ in seen]
    assert [body["event"] for body in bodies] == [
        "connection.needs_reconnect",
        "connection.needs_reconnect",
        "connection.recovered",
    ]
    assert bodies[0]["id"] == bodies[1]["id"] != bodies[2]["id"]
    assert bodies[0]["connection"] == connection.name
    for body, header in seen:
        stamp = int(header.partition(",")[0].removeprefix("t="))
        mac = hmac.new(secret.reveal().encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
        assert header == f"t={stamp},v1={mac}" == signature(secret, body, timestamp=stamp)


def test_an_idle_connection_is_kept_alive_and_comes_back_when_asked(made: World) -> None:
    """Unused for a day it is refreshed only to stay alive; a caller wakes it, and the worker keeps it fresh again."""
    connection = made.connected("salesforce")
    made.jump(2 * 86_400)
    made.refresh(connection)
    until(lambda: made.now(connection).life_known)
    idle = made.now(connection)
    assert idle.refresh_at is not None
    assert 17 * 86_400 < (idle.refresh_at - made.one.clock.now()).total_seconds() < 21 * 86_400
    made.jump(86_400)
    assert made.issue(connection).generation == idle.generation + 1
    until(lambda: made.now(connection).refresh_at != idle.refresh_at)
    awake = made.now(connection)
    assert awake.refresh_at is not None
    assert awake.expires_at is not None
    assert awake.refresh_at < awake.expires_at
