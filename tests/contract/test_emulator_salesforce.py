"""The emulated Salesforce, spoken to by plain HTTP, held to Salesforce's documented behaviour."""

import base64
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.x509.oid import NameOID

from emulator import Minted
from emulator.minting import with_checksum
from tests.contract.emulated import CALLBACK, SECRET, TIMEOUT, Force

JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
ORG = "00Dxx0000001gPFEAY"


@pytest.fixture(scope="module")
def key() -> RSAPrivateKey:
    """Give an RSA key, one for the module because making one is slow."""
    return generate_private_key(public_exponent=65537, key_size=2048)


def public_pem(key: RSAPrivateKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def certificate_pem(key: RSAPrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def assertion(key: RSAPrivateKey, *, algorithm: str = "RS256", **claims: Any) -> str:
    head = encoded(json.dumps({"alg": algorithm}).encode())
    body = encoded(json.dumps(claims).encode())
    signature = key.sign(f"{head}.{body}".encode(), PKCS1v15(), hashes.SHA256())
    return f"{head}.{body}.{encoded(signature)}"


def claims_for(force: Force, **changes: Any) -> dict[str, Any]:
    claims = {
        "iss": force.client_id,
        "sub": "ada@acme.example",
        "aud": "https://login.salesforce.com",
        "exp": int(time.time()) + 180,
    }
    return {**claims, **changes}


def refusal(answer: requests.Response) -> tuple[int, str, str]:
    body = answer.json()
    return answer.status_code, body["error"], body["error_description"]


DEAD = (400, "invalid_grant", "expired access/refresh token")
BUSY = (400, "invalid_grant", "token request is already being processed")


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("00D300000000mAl", "00D300000000mAlEAI"),
        ("001A0000006Vm9r", "001A0000006Vm9rIAC"),
        ("000000000000000", "000000000000000AAA"),
        ("AAAAAAAAAAAAAAA", "AAAAAAAAAAAAAAA555"),
    ],
)
def test_long_ids_carry_the_right_check_characters(short: str, long: str) -> None:
    """The last three characters encode which of the first fifteen are capitals."""
    assert with_checksum(short) == long
    assert with_checksum(long) == long


def test_a_code_is_exchanged_for_the_documented_fields(force: Force) -> None:
    """No expires_in; issued_at is a string of milliseconds; the signature covers id and issued_at."""
    answer = force.consent()
    assert answer.answer("state") == "xyz"
    before = time.time() * 1000
    body = force.exchange(answer.answer("code")).json()
    assert set(body) == {
        "access_token", "refresh_token", "token_type", "scope", "id", "instance_url", "issued_at", "signature",
    }  # fmt: skip
    assert re.fullmatch(rf"{ORG[:15]}![A-Za-z0-9._]{{90,}}", body["access_token"])
    assert (body["token_type"], body["scope"]) == ("Bearer", "api refresh_token")
    assert body["instance_url"] == force.url
    assert abs(int(body["issued_at"]) - before) < 60_000
    assert re.fullmatch(rf"{re.escape(force.url)}/id/{ORG}/005\w{{15}}", body["id"])
    mac = hmac.new(SECRET.encode(), (body["id"] + body["issued_at"]).encode(), hashlib.sha256)
    assert base64.b64decode(body["signature"]) == mac.digest()


def test_no_refresh_token_without_its_scope(force: Force) -> None:
    """Only refresh_token or offline_access brings a refresh token."""
    plain = force.control.consent(force.authorize_url(scope="api")).answer("code")
    assert "refresh_token" not in force.exchange(plain).json()
    offline = force.control.consent(force.authorize_url(scope="api offline_access")).answer("code")
    assert "refresh_token" in force.exchange(offline).json()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"client_id": "nobody"}, "invalid_client_id"),
        ({"redirect_uri": f"{CALLBACK}/"}, "redirect_uri_mismatch"),
    ],
)
def test_client_and_redirect_errors_stay_on_the_vendors_page(
    force: Force, changes: dict[str, str], error: str
) -> None:
    """Without a trusted callback the error is shown where the user is."""
    answer = force.control.consent(force.authorize_url(**changes))
    assert (answer.status, answer.location) == (400, None)
    assert f'data-error="{error}"' in answer.body


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"scope": "api everything"}, "invalid_scope"),
        ({"response_type": "token"}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
    ],
)
def test_other_errors_go_to_the_callback(force: Force, changes: dict[str, str], error: str) -> None:
    """Scope and PKCE errors are redirected with error, description and state."""
    answer = force.control.consent(force.authorize_url(**changes))
    assert (answer.answer("error"), answer.answer("state")) == (error, "xyz")


