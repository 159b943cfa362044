"""What is Salesforce's own, against the emulated Salesforce."""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest, ProviderMisconfigured, ProviderUnavailable
from app.oauth2.outcomes import Granted, Misconfigured, Refused, Unavailable
from app.oauth2.provider import App, Grant, life_of
from app.providers.salesforce import Salesforce, full_id, instance_url
from app.secret import Secret
from emulator.control import Control
from emulator.minting import with_checksum
from tests.contract.provider_stages import CLIENT_ID, SECRET, EmulatorStage, emulator_control, grant_of

LOGIN = App(id="a", provider="salesforce", name="default", client_id="c", secrets=(Secret(SECRET),))


@pytest.fixture(scope="module")
def emulator() -> Iterator[Control]:
    """Run one emulator for all tests here; each stage empties it."""
    with emulator_control() as control:
        yield control


@pytest.fixture
def stage(emulator: Control) -> EmulatorStage:
    """Put Salesforce on its stage."""
    return EmulatorStage(Salesforce(), emulator, url=emulator.salesforce.url)


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> Secret:
    """Write a private key as PEM."""
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    return Secret(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password).decode())


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    """Make one RSA key for all assertions."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def bearer_grant(stage: EmulatorStage, key: rsa.RSAPrivateKey) -> Grant:
    """Give a grant for JWT bearer whose public key the app knows."""
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(serialization.Encoding.PEM, spki).decode()
    stage.vendor.change_app(CLIENT_ID, jwt_public_key=public)
    stage.vendor.settings(jwt_ceiling=180)
    stage.vendor.add_user(stage.accounts[0], name="integration@customer.example")
    return Grant("jwt_bearer", subject="integration@customer.example", private_key=pem(key))


def test_assertion_mints_a_token_without_a_refresh_token(stage: EmulatorStage, bearer_grant: Grant) -> None:
    """A pre-authorised user's token is minted anew each time, inside three minutes' validity."""
    stage.provider.check_grant(stage.app, bearer_grant)
    first = stage.provider.refresh(stage.app, bearer_grant, wire=stage.wire())
    second = stage.provider.refresh(stage.app, bearer_grant, wire=stage.wire())
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert first.refresh_token is None
    assert first.access_token != second.access_token
    account = stage.provider.identify(stage.app, first, wire=stage.wire())
    assert account.account_id == stage.accounts[0]


def test_audience_nobody_accepts_is_a_setting_to_correct(stage: EmulatorStage, bearer_grant: Grant) -> None:
    """A refused audience blames the configuration, and the option settles it."""
    wrong = replace(stage.app, options={**stage.app.options, "jwt_audience": "https://elsewhere.example"})
    assert stage.provider.refresh(wrong, bearer_grant, wire=stage.wire()) == Misconfigured(
        "wrong_audience", whole_app=False
    )
    right = replace(stage.app, options={**stage.app.options, "jwt_audience": "https://login.salesforce.com"})
    assert isinstance(stage.provider.refresh(right, bearer_grant, wire=stage.wire()), Granted)


def test_user_who_was_never_approved_backs_off_alone(stage: EmulatorStage, bearer_grant: Grant) -> None:
    """One user missing at Salesforce does not stop the app's other connections."""
    stage.vendor.change_app(CLIENT_ID, preauthorized=False)
    outcome = stage.provider.refresh(stage.app, bearer_grant, wire=stage.wire())
    assert outcome == Misconfigured("user_not_approved", whole_app=False)


