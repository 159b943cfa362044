"""The browser's trip to the provider and back, and every way in which it can go wrong."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa

from tests.web_stage import HUBSPOT_APP, SECRET, Answer, Stage


def link(stage: Stage, name: str | None = None, app: str = "hubspot") -> str:
    """A fresh connect link's token."""
    token, _ = stage.services.connect.make_link(stage.services.apps.find(app), name=name)
    return token.reveal()


def stored(stage: Stage) -> list[str]:
    """The names of all connections."""
    return [connection.name for connection in stage.services.store.page()]


def test_the_page_before_says_what_will_happen_and_begins_nothing(stage: Stage) -> None:
    """App, account kind and scopes; no trip exists after a GET, whoever prefetches it."""
    browser = stage.signed_in()
    page = Answer(browser.get("/connect/hubspot?name=acme"))
    assert page.status == 200
    for word in ("HubSpot", "hubspot/default", "acme", "contacts", "companies"):
        assert word in page.text
    assert page.raw.headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in page.raw.headers
    assert stage.emulator.control.hubspot.totals().endpoints.get("authorize", 0) == 0


def test_connecting_ends_in_a_page_that_says_what_was_connected(either_stage: Stage) -> None:
    """Name, account, permissions; the connection is healthy and by whom it was made is on record."""
    stage = either_stage
    browser = stage.signed_in()
    done = stage.go_through(browser, "hubspot", name="acme", account="101")
    assert done.status == 200
    for word in ("acme", "101", "contacts", "Undo"):
        assert word in done.text
    assert stage.services.store.named("acme").state == "healthy"
    actions = [(row.actor, row.action) for row in stage.services.trail.search(target="acme").rows]
    assert ("admin:session", "broker:connect:started") in actions
    assert ("admin:session", "broker:connection:connected") in actions


def test_permissions_that_were_not_granted_are_named(stage: Stage) -> None:
    """What an app wants and an answer does not hold stands on the page."""
    stage.emulator.control.salesforce.misbehave("edit", set={"scope": "api"})
    done = stage.go_through(stage.signed_in(), "salesforce", name="org")
    assert done.status == 200
    assert "Not granted: refresh_token" in done.text


def test_a_link_connects_without_signing_in_and_only_once(stage: Stage) -> None:
    """Its holder sees what will happen, begins with a POST, and nobody can use it again."""
    token = link(stage, "acme")
    browser = stage.client()
    for _ in range(2):  # looking uses nothing up
        assert browser.get(f"/connect/hubspot?link={token}").status_code == 200
    location = stage.begin(browser, "hubspot", query=f"?link={token}")
    done = Answer(browser.get(stage.approve("hubspot", location, account="101")))
    assert done.status == 200
    assert stored(stage) == ["acme"]
    assert browser.get(f"/connect/hubspot?link={token}").status_code == 404
    assert browser.post("/connect/hubspot", data={"link": token}).status_code == 404
    actor = stage.services.trail.search(action="broker:connection:connected").rows[0].actor
    assert actor.startswith("link:")
    assert token not in actor


def test_a_link_is_for_its_own_provider_and_comes_alone(stage: Stage) -> None:
    """At another provider it stays good; with anything beside it, it is refused."""
    token = link(stage)
    browser = stage.client()
    assert browser.get(f"/connect/salesforce?link={token}").status_code == 404
    assert browser.post("/connect/salesforce", data={"link": token}).status_code == 404
    assert browser.get(f"/connect/hubspot?link={token}&app=other").status_code == 400
    assert browser.get("/connect/hubspot?link=short").status_code == 400
    assert browser.get(f"/connect/hubspot?link={token}&link={token}").status_code == 400
    assert browser.get(f"/connect/hubspot?link={token}").status_code == 200


def test_without_a_session_or_link_nothing_begins(stage: Stage) -> None:
    """401 for a person, without a password box."""
    for answer in (stage.client().get("/connect/hubspot"), stage.client().post("/connect/hubspot", data={})):
        assert answer.status_code == 401
        assert answer.mimetype == "text/html"
        assert not answer.headers["WWW-Authenticate"].startswith(("Basic", "Bearer"))