def test_pkce_can_be_demanded(force: Force) -> None:
    """An app that needs PKCE turns away an authorize URL without a challenge."""
    force.control.change_app(force.client_id, pkce_required=True)
    answer = force.control.consent(force.authorize_url(code_challenge=None, code_challenge_method=None))
    assert answer.answer("error") == "invalid_request"


@pytest.mark.parametrize("spelling", ["access_denied", "access-denied"])
def test_a_refusal_reaches_the_callback_in_either_spelling(force: Force, spelling: str) -> None:
    """The vendor's page spells the error with a hyphen or an underscore."""
    force.control.settings(deny_error=spelling)
    answer = force.consent(approve=False)
    assert (answer.answer("error"), answer.answer("state")) == (spelling, "xyz")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"code": "aPrx-made-up"}, "invalid_grant"),
        ({"code_verifier": "x" * 43}, "invalid_grant"),
        ({"code_verifier": None}, "invalid_grant"),
        ({"redirect_uri": "https://other.example/"}, "redirect_uri_mismatch"),
        ({"client_secret": "wrong"}, "invalid_client"),
        ({"client_id": "nobody"}, "invalid_client_id"),
        ({"grant_type": "password"}, "unsupported_grant_type"),
    ],
)
def test_a_bad_exchange_is_refused(force: Force, changes: dict[str, str | None], expected: str) -> None:
    """Each mistake has the documented error."""
    form = {"code": force.consent().answer("code"), **changes}
    assert refusal(force.exchange(**form))[:2] == (400, expected)


def test_a_code_serves_once_and_not_for_ever(force: Force) -> None:
    """A used and a late code say the same."""
    used, late = force.consent().answer("code"), force.consent().answer("code")
    assert force.exchange(used).status_code == 200
    force.whole.advance(901)
    for code in (used, late):
        assert refusal(force.exchange(code)) == (400, "invalid_grant", "expired authorization code")


def test_credentials_may_come_in_a_basic_header(force: Force) -> None:
    """Body and Basic header both authenticate the client."""
    fields = {
        "grant_type": "refresh_token",
        "refresh_token": force.control.grant(force.client_id).refresh_token,
    }
    url = f"{force.url}/services/oauth2/token"
    good = requests.post(url, data=fields, auth=(force.client_id, SECRET), timeout=TIMEOUT)
    bad = requests.post(url, data=fields, auth=(force.client_id, "wrong"), timeout=TIMEOUT)
    assert (good.status_code, refusal(bad)[1]) == (200, "invalid_client")


def test_a_public_client_must_not_send_a_secret(force: Force) -> None:
    """An app without secrets is refused when it sends one."""
    force.control.set_secrets(force.client_id, [])
    token = force.control.grant(force.client_id).refresh_token
    assert refusal(force.refresh(token))[1] == "invalid_client"
    assert force.refresh(token, client_secret=None).status_code == 200


def test_a_secret_may_be_optional_for_refreshing(force: Force) -> None:
    """The switch is on by default; without it only the client id is needed."""
    token = force.control.grant(force.client_id).refresh_token
    assert refusal(force.refresh(token, client_secret=None))[1] == "invalid_client"
    force.control.change_app(force.client_id, secret_required_for_refresh=False)
    assert force.refresh(token, client_secret=None).status_code == 200
    assert refusal(force.refresh(token, client_secret="wrong"))[1] == "invalid_client"


def test_refreshing_without_rotation_returns_no_refresh_token(force: Force) -> None:
    """The old refresh token goes on, and instance_url is sent again because it may have changed."""
    minted = force.control.grant(force.client_id, account=ORG)
    force.control.change_account(ORG, instance_url="https://moved.my.salesforce.com")
    body = force.refresh(minted.refresh_token).json()
    assert "refresh_token" not in body
    assert body["instance_url"] == "https://moved.my.salesforce.com"
    assert force.refresh(minted.refresh_token).status_code == 200


