"""Every provider file keeps the same promises towards the broker, on a real server over HTTP.

The suite runs for each file `discover()` finds and for one that is written here. HubSpot and Salesforce stand
on the emulator; any other file stands on a plain RFC 6749 server, so a new vendor is held to all of this by
laying down its file.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from pytest_httpserver import HTTPServer

import app.providers
from app import http_client
from app.errors import (
    ConfigurationFault,
    InvalidRequest,
    ProviderMisconfigured,
    ProviderRateLimited,
    ProviderUnavailable,
)
from app.oauth2 import handshake
from app.oauth2.outcomes import (
    CLIENT_REFUSED,
    Granted,
    Misconfigured,
    NotSent,
    Refused,
    Unavailable,
    Unknown,
)
from app.oauth2.provider import Grant, Provider
from app.providers import discover
from app.secret import Secret
from emulator.control import Control
from tests.contract.provider_stages import (
    REDIRECT,
    RETRY_AFTER,
    SECRET,
    EmulatorStage,
    PlainStage,
    Stage,
    closed_port_url,
    emulator_control,
    grant_of,
    new_wire,
)

WRITTEN_HERE = "acme"
ACME = '''"""Acme CRM, an authorization server by the book."""

from app.oauth2.provider import Provider


class Acme(Provider):
    """Acme's accounts."""

    name = "acme"
    title = "Acme CRM"
    authorize_endpoint = "https://id.acme.example/authorize"
    token_endpoint = "https://id.acme.example/token"