def test_a_forged_start_is_refused(stage: Stage) -> None:
    """No CSRF token, another session's, or another site's form."""
    browser = stage.signed_in()
    page = Answer(browser.get("/connect/hubspot"))
    good = {"csrf": page.hidden("csrf")}
    assert browser.post("/connect/hubspot", data={}).status_code == 403
    assert browser.post("/connect/hubspot", data={"csrf": "0" * 64}).status_code == 403
    foreign = [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
    ]
    for headers in foreign:
        assert browser.post("/connect/hubspot", data=good, headers=headers).status_code == 403
    own = [{"Sec-Fetch-Site": "same-origin", "Origin": "null"}, {"Origin": "https://broker.example"}]
    for headers in own:
        assert browser.post("/connect/hubspot", data=good, headers=headers).status_code == 303


def test_the_cookie_binds_the_trip_to_this_host_and_no_script(stage: Stage) -> None:
    """__Host-, Secure, HttpOnly and Lax; the provider is told by 303, and the policy lets the redirect pass."""
    browser = stage.signed_in()
    page = Answer(browser.get("/connect/hubspot"))
    assert "form-action" not in page.raw.headers["Content-Security-Policy"]
    started = browser.post("/connect/hubspot", data={"csrf": page.hidden("csrf")})
    cookie = started.headers["Set-Cookie"]
    assert cookie.startswith("__Host-drawbridge-trip=")
    for word in ("Secure", "HttpOnly", "SameSite=Lax", "Path=/"):
        assert word in cookie
    assert "Domain" not in cookie
    assert started.status_code == 303
    assert started.get_data() == b""


def test_two_trips_in_one_browser_both_find_their_way_back(stage: Stage) -> None:
    """The second does not take the first one's cookie away."""
    browser = stage.signed_in()
    first = stage.begin(browser, "hubspot", name="one")
    second = stage.begin(browser, "hubspot", name="two")
    assert browser.get(stage.approve("hubspot", first, account="101")).status_code == 200
    assert browser.get(stage.approve("hubspot", second, account="102")).status_code == 200
    assert stored(stage) == ["one", "two"]


def test_a_callback_works_once(stage: Stage) -> None:
    """Its replay says so and changes nothing."""
    browser = stage.signed_in()
    back = stage.approve("hubspot", stage.begin(browser, "hubspot", name="acme"), account="101")
    assert browser.get(back).status_code == 200
    generation = stage.services.store.named("acme").generation
    again = Answer(browser.get(back))
    assert again.status == 400
    assert again.raw.mimetype == "text/html"
    assert "finished already" in again.text
    assert stage.services.store.named("acme").generation == generation


def test_a_callback_in_another_browser_is_refused_and_stays_good_in_its_own(stage: Stage) -> None:
    """Sending somebody a callback URL connects nothing for him (login CSRF)."""
    browser = stage.signed_in()
    back = stage.approve("hubspot", stage.begin(browser, "hubspot", name="acme"), account="101")
    assert stage.client().get(back).status_code == 400
    other = stage.signed_in()
    stage.begin(other, "hubspot")
    assert other.get(back).status_code == 400
    assert stored(stage) == []
    assert browser.get(back).status_code == 200


def test_a_callback_that_comes_too_late_is_refused(stage: Stage) -> None:
    """After ten minutes the trip is over."""
    browser = stage.signed_in()
    back = stage.approve("hubspot", stage.begin(browser, "hubspot", name="acme"), account="101")
    stage.clock.jump(601)
    assert browser.get(back).status_code == 400
    assert stored(stage) == []


def test_a_callback_at_another_provider_is_refused(stage: Stage) -> None:
    """A state made for one provider is none at the other (mix-up)."""
    browser = stage.signed_in()
    back = stage.approve("hubspot", stage.begin(browser, "hubspot", name="acme"), account="101")
    assert browser.get(back.replace("/hubspot/", "/salesforce/")).status_code == 400
    assert stored(stage) == []