def test_rotation_returns_a_new_token_each_time(force: Force) -> None:
    """With rotation every refresh answers a new single-use refresh token."""
    force.control.change_app(force.client_id, rotation=True)
    tokens = [force.control.grant(force.client_id).refresh_token]
    for _ in range(3):
        tokens.append(force.refresh(tokens[-1]).json()["refresh_token"])
    assert len(set(tokens)) == 4


def test_reusing_a_rotated_token_revokes_the_current_one_and_all_access_tokens(force: Force) -> None:
    """Presenting a voided token ends the grant: the user has to log in again."""
    force.control.change_app(force.client_id, rotation=True)
    minted = force.control.grant(force.client_id)
    current = force.refresh(minted.refresh_token).json()
    assert force.call(current["access_token"]).status_code == 200
    assert refusal(force.refresh(minted.refresh_token)) == DEAD
    assert refusal(force.refresh(current["refresh_token"])) == DEAD
    assert force.call(current["access_token"]).status_code == 401
    assert force.call(minted.access_token).status_code == 401
    truth = force.whole.grant(minted.grant_id)
    assert (truth.live, truth.revoked) == (False, "reuse")
    assert [seen.reuse for seen in force.control.requests()] == [False, True, False]


@contextmanager
def in_hand(force: Force, minted: Minted) -> Iterator[None]:
    """Keep one refresh in the vendor's hands for the length of the block; it is granted in the end."""
    fault = force.control.misbehave("latency", delay=TIMEOUT, count=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(force.refresh, minted.refresh_token)
        try:
            while [seen.outcome for seen in force.control.requests()] != ["processing"]:
                assert not first.done(), "the first refresh was not held"
                time.sleep(0.01)
            yield
        finally:
            force.control.behave(fault)
        assert first.result(TIMEOUT).status_code == 200


def test_a_second_refresh_at_the_same_time_is_told_to_wait(force: Force) -> None:
    """Even without rotation all but one of simultaneous refreshes are refused, and the grant stays alive."""
    minted = force.control.grant(force.client_id)
    with in_hand(force, minted), ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: force.refresh(minted.refresh_token), range(3)))
    assert [refusal(answer) for answer in answers] == [BUSY] * 3
    assert force.refresh(minted.refresh_token).status_code == 200
    first, *others = force.control.requests()[:4]
    assert first.concurrent_with == [seen.id for seen in others]
    assert all(first.id in seen.concurrent_with for seen in others)
    assert force.control.totals().outcomes == {"granted": 2, "busy": 3}


def test_a_busy_rotation_is_not_counted_as_reuse(force: Force) -> None:
    """The loser of two simultaneous rotations is busy; the same token a moment later is a reuse."""
    force.control.change_app(force.client_id, rotation=True)
    minted = force.control.grant(force.client_id)
    with in_hand(force, minted):
        assert refusal(force.refresh(minted.refresh_token)) == BUSY
    assert force.whole.grant(minted.grant_id).live
    assert refusal(force.refresh(minted.refresh_token)) == DEAD
    assert not force.whole.grant(minted.grant_id).live


@pytest.mark.parametrize(
    ("scope", "same", "other"), [("token", 400, 200), ("app", 400, 400), ("off", 200, 200)]
)
def test_the_scope_of_the_busy_lock_is_a_setting(force: Force, scope: str, same: int, other: int) -> None:
    """Reports disagree whether the lock is per token or per app, so both can be had, and none."""
    force.control.settings(busy_scope=scope)
    mine, theirs = force.control.grant_many(force.client_id, 2)
    with in_hand(force, mine):
        assert force.refresh(mine.refresh_token).status_code == same
        assert force.refresh(theirs.refresh_token).status_code == other


def test_the_text_of_mid_2024_can_be_chosen(force: Force) -> None:
    """For some months a busy refresh was called an expired code."""
    force.control.settings(busy_error="busy_2024")
    minted = force.control.grant(force.client_id)
    with in_hand(force, minted):
        answer = force.refresh(minted.refresh_token)
    assert refusal(answer) == (400, "invalid_grant", "expired authorization code")


def test_the_sixth_approval_revokes_the_oldest(force: Force) -> None:
    """Five approvals per user and app live; other users are not touched."""
    other = force.control.grant(force.client_id, account=ORG, user="bob@acme.example")
    mine = force.control.grant_many(force.client_id, 5, account=ORG, user="ada@acme.example")
    assert all(force.whole.grant(each.grant_id).live for each in mine)
    body = force.exchange(force.consent(account=ORG).answer("code")).json()
    assert refusal(force.refresh(mine[0].refresh_token)) == DEAD
    assert force.call(mine[0].access_token).status_code == 401
    for token in (mine[1].refresh_token, body["refresh_token"], other.refresh_token):
        assert force.refresh(token).status_code == 200
    assert force.whole.grant(mine[0].grant_id).revoked == "approval cap"