@pytest.mark.parametrize(
    ("host", "audience"),
    [
        ("https://login.salesforce.com", "https://login.salesforce.com"),
        ("https://test.salesforce.com", "https://test.salesforce.com"),
        ("https://acme.my.salesforce.com", "https://login.salesforce.com"),
        ("https://acme--qa.sandbox.my.salesforce.com/", "https://test.salesforce.com"),
        ("http://127.0.0.1:1234", "http://127.0.0.1:1234"),
    ],
)
def test_audience_follows_the_login_url(host: str, audience: str, key: rsa.RSAPrivateKey) -> None:
    """The assertion is meant for the login host behind the login URL, with a number for its end."""
    salesforce = Salesforce()
    app = replace(LOGIN, options=salesforce.load_options({"login_url": host}))
    grant = Grant("jwt_bearer", subject="u@x.example", private_key=pem(key))
    payload = salesforce._assertion(app, grant, now=1_000_000.9).reveal().split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    assert claims == {"iss": "c", "sub": "u@x.example", "aud": audience, "exp": 1_000_150}


@pytest.mark.parametrize(
    "private_key",
    [
        Secret("no key at all"),
        pem(ec.generate_private_key(ec.SECP256R1())),
        pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)),  # noqa: S505 - too short on purpose
        None,
    ],
    ids=["text", "elliptic", "short", "missing"],
)
def test_unusable_key_is_found_before_it_is_needed(stage: EmulatorStage, private_key: Secret | None) -> None:
    """A grant that can never be signed is refused when it is added, and asks nobody when it is refreshed."""
    grant = Grant("jwt_bearer", subject="u@x.example", private_key=private_key)
    with pytest.raises(InvalidRequest):
        stage.provider.check_grant(stage.app, grant)
    outcome = stage.provider.refresh(stage.app, grant, wire=stage.wire())
    assert outcome == Misconfigured("assertion_failed", whole_app=False)
    assert stage.seen() == 0


def test_client_credentials_mint_at_my_domain(stage: EmulatorStage) -> None:
    """The app's run-as user gets a token at My Domain, without a refresh token."""
    user = stage.vendor.accounts()[0]["users"][0]["name"]
    stage.vendor.change_app(CLIENT_ID, run_as=user)
    stage.provider.check_grant(stage.app, Grant("client_credentials"))
    outcome = stage.provider.refresh(stage.app, Grant("client_credentials"), wire=stage.wire())
    assert isinstance(outcome, Granted)
    assert outcome.refresh_token is None


@pytest.mark.parametrize("host", ["https://login.salesforce.com", "https://test.salesforce.com"])
def test_client_credentials_away_from_my_domain_say_so(stage: EmulatorStage, host: str) -> None:
    """The shared hosts never answer client credentials: said in a sentence, and nothing is sent."""
    app = replace(stage.app, options=stage.provider.load_options({"login_url": host}))
    with pytest.raises(InvalidRequest, match="My Domain"):
        stage.provider.check_grant(app, Grant("client_credentials"))
    outcome = stage.provider.refresh(app, Grant("client_credentials"), wire=stage.wire())
    assert outcome == Misconfigured("my_domain_required")


def test_life_is_what_introspection_says(stage: EmulatorStage) -> None:
    """The answer has no `expires_in`; introspection tells the end, and the life is never more than real."""
    stage.vendor.change_app(CLIENT_ID, token_lifetime=900)
    granted = stage.connect()
    assert granted.expires_in is None
    life = stage.provider.learn_life(stage.app, granted, wire=stage.wire())
    assert life is not None
    assert 800 < life <= 900


@pytest.mark.parametrize(
    "fault",
    [("inactive", {}), ("status", {"status": 500}), ("status", {"status": 403}), ("html", {}), ("drop", {})],
    ids=["inactive", "500", "403", "html", "drop"],
)
def test_life_stays_unknown_when_introspection_does_not_tell(
    stage: EmulatorStage, fault: tuple[str, dict[str, int]]
) -> None:
    """`active: false` is no proof of anything, and no failure of introspection costs the new token."""
    granted = stage.connect()
    stage.vendor.misbehave(fault[0], endpoint="introspect", count=1, **fault[1])
    assert stage.provider.learn_life(stage.app, granted, wire=stage.wire()) is None


