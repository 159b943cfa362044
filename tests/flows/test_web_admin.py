"""The console: signing in by a one-time link, one page, and forms that cannot be forged."""

from __future__ import annotations

import json
import re

import pytest

from tests.web_stage import Answer, Stage


@pytest.fixture
def acme(stage: Stage) -> str:
    """Give the name of a connected portal."""
    return stage.connect(account="101", name="acme").name


def test_looking_at_a_login_link_uses_nothing_up(stage: Stage) -> None:
    """A GET shows a button; the POST signs in, once."""
    token, _ = stage.services.admins.make_login()
    browser = stage.client()
    for _ in range(2):
        page = Answer(browser.get(f"/admin/login?token={token.reveal()}"))
        assert page.status == 200
        assert page.hidden("token") == token.reveal()
        assert page.raw.headers["Cache-Control"] == "no-store"
        assert page.raw.headers["Referrer-Policy"] == "no-referrer"
    signed = browser.post("/admin/login", data={"token": token.reveal()})
    assert (signed.status_code, signed.headers["Location"]) == (303, "/admin")
    cookie = signed.headers["Set-Cookie"]
    assert cookie.startswith("__Host-drawbridge-admin=")
    for word in ("Secure", "HttpOnly", "SameSite=Lax", "Path=/"):
        assert word in cookie
    assert browser.get("/admin").status_code == 200
    assert stage.client().post("/admin/login", data={"token": token.reveal()}).status_code == 401
    assert stage.client().get(f"/admin/login?token={token.reveal()}").status_code == 401


def test_an_unknown_old_or_malformed_link_signs_nobody_in(stage: Stage) -> None:
    """401 with a page that says so, and the attempt is on record."""
    token, _ = stage.services.admins.make_login()
    stage.clock.jump(601)
    for text in (token.reveal(), "a" * 43, "short", "<script>", ""):
        answer = Answer(stage.client().post("/admin/login", data={"token": text}))
        assert (answer.status, answer.raw.mimetype) == (401, "text/html")
        assert "Set-Cookie" not in answer.raw.headers
        assert "<script>" not in answer.text
    assert [row.detail for row in stage.services.trail.search(action="access:credential:refused").rows] == [
        {"way": "login_link"}
    ] * 2


def test_without_a_session_the_console_leads_to_the_login(stage: Stage) -> None:
    """303 to a page that says how to get a link."""
    answer = stage.client().get("/admin")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/admin/login")
    assert "drawbridge admin login-link" in Answer(stage.client().get("/admin/login")).text


def test_a_session_ends_with_signing_out_and_with_idleness(stage: Stage) -> None:
    """Afterwards the same cookie opens nothing."""
    browser = stage.signed_in()
    csrf = Answer(browser.get("/admin")).hidden("csrf")
    key = browser.get_cookie("__Host-drawbridge-admin", domain="localhost")
    assert key is not None
    assert browser.post("/admin/logout", data={"csrf": csrf}).status_code == 303
    stale = stage.client()
    stale.set_cookie("__Host-drawbridge-admin", key.value)
    assert stale.get("/admin").status_code == 303
    idle = stage.signed_in()
    stage.clock.jump(3700)
    assert idle.get("/admin").status_code == 303


def test_the_page_shows_each_connection_and_what_can_be_done(stage: Stage, acme: str) -> None:
    """Name, provider, account, state, expiry, and the buttons with the name in their label."""
    page = Answer(stage.signed_in().get("/admin"))
    for word in (
        "acme",
        "hubspot/default",
        "101",
        "healthy",
        "Refresh acme",
        "Disable acme",
        "Disconnect acme",
    ):
        assert word in page.text
    assert "/connect/hubspot?connection=acme" in page.text
    assert re.search(r'<form method="get" action="/connect/salesforce"', page.text)


def test_no_page_holds_a_script_or_a_style_of_its_own(stage: Stage, acme: str) -> None:
    """The policy forbids both, so a page with one would not work."""
    browser = stage.signed_in()
    paths = (
        "/admin",
        "/admin/login",
        f"/admin/connections/{acme}/disconnect",
        "/connect/hubspot",
        "/docs",
        "/problems",
    )
    for path in paths:
        page = Answer(browser.get(path, follow_redirects=True))
        assert page.status == 200
        assert "<script" not in page.text
        assert not re.search(r"\son[a-z]+=|\sstyle=|<style", page.text)
        policy = page.raw.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert page.raw.headers["X-Content-Type-Options"] == "nosniff"
        assert page.raw.headers["Strict-Transport-Security"].startswith("max-age=")