@pytest.mark.parametrize(
    ("policy", "lifetime", "pause", "status"),
    [
        ("infinite", 0, 10_000_000, 200),
        ("zero", 0, 0, 400),
        ("lifetime", 100, 99, 200),
        ("lifetime", 100, 101, 400),
        ("inactivity", 100, 101, 400),
    ],
)
def test_refresh_token_policies(force: Force, policy: str, lifetime: int, pause: float, status: int) -> None:
    """The admin's policy bites at the next refresh."""
    force.control.change_app(force.client_id, refresh_policy=policy, refresh_lifetime=lifetime)
    minted = force.control.grant(force.client_id)
    force.whole.advance(pause)
    assert force.refresh(minted.refresh_token).status_code == status


def test_idle_lifetime_slides_with_each_refresh(force: Force) -> None:
    """A connection that is kept alive outlives its idle window many times over."""
    force.control.change_app(force.client_id, refresh_policy="inactivity", refresh_lifetime=100)
    minted = force.control.grant(force.client_id)
    for _ in range(3):
        force.whole.advance(90)
        assert force.refresh(minted.refresh_token).status_code == 200


@pytest.mark.parametrize(
    ("break_it", "description"),
    [
        (lambda force: force.control.change_account(ORG, active=False), "inactive organization"),
        (lambda force: force.control.change_account(ORG, ip_blocked=True), "ip restricted"),
        (
            lambda force: force.control.change_user(ORG, "ada@acme.example", active=False),
            "inactive user",
        ),
    ],
)
def test_conditions_of_the_org_refuse_without_killing(
    force: Force, break_it: Callable[[Force], object], description: str
) -> None:
    """An inactive org or user and an IP restriction refuse the refresh; the grant itself stays."""
    minted = force.control.grant(force.client_id, account=ORG, user="ada@acme.example")
    break_it(force)
    assert refusal(force.refresh(minted.refresh_token)) == (400, "invalid_grant", description)
    assert force.whole.grant(minted.grant_id).live


def test_rotating_the_consumer_secret_may_revoke_all_tokens(force: Force) -> None:
    """At Salesforce a new secret takes all tokens of the app along."""
    minted = force.control.grant(force.client_id)
    force.control.set_secrets(force.client_id, ["second"], revoke_tokens=True)
    assert refusal(force.refresh(minted.refresh_token))[1] == "invalid_client"
    assert refusal(force.refresh(minted.refresh_token, client_secret="second")) == DEAD
    assert force.call(minted.access_token).status_code == 401


@pytest.mark.parametrize("form", [public_pem, certificate_pem])
def test_a_signed_assertion_brings_an_access_token_alone(
    force: Force, key: RSAPrivateKey, form: Callable[[RSAPrivateKey], str]
) -> None:
    """JWT bearer works with a public key or certificate and never returns a refresh token."""
    force.control.change_app(force.client_id, jwt_public_key=form(key))
    answer = force.post("token", grant_type=JWT_BEARER, assertion=assertion(key, **claims_for(force)))
    body = answer.json()
    assert "refresh_token" not in body
    assert body["scope"] == "api openid"
    assert force.call(body["access_token"]).status_code == 200


@pytest.mark.parametrize(
    "changes_at",
    [
        lambda now: {"exp": str(int(now) + 180)},
        lambda now: {"exp": int(now * 1000) + 300},
        lambda _: {"aud": ["https://test.salesforce.com"]},
        lambda _: {"prn": "bob@acme.example", "sub": "nobody"},
    ],
    ids=["exp_as_text", "exp_in_milliseconds", "aud_as_list", "prn"],
)
def test_what_real_clients_send_is_taken(
    force: Force, key: RSAPrivateKey, changes_at: Callable[[float], dict[str, Any]]
) -> None:
    """A string or milliseconds in exp, a list in aud, and prn instead of sub all work in the field."""
    force.control.change_app(force.client_id, jwt_public_key=public_pem(key))
    text = assertion(key, **claims_for(force, **changes_at(time.time())))
    assert force.post("token", grant_type=JWT_BEARER, assertion=text).status_code == 200