def test_api_host_is_read_again_at_each_refresh(stage: EmulatorStage) -> None:
    """An org that moved says its new host with the next token, without a slash at its end."""
    granted = stage.connect(account=stage.accounts[0])
    stage.vendor.change_account(stage.accounts[0], instance_url="https://Moved.my.salesforce.com/")
    refreshed = stage.provider.refresh(stage.app, grant_of(granted), wire=stage.wire())
    assert isinstance(refreshed, Granted)
    before, after = (stage.provider.account_told(stage.app, each) for each in (granted, refreshed))
    assert before is not None
    assert after is not None
    assert before.identity == after.identity
    assert after.instance_url == "https://moved.my.salesforce.com"


@pytest.mark.parametrize(
    "url",
    [
        "https://acme.lightning.force.com",
        "https://evil.example",
        "https://salesforce.com.evil.example",
        "https://evilsalesforce.com",
        "https://acme.my.salesforce.com@evil.example",
        "http://acme.my.salesforce.com",
        "https://acme.my.salesforce.com:8443",
        "https://acme.my.salesforce.com/path",
        "https://acme.my.salesforce.com?x=1",
        "https://127.0.0.1",
        "https://[::1",
        "javascript:alert(1)",
        "",
    ],
)
def test_no_token_goes_to_a_host_that_is_not_salesforces(url: str) -> None:
    """Only https under Salesforce's own domains may be named as API host."""
    with pytest.raises(ProviderMisconfigured):
        instance_url(url)


def test_this_machine_is_reached_over_http_alone() -> None:
    """Even where loopback is allowed, the address must be one a request can be sent to."""
    with pytest.raises(ProviderMisconfigured):
        instance_url("ws://127.0.0.1:8000", loopback=True)


@pytest.mark.parametrize(
    ("url", "loopback", "normal"),
    [
        ("https://ACME.my.salesforce.com/", False, "https://acme.my.salesforce.com"),
        ("https://acme.my.salesforce.com:443", False, "https://acme.my.salesforce.com"),
        ("https://na1.salesforce.com", False, "https://na1.salesforce.com"),
        ("http://127.0.0.1:8000/", True, "http://127.0.0.1:8000"),
        ("http://[::1]:8000", True, "http://[::1]:8000"),
        ("https://acme.my.salesforce.com", True, "https://acme.my.salesforce.com"),
    ],
)
def test_api_host_is_written_one_way(url: str, loopback: bool, normal: str) -> None:
    """Scheme and host in lower case; this machine counts only where the login URL is on it too."""
    assert instance_url(url, loopback=loopback) == normal


@pytest.mark.parametrize(
    "identity",
    [
        "",
        "https://login.salesforce.com/id/00D/005",
        "https://[::1",
        "https://x/id/00D000000000001AAB/005000000000001AAA",
    ],
)
def test_token_without_a_usable_identity_is_not_placed(stage: EmulatorStage, identity: str) -> None:
    """An identity URL that is missing, short, or fails its check characters names nobody."""
    stage.vendor.misbehave("edit", count=1, set={"id": identity})
    granted = stage.connect()
    with pytest.raises(ProviderUnavailable):
        stage.provider.identify(stage.app, granted, wire=stage.wire())


@given(st.text("ABCXYZabcxyz0123456789", min_size=15, max_size=15))
def test_short_ids_are_completed(short: str) -> None:
    """15 characters become the 18 an independent reading gives; 18 are checked; anything else is no id."""
    full = with_checksum(short)
    assert full_id(short) == full_id(full) == full
    assert full_id(short + ("AAA" if full[15:] != "AAA" else "AAB")) is None
    assert full_id(short[:14]) is None
    assert full_id(short + "é") is None