def test_odd_callbacks_are_400_and_store_nothing(stage: Stage) -> None:
    """Missing, foreign, repeated and oversized parameters."""
    browser = stage.signed_in()
    back = stage.approve("hubspot", stage.begin(browser, "hubspot", name="acme"), account="101")
    state = re.search(r"state=([^&]+)", back)
    assert state is not None
    queries = [
        "",
        "code=abc",
        "code=abc&state=",
        "code=abc&state=made-up",
        f"code=abc&{state[0]}&{state[0]}",
        f"code=a&code=b&{state[0]}",
        f"code={'a' * 5000}&{state[0]}",
        f"code=a&state={'s' * 300}",
        f"code=%ff&{state[0]}",
    ]
    for query in queries:
        answer = browser.get(f"/connect/hubspot/callback?{query}")
        assert answer.status_code == 400, query
        assert answer.mimetype == "text/html"
    assert browser.open(back, method="HEAD").status_code == 405
    assert stored(stage) == []
    assert browser.get(back).status_code == 200


def test_parameters_a_provider_adds_are_ignored(stage: Stage) -> None:
    """RFC 6749 §4.1.2 demands it."""
    browser = stage.signed_in()
    back = stage.approve("hubspot", stage.begin(browser, "hubspot", name="acme"), account="101")
    assert browser.get(f"{back}&sfdc_community_url=x").status_code == 200


def test_a_refusal_at_the_provider_is_a_sentence(stage: Stage) -> None:
    """Declined by the account's owner, or an error of the provider; whatever it writes is not shown as it is."""
    stage.emulator.control.hubspot.settings(deny_redirects=True)
    browser = stage.signed_in()
    declined = stage.go_through(browser, "hubspot", approve=False)
    assert declined.status == 400
    assert "declined" in declined.text
    for error in ("server_error", "<script>alert(1)</script>"):
        browser = stage.signed_in()
        state = re.search(r"state=([^&]+)", stage.begin(browser, "hubspot"))
        assert state is not None
        answer = Answer(browser.get(f"/connect/hubspot/callback?error={error}&{state[0]}"))
        assert answer.status == 400
        assert "Nothing was connected" in answer.text
        assert "<script" not in answer.text
    assert stored(stage) == []


def test_a_code_the_provider_refuses_stores_nothing(stage: Stage) -> None:
    """Refused is 400, a wrong client secret 503, an outage 503; each a page."""
    control = stage.emulator.control.hubspot
    for misbehave, status in (
        (lambda: control.misbehave("error", error="BAD_AUTH_CODE"), 400),
        (lambda: control.set_secrets(HUBSPOT_APP, ["another"]), 503),
        (lambda: control.misbehave("status", status=503), 503),
    ):
        control.behave()
        control.set_secrets(HUBSPOT_APP, [SECRET])
        misbehave()
        answer = stage.go_through(stage.signed_in(), "hubspot", account="101")
        assert answer.status == status
        assert answer.raw.mimetype == "text/html"
        assert ("Retry-After" in answer.raw.headers) is (status == 503)
    assert stored(stage) == []


def test_a_reconnect_with_another_account_is_refused(stage: Stage) -> None:
    """account_mismatch stores nothing; with the right account it is the same connection's next generation."""
    stage.connect(account="101", name="acme")
    wrong = stage.go_through(stage.signed_in(), "hubspot", query="?connection=acme", account="102")
    assert wrong.status == 409
    assert "Another account" in wrong.text
    assert stage.services.store.named("acme").generation == 1
    right = stage.go_through(stage.signed_in(), "hubspot", query="?connection=acme", account="101")
    assert "connected again" in right.text
    assert stage.services.store.named("acme").generation == 2
    assert stored(stage) == ["acme"]