@pytest.mark.parametrize(
    ("changes", "error", "description"),
    [
        ({"aud": "https://elsewhere.example"}, "invalid_grant", "Audience validation failed"),
        ({"sub": "nobody@acme.example"}, "invalid_grant", "user hasn't approved this consumer"),
        ({"iss": "nobody"}, "invalid_client_id", "client identifier invalid"),
        ({"exp": int(time.time()) - 1}, "invalid_grant", "assertion is expired"),
        ({"exp": "soon"}, "invalid_grant", "assertion is expired"),
    ],
)
def test_a_wrong_claim_is_refused(
    force: Force, key: RSAPrivateKey, changes: dict[str, Any], error: str, description: str
) -> None:
    """Audience, consent, issuer and expiry each have their error."""
    force.control.change_app(force.client_id, jwt_public_key=public_pem(key))
    text = assertion(key, **claims_for(force, **changes))
    assert refusal(force.post("token", grant_type=JWT_BEARER, assertion=text)) == (400, error, description)


def test_a_signature_must_be_rs256_by_the_registered_key(force: Force, key: RSAPrivateKey) -> None:
    """Another key, another algorithm name, an altered body and plain rubbish are all turned away."""
    force.control.change_app(force.client_id, jwt_public_key=public_pem(key))
    good = assertion(key, **claims_for(force))
    stranger = generate_private_key(public_exponent=65537, key_size=2048)
    head, _, signature = good.split(".")
    altered = encoded(json.dumps(claims_for(force, sub="bob@acme.example")).encode())
    for text in (
        assertion(stranger, **claims_for(force)),
        assertion(key, algorithm="none", **claims_for(force)),
        f"{head}.{altered}.{signature}",
        "rubbish",
    ):
        answer = force.post("token", grant_type=JWT_BEARER, assertion=text)
        assert refusal(answer) == (400, "invalid_grant", "invalid assertion")


def test_a_user_who_never_approved_needs_preauthorisation(force: Force, key: RSAPrivateKey) -> None:
    """Without preauthorisation an earlier approval opens the JWT flow."""
    force.control.change_app(force.client_id, jwt_public_key=public_pem(key), preauthorized=False)
    text = assertion(key, **claims_for(force))
    answer = force.post("token", grant_type=JWT_BEARER, assertion=text)
    assert refusal(answer)[2] == "user hasn't approved this consumer"
    force.control.grant(force.client_id, account=ORG, user="ada@acme.example")
    assert force.post("token", grant_type=JWT_BEARER, assertion=text).status_code == 200


def test_client_credentials_act_as_the_run_as_user(force: Force) -> None:
    """There is no refresh token, and scopes that make no sense for a service are removed silently."""
    force.control.change_app(force.client_id, scopes=["api", "full", "web", "refresh_token"])
    assert refusal(force.token(grant_type="client_credentials"))[1] == "invalid_grant"
    force.control.change_app(force.client_id, run_as="bob@acme.example")
    body = force.token(grant_type="client_credentials").json()
    assert (body["scope"], "refresh_token" in body) == ("api", False)
    info = force.call(body["access_token"], "/services/oauth2/userinfo").json()
    assert (info["preferred_username"], info["organization_id"]) == ("bob@acme.example", ORG)


def test_client_credentials_need_my_domain(force: Force) -> None:
    """A login host refuses the flow altogether."""
    force.control.change_app(force.client_id, run_as="bob@acme.example")
    force.control.settings(my_domain=False)
    assert force.token(grant_type="client_credentials").status_code == 400


def test_revoking_an_access_token_spares_the_rest(force: Force) -> None:
    """An access token revokes itself, a refresh token takes its access tokens along."""
    minted = force.control.grant(force.client_id)
    assert force.post("revoke", token=minted.access_token).status_code == 200
    assert force.call(minted.access_token).status_code == 401
    second = force.refresh(minted.refresh_token).json()["access_token"]
    assert force.call(second).status_code == 200
    assert force.post("revoke", token=minted.refresh_token).status_code == 200
    assert force.call(second).status_code == 401
    assert refusal(force.refresh(minted.refresh_token)) == DEAD
    assert force.post("revoke", token=minted.refresh_token).status_code == 400