def test_published_id_has_the_published_check_characters() -> None:
    """Pairs as they stand in examples of Salesforce ids."""
    assert full_id("001A0000006Vm9r") == "001A0000006Vm9rIAC"
    assert full_id("00D000000000001") == "00D000000000001EAA"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("busy", Unavailable("busy", whole_app=False)),
        (
            "busy_2024",
            Unavailable("expired_authorization_code", then=Refused("expired_code"), whole_app=False),
        ),
        ("expired", Refused("expired_token")),
        ("authentication_failure", Refused("authentication_failure")),
        ("ip_restricted", Misconfigured("ip_restricted", whole_app=False)),
        ("inactive_user", Misconfigured("inactive_user", whole_app=False)),
        ("inactive_org", Misconfigured("inactive_org", whole_app=False)),
        ("app_blocked", Misconfigured("app_blocked", whole_app=False)),
        ("invalid_client_id", Misconfigured("client_id_unknown")),
        ("unsupported_grant_type", Misconfigured("unsupported_grant_type", whole_app=False)),
        ("rate_limit_exceeded", Unavailable("rate_limited", rate_limited=True)),
    ],
)
def test_what_salesforce_says_on_the_wire(stage: EmulatorStage, name: str, expected: object) -> None:
    """Each error body as it comes from the server means what the table says."""
    granted = stage.connect()
    stage.vendor.misbehave("error", error=name, count=1)
    assert stage.provider.refresh(stage.app, grant_of(granted), wire=stage.wire()) == expected


def test_sixth_approval_ends_the_first(stage: EmulatorStage) -> None:
    """The approval pushed out by Salesforce's cap of five is a plain refusal."""
    first = stage.connect(account=stage.accounts[0])
    for _ in range(5):
        stage.connect(account=stage.accounts[0])
    outcome = stage.provider.refresh(stage.app, grant_of(first), wire=stage.wire())
    assert outcome == Refused("expired_token")


def test_refresh_scope_is_always_asked_for() -> None:
    """Without it there would be no refresh token; its twin counts."""
    salesforce = Salesforce()
    assert salesforce.scope_query(("api",), ()) == {"scope": "api refresh_token"}
    assert salesforce.scope_query(("api", "offline_access"), ()) == {"scope": "api offline_access"}


@pytest.mark.parametrize(
    "url",
    [
        "https://x.lightning.force.com",
        "http://login.salesforce.com",
        "https://evil.example",
        "https://login.salesforce.com/x",
    ],
)
def test_login_url_must_be_a_login_host(url: str) -> None:
    """Credentials go to Salesforce's login hosts or My Domain, and the option says what is wrong."""
    with pytest.raises(InvalidRequest, match="login_url"):
        Salesforce().load_options({"login_url": url})


def test_identity_from_ids_alone_is_the_one_connecting_gives(stage: EmulatorStage) -> None:
    """An imported connection is the connected one, whichever length its ids came in."""
    account = stage.provider.identify(stage.app, stage.connect(), wire=stage.wire())
    org, user = account.account_id, account.user_id
    assert stage.provider.identity_of(stage.app, org[:15], user) == account.identity
    for ids in (("", user), (org, ""), (org + "x", user)):
        with pytest.raises(InvalidRequest):
            stage.provider.identity_of(stage.app, *ids)


@pytest.mark.parametrize(
    ("claims", "life"),
    [
        ({"active": True, "exp": 1900, "iat": 1000}, 900.0),
        ({"active": True, "exp": 1900}, 900.0),
        ({"active": True, "exp": 1900, "iat": 1500}, 400.0),
        ({"active": True, "exp": 1900, "iat": 10}, 900.0),
        ({"active": True, "exp": 999, "iat": 10}, None),
        ({"active": True, "exp": "1900"}, None),
        ({"active": True, "exp": 1900_000_000_000}, None),
        ({"active": True, "exp": True}, None),
        ({"active": True}, None),
        ({"active": False, "exp": 1900}, None),
        ({"exp": 1900}, None),
        ({}, None),
    ],
)
def test_life_is_the_shorter_of_two_readings(claims: dict[str, object], life: float | None) -> None:
    """Clocks that disagree never make a token outlive itself, and a strange answer tells nothing."""
    granted = Granted(Secret("a"), None, sent_at=datetime.fromtimestamp(1000, UTC))
    assert life_of(claims, granted=granted) == life