def test_the_buttons_do_what_they_say(stage: Stage, acme: str) -> None:
    """Refresh, disable, enable; each answers with a redirect to a page that says what happened."""
    browser = stage.signed_in()
    csrf = Answer(browser.get("/admin")).hidden("csrf")
    for verb, state, said in (
        ("refresh", "healthy", "was refreshed"),
        ("disable", "disabled", "is disabled"),
        ("enable", "healthy", "is enabled"),
    ):
        answer = browser.post(f"/admin/connections/{acme}/{verb}", data={"csrf": csrf})
        assert answer.status_code == 303
        assert stage.services.store.named(acme).state == state
        assert said in Answer(browser.get(answer.headers["Location"])).text
    assert stage.services.store.named(acme).generation == 2
    actors = {
        row.actor
        for row in stage.services.trail.search(target=acme, action="broker:connection:disabled").rows
    }
    assert actors == {"admin:session"}


def test_disconnecting_needs_the_name_typed(stage: Stage, acme: str) -> None:
    """A wrong name disconnects nothing."""
    browser = stage.signed_in()
    path = f"/admin/connections/{acme}/disconnect"
    csrf = Answer(browser.get(path)).hidden("csrf")
    assert browser.post(path, data={"csrf": csrf, "confirm": "acm"}).status_code == 400
    assert browser.post(path, data={"csrf": csrf}).status_code == 400
    assert stage.services.store.named(acme).state == "healthy"
    assert browser.post(path, data={"csrf": csrf, "confirm": "acme"}).status_code == 303
    assert stage.services.store.named(acme).state == "disconnecting"


def test_no_form_can_be_forged(stage: Stage, acme: str) -> None:
    """Without the session's token, with another's, from another site, or without a session: nothing happens."""
    browser, other = stage.signed_in(), stage.signed_in()
    csrf = Answer(browser.get("/admin")).hidden("csrf")
    foreign = Answer(other.get("/admin")).hidden("csrf")
    for path in (
        "/admin/logout",
        f"/admin/connections/{acme}/disable",
        f"/admin/connections/{acme}/disconnect",
    ):
        assert browser.post(path, data={"confirm": acme}).status_code in (400, 403)
        assert browser.post(path, data={"csrf": foreign}).status_code == 403
        assert stage.client().post(path, data={"csrf": csrf}).status_code == 401
        cross = {"Sec-Fetch-Site": "cross-site"}
        assert browser.post(path, data={"csrf": csrf}, headers=cross).status_code == 403
        assert browser.get(path).status_code in (405, 200)
    assert stage.services.store.named(acme).state == "healthy"
    assert browser.get("/admin").status_code == 200


def test_the_page_says_nothing_a_link_puts_into_its_mouth(stage: Stage, acme: str) -> None:
    """`said` and `name` choose among known sentences and existing connections."""
    browser = stage.signed_in()
    page = Answer(browser.get("/admin?said=refreshed&name=%3Cb%3Eall+tokens%3C/b%3E"))
    assert "all tokens" not in page.text
    assert 'role="status"' not in Answer(browser.get("/admin?said=lost&name=acme")).text


def test_many_connections_are_paged(stage: Stage) -> None:
    """A hundred on a page, the rest behind a link."""
    lines = [
        json.dumps(
            {"provider": "hubspot", "account_id": minted.account, "refresh_token": minted.refresh_token}
        )
        for minted in stage.emulator.control.hubspot.grant_many("hub-client", 101)
    ]
    assert {imported.outcome for imported in stage.services.transfer.import_lines(lines)} == {"added"}
    page = Answer(stage.signed_in().get("/admin"))
    assert page.text.count('scope="row"') == 100
    assert "Next page" in page.text


def test_errors_in_the_browser_are_pages(stage: Stage) -> None:
    """404, 405 and 400 under /admin and /connect, with a sentence and without a stack."""
    browser = stage.signed_in()
    for path, method, status in (
        ("/admin/nothing", "GET", 404),
        ("/admin/connections/none/disconnect", "GET", 404),
        ("/admin", "POST", 405),
        ("/connect/hubspot/callback", "POST", 405),
        ("/admin?unknown=1", "GET", 400),
    ):
        answer = browser.open(path, method=method)
        assert (answer.status_code, answer.mimetype) == (status, "text/html")


def test_the_console_is_found_with_a_slash_behind_it_too(stage: Stage) -> None:
    """People type it either way."""
    answer = stage.client().get("/admin/")
    assert answer.status_code == 303
    assert answer.headers["Location"].endswith("/admin")