def test_introspection_speaks_in_seconds(force: Force) -> None:
    """An active answer has the RFC 7662 fields with epoch seconds; Basic works as well as the body."""
    minted = force.control.grant(force.client_id, account=ORG, user="ada@acme.example")
    url = f"{force.url}/services/oauth2/introspect"
    form = {"token": minted.access_token, "token_type_hint": "access_token"}
    basic = requests.post(url, data=form, auth=(force.client_id, SECRET), timeout=TIMEOUT).json()
    body = force.ask("introspect", minted.access_token).json()
    assert body == basic
    assert set(body) == {"active", "scope", "client_id", "username", "sub", "token_type", "exp", "iat", "nbf"}
    assert body["exp"] == int(minted.expires_at)
    assert (body["username"], body["client_id"]) == ("ada@acme.example", force.client_id)
    assert force.ask("introspect", minted.refresh_token).json()["active"] is True


def test_introspection_hides_what_is_not_the_callers(force: Force) -> None:
    """Another app's token is not active, though it works, unless the app may introspect all."""
    force.control.register_app("other", secrets=["o"], scopes=["api"])
    minted = force.control.grant("other")
    assert force.ask("introspect", minted.access_token).json() == {"active": False}
    assert force.call(minted.access_token).status_code == 200
    force.control.change_app(force.client_id, introspect_all=True)
    assert force.ask("introspect", minted.access_token).json()["active"] is True


def test_introspection_of_a_dead_token_is_just_not_active(force: Force) -> None:
    """Unknown and expired tokens answer active=false and nothing more."""
    minted = force.control.grant(force.client_id)
    force.whole.advance(7201)
    for token in ("unknown", minted.access_token):
        assert force.ask("introspect", token).json() == {"active": False}


def test_a_session_ends_after_its_lifetime(force: Force) -> None:
    """The lifetime is the app's; a dead session is a 401 with an array body and is counted."""
    force.control.change_app(force.client_id, token_lifetime=60)
    minted = force.control.grant(force.client_id)
    assert force.call(minted.access_token).status_code == 200
    force.whole.advance(61)
    answer = force.call(minted.access_token)
    assert answer.status_code == 401
    assert answer.json() == [{"message": "Session expired or invalid", "errorCode": "INVALID_SESSION_ID"}]
    assert force.control.totals().calls == {"live": 1, "expired": 1, "revoked": 0, "unknown": 0}


def test_a_sliding_session_lives_as_long_as_it_is_used(force: Force) -> None:
    """Each use of a sliding session gives it its whole lifetime again."""
    force.control.change_app(force.client_id, token_lifetime=60, sliding=True)
    minted = force.control.grant(force.client_id)
    for _ in range(3):
        force.whole.advance(50)
        assert force.call(minted.access_token).status_code == 200
    force.whole.advance(61)
    assert force.call(minted.access_token).status_code == 401


def test_the_identity_url_opens_for_its_own_user_only(force: Force) -> None:
    """The id of the token answer names org and user and answers to that user's token."""
    body = force.exchange(force.consent(account=ORG).answer("code")).json()
    headers = {"Authorization": f"Bearer {body['access_token']}"}
    mine = requests.get(body["id"], headers=headers, timeout=TIMEOUT).json()
    assert (mine["organization_id"], mine["username"]) == (ORG, "ada@acme.example")
    assert mine["id"] == body["id"]
    strange = f"{force.url}/id/{ORG}/005000000000000AAA"
    assert requests.get(strange, headers=headers, timeout=TIMEOUT).status_code == 403


def test_versions_are_public_and_old_ones_are_gone(force: Force) -> None:
    """The list of versions needs no session; retired versions are 410, future ones 404."""
    listed = requests.get(f"{force.url}/services/data/", timeout=TIMEOUT).json()
    assert listed[0]["version"] == "31.0"
    token = force.control.grant(force.client_id).access_token
    assert force.call(token, "/services/data/v30.0/limits").status_code == 410
    assert force.call(token, "/services/data/v99.0/limits").status_code == 404


def test_data_belongs_to_the_org(force: Force) -> None:
    """Two orgs answer the same query with records of their own."""
    first, second = force.control.grant_many(force.client_id, 2)
    query = "/services/data/v66.0/query?q=SELECT+Id,+Name+FROM+Account+WHERE+Name+=+'Company+2'"
    answers = [force.call(each.access_token, query).json() for each in (first, second)]
    assert [answer["totalSize"] for answer in answers] == [1, 1]
    assert answers[0]["records"][0]["Id"] != answers[1]["records"][0]["Id"]
    bad = force.call(first.access_token, "/services/data/v66.0/query?q=DELETE")
    assert (bad.status_code, bad.json()[0]["errorCode"]) == (400, "MALFORMED_QUERY")