'''


@pytest.fixture(scope="module")
def emulator() -> Iterator[Control]:
    """Run one emulator for all tests here; each stage empties it."""
    with emulator_control() as control:
        yield control


@pytest.fixture
def provider_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a further directory for provider files; what was loaded from it is forgotten afterwards."""
    monkeypatch.setattr(app.providers, "__path__", [*app.providers.__path__, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("app.providers."):
            del sys.modules[name]
            delattr(app.providers, name.rpartition(".")[2])


@pytest.fixture(params=[*sorted(discover()), WRITTEN_HERE])
def stage(request: pytest.FixtureRequest, provider_files: Path) -> Stage:
    """Put each provider on its stage, one after the other."""
    if request.param == WRITTEN_HERE:
        (provider_files / "acme.py").write_text(ACME)
    provider = discover()[request.param]
    if provider.name not in ("hubspot", "salesforce"):
        return PlainStage(provider, request.getfixturevalue("httpserver"))
    control: Control = request.getfixturevalue("emulator")
    return EmulatorStage(provider, control, url=getattr(control, provider.name).url)


def refresh(stage: Stage, granted: Granted) -> object:
    """Refresh what was granted."""
    return stage.provider.refresh(stage.app, grant_of(granted), wire=stage.wire())


def test_authorize_url_carries_what_rfc_6749_asks_for(stage: Stage) -> None:
    """The consent page is asked for a code, for this client, this callback, this state and these scopes."""
    url = stage.provider.authorize_url(stage.app, state="st~ate", challenge="c" * 43)
    query = parse_qs(urlsplit(url).query, strict_parsing=True)
    assert query["response_type"] == ["code"]
    assert query["client_id"] == [stage.app.client_id]
    assert query["redirect_uri"] == [REDIRECT]
    assert query["state"] == ["st~ate"]
    assert set(stage.app.scopes) <= set(query["scope"][0].split(" "))
    assert "+" not in url
    pkce = {"code_challenge": ["c" * 43], "code_challenge_method": ["S256"]}
    assert {name: query.get(name) for name in pkce} == (
        pkce if stage.provider.uses_pkce(stage.app) else dict.fromkeys(pkce)
    )


def test_state_comes_back_unchanged(stage: Stage) -> None:
    """What is sent as state is what the callback brings."""
    state = handshake.new_state()
    challenge = handshake.challenge(handshake.new_verifier())
    url = stage.provider.authorize_url(stage.app, state=state, challenge=challenge)
    assert stage.consent(url)["state"] == state


def test_exchange_brings_tokens_and_shows_none(stage: Stage) -> None:
    """A code becomes an access and a refresh token, and printing the outcome shows neither."""
    granted = stage.connect()
    assert granted.access_token.reveal()
    assert granted.refresh_token is not None
    assert granted.access_token.reveal() not in repr(granted)
    assert granted.refresh_token.reveal() not in repr(granted)
    assert "access_token" not in granted.extras
    assert "refresh_token" not in granted.extras


def test_unknown_code_is_refused(stage: Stage) -> None:
    """A code the provider never gave is a refusal, not a fault of ours."""
    outcome = stage.provider.exchange(
        stage.app, code=Secret("never-given"), verifier=handshake.new_verifier(), wire=stage.wire()
    )
    assert isinstance(outcome, Refused)


def test_refresh_brings_another_access_token(stage: Stage) -> None:
    """A refresh answers with a new access token and, without rotation, leaves the refresh token good."""
    granted = stage.connect()
    first = refresh(stage, granted)
    second = refresh(stage, granted)
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert len({granted.access_token, first.access_token, second.access_token}) == 3
    assert first.refresh_token in (None, granted.refresh_token)


def test_rotated_refresh_token_is_handed_on_and_the_old_one_refused(stage: Stage) -> None:
    """With rotation each refresh brings the next refresh token, and the one before is refused."""
    stage.rotate()
    granted = stage.connect()
    next_one = refresh(stage, granted)
    assert isinstance(next_one, Granted)
    assert next_one.refresh_token not in (None, granted.refresh_token)
    assert isinstance(refresh(stage, next_one), Granted)
    assert isinstance(refresh(stage, granted), Refused)


def test_dead_grant_is_refused(stage: Stage) -> None:
    """A refresh token that was revoked at the provider is Refused."""
    granted = stage.connect()
    stage.kill(granted)
    assert isinstance(refresh(stage, granted), Refused)


def test_second_client_secret_is_tried_when_the_first_is_refused(stage: Stage) -> None:
    """During a rotation of client secrets the one that works is found, newest first."""
    granted = stage.connect()
    rotated = stage.with_secrets("not-yet-in-force", SECRET)
    before = stage.seen()
    outcome = stage.provider.refresh(rotated, grant_of(granted), wire=stage.wire(rotated))
    assert isinstance(outcome, Granted)
    assert stage.seen() - before == 2


def test_wrong_client_secrets_never_cost_the_grant(stage: Stage) -> None:
    """When every client secret is refused the outcome is Misconfigured, and the right one still refreshes."""
    granted = stage.connect()
    wrong = stage.with_secrets("wrong", "wrong as well")
    outcome = stage.provider.refresh(wrong, grant_of(granted), wire=stage.wire(wrong))
    assert isinstance(outcome, Misconfigured)
    assert outcome.code in CLIENT_REFUSED
    assert outcome.whole_app
    assert isinstance(refresh(stage, granted), Granted)


def test_rate_limit_is_unavailable_for_as_long_as_it_says(stage: Stage) -> None:
    """429 is Unavailable, marked as a rate limit, with Retry-After in seconds."""
    granted = stage.connect()
    stage.misbehave("rate_limited")
    assert refresh(stage, granted) == Unavailable("rate_limited", RETRY_AFTER, rate_limited=True)


def test_maintenance_is_unavailable(stage: Stage) -> None:
    """503 with a complete body is Unavailable and no rate limit."""
    granted = stage.connect()
    stage.misbehave("unavailable")
    assert refresh(stage, granted) == Unavailable("temporarily_unavailable", RETRY_AFTER)


@pytest.mark.parametrize(
    "fault", ["server_error", "bad_gateway", "html", "redirect", "no_token", "half_json", "cut_short", "lost"]
)
def test_answers_that_tell_nothing_are_unknown(stage: Stage, fault: str) -> None:
    """Whatever came back without being a whole answer may hide a spent refresh token: Unknown."""
    granted = stage.connect()
    stage.misbehave(fault)
    assert isinstance(refresh(stage, granted), Unknown)


@pytest.mark.parametrize("fault", ["odd_error", "bare_400"])
def test_unknown_complaint_is_misconfigured_and_keeps_the_vendors_words_out(stage: Stage, fault: str) -> None:
    """A 4xx nobody has described never kills a grant, and its text goes nowhere."""
    granted = stage.connect()
    stage.misbehave(fault)
    outcome = refresh(stage, granted)
    assert outcome == Misconfigured("unrecognised_error", whole_app=False)
    assert stage.provider.explain("unrecognised_error")
    assert isinstance(refresh(stage, granted), Granted)


def test_nobody_listening_is_not_sent(stage: Stage) -> None:
    """A refused connection spends nothing."""
    granted = stage.connect()
    away = replace(stage.app, options={**stage.app.options, "token_endpoint": closed_port_url()})
    outcome = stage.provider.refresh(away, grant_of(granted), wire=stage.wire(away))
    assert isinstance(outcome, NotSent)


def test_giving_up_before_the_body_sends_nothing(stage: Stage) -> None:
    """A last check that says no leaves the provider without a request."""
    granted = stage.connect()
    before = stage.seen()

    def too_late() -> None:
        raise http_client.Abandoned("the lease ran out")

    outcome = stage.provider.refresh(
        stage.app, grant_of(granted), wire=new_wire(stage.provider, stage.app, before_body=too_late)
    )
    assert isinstance(outcome, NotSent)
    assert stage.seen() == before


def test_identity_is_the_accounts_and_stays(stage: Stage) -> None:
    """Connecting an account again gives the same identity, another account another one."""
    one, other = stage.accounts
    accounts = [
        stage.provider.identify(stage.app, stage.connect(account=account), wire=stage.wire())
        for account in (one, one, other)
    ]
    assert accounts[0].account_id == one
    assert accounts[0].identity == accounts[1].identity != accounts[2].identity
    assert set(stage.app.scopes) <= set(accounts[0].scopes)
    assert "@" not in repr(accounts)


def test_identity_told_with_a_token_agrees_with_the_one_asked_for(stage: Stage) -> None:
    """What a refresh answer says of its account by itself is what identify finds out."""
    granted = stage.connect()
    refreshed = refresh(stage, granted)
    assert isinstance(refreshed, Granted)
    told = stage.provider.account_told(stage.app, refreshed)
    asked = stage.provider.identify(stage.app, refreshed, wire=stage.wire())
    assert told is None or told.identity == asked.identity


def test_life_of_a_token_is_learned(stage: Stage) -> None:
    """The life is what the provider says in the answer or by introspection, and never longer than real."""
    life = stage.provider.learn_life(stage.app, stage.connect(), wire=stage.wire())
    assert life is not None
    assert 0 < life <= 7200


def test_revoked_grant_no_longer_refreshes(stage: Stage) -> None:
    """Giving a grant back is done at once and final; giving it back again is done as well."""
    granted = stage.connect()
    assert stage.provider.revoke(stage.app, grant_of(granted), wire=stage.wire()) == "done"
    assert isinstance(refresh(stage, granted), Refused)
    assert stage.provider.revoke(stage.app, grant_of(granted), wire=stage.wire()) == "done"


def test_revocation_is_tried_again_when_nobody_answers(stage: Stage) -> None:
    """A provider that is away does not count as having revoked."""
    granted = stage.connect()
    away = replace(stage.app, options={**stage.app.options, "revoke_endpoint": closed_port_url()})
    assert stage.provider.revoke(away, grant_of(granted), wire=stage.wire(away)) == "retry"


def test_revocation_finds_the_secret_in_force(stage: Stage) -> None:
    """Giving a grant back tries each client secret as well."""
    granted = stage.connect()
    rotated = stage.with_secrets("not-yet-in-force", SECRET)
    assert stage.provider.revoke(rotated, grant_of(granted), wire=stage.wire()) == "done"
    assert isinstance(refresh(stage, granted), Refused)


def test_nothing_to_revoke_is_impossible(stage: Stage) -> None:
    """A grant without a token cannot be given back."""
    grant = Grant("authorization_code")
    assert stage.provider.revoke(stage.app, grant, wire=stage.wire()) == "impossible"


def test_nothing_to_refresh_asks_nobody(stage: Stage) -> None:
    """A grant without a refresh token is reported, not sent."""
    before = stage.seen()
    outcome = stage.provider.refresh(stage.app, Grant("authorization_code"), wire=stage.wire())
    assert outcome == Misconfigured("nothing_to_refresh", whole_app=False)
    assert stage.seen() == before


def test_unknown_option_is_named(stage: Stage) -> None:
    """An option nobody knows is refused with its name, so that a misspelt one does not go unnoticed."""
    with pytest.raises(InvalidRequest, match="no_such_option"):
        stage.provider.load_options({"no_such_option": "1"})
    assert all(stage.provider.describe_options().values())


def test_foreign_endpoint_must_be_secure(stage: Stage) -> None:
    """Credentials are never sent to an http address elsewhere."""
    with pytest.raises(InvalidRequest, match="token_endpoint"):
        stage.provider.load_options({"token_endpoint": "http://id.example.com/token"})


def test_files_that_are_no_provider_stop_the_start(provider_files: Path) -> None:
    """A file without exactly one provider, or with a name already taken, is a configuration fault."""
    (provider_files / "empty_one.py").write_text('"""Nothing here."""\n')
    (provider_files / "nameless.py").write_text(
        "from app.oauth2.provider import Provider\n\n\nclass Nameless(Provider):\n    title = 'x'\n"
    )
    (provider_files / "twin.py").write_text(ACME.replace('"acme"', '"hubspot"'))
    with pytest.raises(ConfigurationFault) as caught:
        discover()
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "provider file empty_one",
        "provider file nameless",
        "provider file twin",
    ]


class Silent(Provider):
    """A server that says nothing about whose token it gives."""

    name = "silent"
    title = "Silent"


def test_server_that_tells_nothing_stands_for_one_account(httpserver: HTTPServer) -> None:
    """Without introspection and UserInfo the app itself is the account, and a life is not made up."""
    stage = PlainStage(Silent(), httpserver)
    options = {name: stage.app.options[name] for name in ("authorize_endpoint", "token_endpoint")}
    app_ = replace(stage.app, options=options)
    account = stage.provider.identify(app_, stage.connect(), wire=stage.wire(app_))
    assert (account.account_id, account.user_id, account.scopes) == ("default", "", ("read", "write"))
    unsaid = replace(stage.connect(), expires_in=None)
    assert stage.provider.learn_life(app_, unsaid, wire=stage.wire(app_)) is None


def test_userinfo_names_the_account_where_there_is_no_introspection(httpserver: HTTPServer) -> None:
    """OpenID Connect UserInfo is asked with the access token."""
    stage = PlainStage(Silent(), httpserver)
    granted = stage.connect()
    bearer = {"Authorization": f"Bearer {granted.access_token.reveal()}"}
    httpserver.expect_request("/userinfo", headers=bearer).respond_with_json({"sub": "u-77"})
    endpoints = {"userinfo_endpoint": httpserver.url_for("/userinfo"), "introspect_endpoint": ""}
    app_ = replace(stage.app, options={**stage.app.options, **endpoints})
    account = stage.provider.identify(app_, granted, wire=stage.wire(app_))
    assert account.identity == "u-77"


def test_client_credentials_are_minted_without_a_refresh_token(httpserver: HTTPServer) -> None:
    """A plain server mints for the client itself, again each time."""
    stage = PlainStage(Silent(), httpserver)
    outcome = stage.provider.refresh(stage.app, Grant("client_credentials"), wire=stage.wire())
    assert isinstance(outcome, Granted)
    assert outcome.refresh_token is None


def test_wrong_secrets_do_not_count_as_revoked(httpserver: HTTPServer) -> None:
    """A revocation the client may not ask for is tried again, until an operator has put it right."""
    stage = PlainStage(Silent(), httpserver)
    grant = grant_of(stage.connect())
    assert stage.provider.revoke(stage.with_secrets("wrong"), grant, wire=stage.wire()) == "retry"
    assert stage.provider.uninstall(stage.app, Secret("a"), wire=stage.wire()) == "impossible"


@pytest.mark.parametrize(
    ("status", "body", "result"),
    [
        (503, "", "retry"),
        (400, '{"error": "unsupported_token_type"}', "impossible"),
        (400, '{"error": "invalid_grant"}', "done"),
        (404, "", "retry"),
        (405, "<html>", "retry"),
        (410, "", "retry"),
        (404, '{"error": "not_found"}', "retry"),
        (400, '{"error": "never_heard_of"}', "retry"),
        (400, '{"error": "unauthorized_client"}', "retry"),
        (403, "<html>", "retry"),
    ],
)
def test_revocation_answers(httpserver: HTTPServer, status: int, body: str, result: str) -> None:
    """Each answer to a revocation is done, worth another try, or never going to work."""
    stage = PlainStage(Silent(), httpserver)
    grant = grant_of(stage.connect())
    httpserver.expect_request("/odd").respond_with_data(body, status)
    app_ = replace(stage.app, options={**stage.app.options, "revoke_endpoint": httpserver.url_for("/odd")})
    assert stage.provider.revoke(app_, grant, wire=stage.wire(app_)) == result


@pytest.mark.parametrize(
    ("status", "body", "raised"),
    [
        (500, "oops", ProviderUnavailable),
        (503, "", ProviderUnavailable),
        (429, "", ProviderRateLimited),
        (401, '{"error": "invalid_client"}', ProviderMisconfigured),
        (200, '{"active": false}', ProviderUnavailable),
        (200, "[]", ProviderUnavailable),
    ],
)
def test_introspection_that_does_not_tell(
    httpserver: HTTPServer, status: int, body: str, raised: type[Exception]
) -> None:
    """An account is never guessed: each way of not telling raises what it is."""
    stage = PlainStage(Silent(), httpserver)
    granted = stage.connect()
    httpserver.expect_request("/odd").respond_with_data(body, status)
    app_ = replace(
        stage.app, options={**stage.app.options, "introspect_endpoint": httpserver.url_for("/odd")}
    )
    with pytest.raises(raised):
        stage.provider.identify(app_, granted, wire=stage.wire(app_))


def test_userinfo_that_cannot_be_reached_is_unavailable(httpserver: HTTPServer) -> None:
    """Nobody listening at UserInfo names nobody."""
    stage = PlainStage(Silent(), httpserver)
    granted = stage.connect()
    endpoints = {"userinfo_endpoint": closed_port_url(), "introspect_endpoint": ""}
    app_ = replace(stage.app, options={**stage.app.options, **endpoints})
    with pytest.raises(ProviderUnavailable):
        stage.provider.identify(app_, granted, wire=stage.wire(app_))


def test_account_in_the_token_answer_needs_no_second_question(httpserver: HTTPServer) -> None:
    """A server that names the account beside the token is believed, a number like a text."""
    stage = PlainStage(Silent(), httpserver)
    granted = replace(stage.connect(), extras={"sub": 4711}, scopes=None)
    account = stage.provider.identify(stage.app, granted, wire=stage.wire())
    assert account.identity == stage.provider.identity_of(stage.app, "4711", "") == "4711"
    assert account.scopes == stage.app.scopes


def test_public_client_sends_its_id_alone(httpserver: HTTPServer) -> None:
    """Without a client secret there is no Authorization header and no empty secret."""
    stage = PlainStage(Silent(), httpserver)
    stage.server.secrets = [None]
    stage.app = stage.with_secrets()
    assert isinstance(refresh(stage, stage.connect()), Granted)
    with pytest.raises(InvalidRequest, match="secret"):
        stage.provider.check_grant(stage.app, Grant("client_credentials"))


def test_basic_credentials_survive_any_character(httpserver: HTTPServer) -> None:
    """Both halves are form-encoded before they are joined (RFC 6749 §2.3.1)."""
    stage = PlainStage(Silent(), httpserver)
    stage.server.secrets = ["p:ä s+s%"]
    stage.app = stage.with_secrets("p:ä s+s%")
    assert isinstance(refresh(stage, stage.connect()), Granted)


@pytest.mark.parametrize(
    "address",
    [
        "https://[::1",
        "ftp://id.example.com",
        "https://",
        "https://u:p@id.example.com",
        "https://id.example.com/#x",
        "x",
    ],
)
def test_address_that_is_no_servers_is_refused(address: str) -> None:
    """An option that is an address is checked when it is given, not when it is used."""
    with pytest.raises(InvalidRequest, match="token_endpoint"):
        Silent().load_options({"token_endpoint": address})