def test_a_name_that_is_taken_or_impossible_is_told_before_the_trip(stage: Stage) -> None:
    """409 and 400, on a page."""
    stage.connect(account="101", name="acme")
    browser = stage.signed_in()
    page = Answer(browser.get("/connect/hubspot?name=acme"))
    fields = {"csrf": page.hidden("csrf"), "name": "acme"}
    assert browser.post("/connect/hubspot", data=fields).status_code == 409
    assert browser.get("/connect/hubspot?name=NO").status_code == 400
    assert browser.get("/connect/hubspot?app=none").status_code == 404
    assert browser.get("/connect/unknown").status_code == 404


def test_undo_takes_back_what_was_just_connected(stage: Stage) -> None:
    """With the page's token in the same browser, within 15 minutes; not otherwise."""
    browser = stage.signed_in()
    done = stage.go_through(browser, "hubspot", name="acme", account="101")
    fields = {"connection": done.hidden("connection"), "token": done.hidden("token")}
    assert stage.client().post("/connect/hubspot/undo", data=fields).status_code == 400
    assert browser.post("/connect/hubspot/undo", data={**fields, "token": "1.x"}).status_code == 400
    assert browser.post("/connect/salesforce/undo", data=fields).status_code == 400
    assert stage.services.store.named("acme").state == "healthy"
    undone = browser.post("/connect/hubspot/undo", data=fields)
    assert undone.status_code == 200
    assert stage.services.store.named("acme").state == "disconnecting"


def test_undo_without_a_trip_asks_no_database(stage: Stage) -> None:
    """A browser that has connected nothing is refused before anything is looked up."""
    asked: list[str] = []
    looking = sa.event.listens_for(stage.services.database._reader, "before_cursor_execute")
    looking(lambda _connection, _cursor, statement, *_: asked.append(statement))
    stage.services.store.by_name("acme")
    assert len(asked) == 1
    fields = {"connection": "acme", "token": "1.x"}
    assert stage.client().post("/connect/hubspot/undo", data=fields).status_code == 400
    assert len(asked) == 1


def test_u_0000_is_nobodys_name(either_stage: Stage) -> None:
    """PostgreSQL stores no such text and says so by an error; it is refused wherever it comes in."""
    admin = either_stage.signed_in()
    either_stage.go_through(admin, "hubspot", name="acme", account="101")
    for path in (
        "/admin?after=%00",
        "/admin?said=disabled&name=%00",
        "/connect/hubspot?app=%00",
        "/connect/hubspot?name=a%00",
        "/connect/hubspot?connection=%00",
        "/connect/hubspot?link=%00",
        "/connect/hubspot/callback?state=%00&code=1",
        "/admin/login?token=%00",
    ):
        assert admin.get(path).status_code == 400, path
    for path, fields in (
        ("/connect/hubspot/undo", {"connection": "\0", "token": "1.x"}),
        ("/connect/hubspot", {"app": "\0", "csrf": "x"}),
        ("/connect/hubspot", {"link": "\0"}),
        ("/admin/login", {"token": "\0"}),
    ):
        assert admin.post(path, data=fields).status_code == 400, path
    for query in ("after=%00", "state=%00", "app=%00"):
        refused = either_stage.ask(f"/v1/connections?{query}")
        assert (refused.status, refused.code) == (400, "invalid_request"), query
    assert either_stage.ask("/v1/connections/%00/token").status < 500
    assert either_stage.ask("/v1/connections/%00").status < 500


def test_undo_ends_after_a_quarter_of_an_hour(stage: Stage) -> None:
    """Then only an admin disconnects."""
    browser = stage.signed_in()
    done = stage.go_through(browser, "hubspot", name="acme", account="101")
    stage.clock.jump(901)
    fields = {"connection": "acme", "token": done.hidden("token")}
    assert browser.post("/connect/hubspot/undo", data=fields).status_code == 400
    assert stage.services.store.named("acme").state == "healthy"


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", ""])
def test_a_form_of_another_kind_is_415(stage: Stage, kind: str) -> None:
    """Forms are forms."""
    assert stage.signed_in().post("/connect/hubspot", data=b"csrf=x", content_type=kind).status_code == 415