def test_a_thousand_grants_bear_a_hundred_refreshes_at_once(force: Force) -> None:
    """A burst of a hundred clients that start together is served without a refusal or a lost connection."""
    minted = force.control.grant_many(force.client_id, 1000)
    gate = threading.Barrier(100)

    def burst(position: int) -> list[int]:
        gate.wait()
        return [force.refresh(each.refresh_token).status_code for each in minted[position::500]]

    with ThreadPoolExecutor(100) as pool:
        statuses = [status for part in pool.map(burst, range(100)) for status in part]
    assert statuses == [200] * 200
    assert len({each.account for each in minted}) == 1000


def test_records_and_types_that_do_not_exist(force: Force) -> None:
    """The REST API says so in its own array form."""
    token = force.control.grant(force.client_id).access_token
    root = "/services/data/v66.0"
    assert set(force.call(token, f"{root}/").json()) == {"limits", "sobjects", "query"}
    kind = force.call(token, f"{root}/query?q=SELECT+Id+FROM+Lead")
    assert (kind.status_code, kind.json()[0]["errorCode"]) == (400, "INVALID_TYPE")
    record = force.call(token, f"{root}/sobjects/Account/001000000000000AAA")
    assert (record.status_code, record.json()[0]["errorCode"]) == (404, "NOT_FOUND")


def test_a_token_of_another_app_is_dead_to_this_one(force: Force) -> None:
    """A foreign refresh token is refused like a dead one and stays well."""
    force.control.register_app("other", secrets=["o"], scopes=["api"])
    token = force.control.grant("other").refresh_token
    assert refusal(force.refresh(token)) == DEAD
    assert force.refresh(token, client_id="other", client_secret="o").status_code == 200


def test_an_app_without_a_key_takes_no_assertions(force: Force, key: RSAPrivateKey) -> None:
    """JWT bearer is off until a certificate is registered."""
    answer = force.post("token", grant_type=JWT_BEARER, assertion=assertion(key, **claims_for(force)))
    assert refusal(answer) == (400, "invalid_grant", "invalid assertion")


def test_the_ceiling_of_exp_can_be_enforced(force: Force, key: RSAPrivateKey) -> None:
    """Sources disagree about an upper bound, so it is a setting."""
    force.control.change_app(force.client_id, jwt_public_key=public_pem(key))
    force.control.settings(jwt_ceiling=180)
    far, near = (assertion(key, **claims_for(force, exp=int(time.time()) + life)) for life in (3600, 60))
    statuses = [
        force.post("token", grant_type=JWT_BEARER, assertion=text).status_code for text in (far, near)
    ]
    assert statuses == [400, 200]


def test_the_cap_can_be_lifted(force: Force) -> None:
    """Without a cap a sixth approval revokes nothing."""
    force.control.settings(approval_cap=None)
    mine = force.control.grant_many(force.client_id, 7, account=ORG)
    assert all(force.whole.grant(each.grant_id).live for each in mine)


def test_another_org_may_be_chosen_at_consent(force: Force) -> None:
    """The user ends up in a different org than the one that was expected."""
    other = force.control.add_account(domain="globex.example")
    force.control.misbehave("other_account", account=other["id"])
    code = force.consent(account=ORG).answer("code")
    assert f"/id/{other['id']}/" in force.exchange(code).json()["id"]


def test_scopes_the_org_does_not_allow_are_missing(force: Force) -> None:
    """An admin may allow less than was asked for; here that leaves no refresh token."""
    force.control.change_account(ORG, scopes=["api"])
    body = force.exchange(force.consent(account=ORG).answer("code")).json()
    assert (body["scope"], "refresh_token" in body) == ("api", False)


def test_the_trap_behind_a_redirect_counts(force: Force) -> None:
    """Following a redirect from the token endpoint shows in the totals."""
    force.control.misbehave("redirect")
    answer = force.refresh("any")
    assert requests.get(answer.headers["Location"], timeout=TIMEOUT).status_code == 404
    assert force.control.totals().endpoints == {"token": 1, "elsewhere": 1}
