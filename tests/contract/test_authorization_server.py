"""POST /oauth/token over both databases: what is issued, what is refused, and what it looks like."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jws, jwt
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey
from pytest_httpserver import HTTPServer
from werkzeug import Response

from app.access.authorization_server import TokenRequest, TokenResponse
from app.access.callers import Added
from app.access.permissions import Action
from app.errors import Unauthenticated
from app.secret import Secret
from tests.access_stage import ISSUER, Stage, basic, stage
from tests.contract.audit_outage import bring_back, take_away

FORM = "application/x-www-form-urlencoded"
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
GRANT = {"grant_type": "client_credentials"}
Sign = Callable[..., str]


@pytest.fixture
def one(database_url: str, tmp_path: Path) -> Iterator[Stage]:
    """Give one process's stage."""
    with stage(database_url, tmp_path / "state", outage_grace=0.0) as found:
        yield found


@pytest.fixture
def crm(one: Stage) -> Added:
    """Give a caller with a secret and two permissions."""
    return one.add("crm", "token:issue@hubspot-*", "connection:read@*")


@pytest.fixture
def key() -> ECKey:
    """Give a caller's private key."""
    return ECKey.generate_key("P-256", {"kid": "k1"}, private=True)


@pytest.fixture
def signer(one: Stage, key: ECKey) -> Added:
    """Give a caller that signs."""
    return one.add("signer", "token:issue@*", jwks={"keys": [key.as_dict(private=False)]})


@pytest.fixture
def sign(one: Stage, signer: Added, key: ECKey) -> Sign:
    """Make assertions, good unless told otherwise."""
    count = iter(range(10_000))

    def sign(*, by: Key = key, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
        now = int(one.clock.timestamp())
        id_ = signer.caller.client_id
        good = {
            "iss": id_,
            "sub": id_,
            "aud": f"{ISSUER}/oauth/token",
            "exp": now + 60,
            "jti": f"j{next(count)}",
        }
        settled = {name: value for name, value in (good | claims).items() if value is not None}
        chosen = {"alg": "ES256", "kid": "k1"} | dict(header or {})
        chosen = {name: value for name, value in chosen.items() if value is not None}
        algorithms = [str(chosen["alg"])]
        return jwt.encode(chosen, settled, by, algorithms=algorithms)

    return sign


def ask(
    one: Stage, form: Mapping[str, str] | bytes, *, header: str | None = None, **options: Any
) -> tuple[int, dict[str, Any], TokenResponse]:
    """Send one request to the token endpoint; status, decoded body, whole answer."""
    body = form if isinstance(form, bytes) else urlencode(form).encode()
    headers = {"Content-Type": FORM} | ({} if header is None else {"Authorization": header})
    settled: dict[str, Any] = {"method": "POST", "headers": headers, "body": body} | options
    answer = one.server.respond(TokenRequest(**settled))
    return answer.status, json.loads(answer.body), answer


def assertion(text: str) -> dict[str, str]:
    """Make the form of a private_key_jwt request."""
    return GRANT | {"client_assertion_type": ASSERTION_TYPE, "client_assertion": text}


def by_secret(added: Added) -> str:
    """Make the Authorization header of a caller."""
    return basic(added.caller.client_id, added.client_secret)


# ------------------------------------------------------------------------------------------------- what is issued


def test_a_secret_in_the_header_buys_an_rfc_9068_token(one: Stage, crm: Added) -> None:
    """The token says who, for how long and for what, lives fifteen minutes, and is not to be stored."""
    status, body, answer = ask(one, GRANT, header=by_secret(crm))
    assert (status, body["token_type"], body["expires_in"]) == (200, "Bearer", 900)
    assert body["scope"] == "connection:read token:issue"
    assert ("Cache-Control", "no-store") in answer.headers
    parsed = jws.extract_compact(body["access_token"].encode())
    claims = json.loads(parsed.payload)
    header = parsed.headers()
    assert (header["alg"], header["typ"]) == ("ES256", "at+jwt")
    assert (claims["iss"], claims["aud"]) == (ISSUER, ISSUER)
    assert claims["sub"] == claims["client_id"] == crm.caller.client_id
    assert claims["exp"] - claims["iat"] == 900
    published = one.keys.public_jwks()["keys"]
    assert [jwk["kid"] for jwk in published] == [header["kid"]]
    assert all("d" not in jwk for jwk in published)
    caller = one.authentication.authenticate(f"Bearer {body['access_token']}")
    assert (caller.id, caller.scopes) == (crm.caller.id, {Action.TOKEN_ISSUE, Action.CONNECTION_READ})


def test_a_secret_in_the_form_buys_one_too(one: Stage, crm: Added) -> None:
    """client_secret_post."""
    assert crm.client_secret is not None
    form = GRANT | {"client_id": crm.caller.client_id, "client_secret": crm.client_secret.reveal()}
    assert ask(one, form)[0] == 200


def test_issuing_is_on_record_before_the_answer(one: Stage, crm: Added) -> None:
    """The trail says who got a token how; it does not hold the token."""
    _, body, _ = ask(one, GRANT, header=by_secret(crm))
    lines = [line for line in one.trail.export() if "caller_token" in line]
    row = json.loads(lines[0])
    assert (row["actor"], row["detail"]) == ("caller:crm", {"seconds": 900, "way": "client_secret_basic"})
    assert body["access_token"] not in "".join(lines)


def test_fewer_scopes_can_be_asked_for_and_no_others(one: Stage, crm: Added) -> None:
    """A scope beyond the permissions is an error, not silently left out."""
    status, body, _ = ask(one, GRANT | {"scope": "connection:read"}, header=by_secret(crm))
    assert (status, body["scope"]) == (200, "connection:read")
    for scope in ("connection:read sync:write", "admin", "connection:read  nonsense"):
        status, body, _ = ask(one, GRANT | {"scope": scope}, header=by_secret(crm))
        assert (status, body["error"]) == (400, "invalid_scope")


@pytest.mark.parametrize("audience", [ISSUER, f"{ISSUER}/oauth/token", [ISSUER]])
def test_a_signed_assertion_buys_a_token_once(one: Stage, sign: Sign, audience: object) -> None:
    """private_key_jwt, for our issuer or endpoint; the second use of an assertion is refused."""
    text = sign(aud=audience)
    assert ask(one, assertion(text))[0] == 200
    status, body, _ = ask(one, assertion(text))
    assert (status, body["error"]) == (401, "invalid_client")


@pytest.mark.parametrize(
    ("algorithm", "make_key"),
    [
        ("RS256", lambda: RSAKey.generate_key(2048, {"kid": "k1"}, private=True)),
        ("PS256", lambda: RSAKey.generate_key(2048, {"kid": "k1"}, private=True)),
        ("EdDSA", lambda: OKPKey.generate_key("Ed25519", {"kid": "k1"}, private=True)),
        ("Ed25519", lambda: OKPKey.generate_key("Ed25519", {"kid": "k1"}, private=True)),
    ],
)
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")
def test_the_usual_signature_algorithms_are_understood(
    one: Stage, sign: Sign, algorithm: str, make_key: Callable[[], Key]
) -> None:
    """RSA, RSA-PSS and Edwards curves, under the old name and the new."""
    private = make_key()
    published = private.as_dict(private=False) | ({"alg": "EdDSA"} if algorithm == "Ed25519" else {})
    added = one.add("other", "sync:read@*", jwks={"keys": [published]})
    id_ = added.caller.client_id
    text = sign(by=private, header={"alg": algorithm}, iss=id_, sub=id_)
    assert ask(one, assertion(text))[0] == 200


# ------------------------------------------------------------------------------------------------ what is refused


def assert_one_answer(answer: tuple[int, dict[str, Any], TokenResponse]) -> None:
    """Hold a refusal to the single shape all refusals of a client share."""
    status, body, whole = answer
    assert (status, body) == (
        401,
        {"error": "invalid_client", "error_description": "Client authentication failed."},
    )
    assert ("WWW-Authenticate", 'Basic realm="drawbridge", charset="UTF-8"') in whole.headers
    assert ("Cache-Control", "no-store") in whole.headers


def test_unknown_wrong_disabled_and_malformed_clients_are_one_answer(one: Stage, crm: Added) -> None:
    """Nobody learns by trying, and a header that is not UTF-8 is no 500."""
    id_ = crm.caller.client_id
    assert_one_answer(ask(one, GRANT))
    assert_one_answer(ask(one, GRANT, header=basic(id_, "wrong")))
    assert_one_answer(ask(one, GRANT, header=basic("dbc_" + "A" * 22, "wrong")))
    assert_one_answer(ask(one, GRANT, header="Basic //8="))
    assert_one_answer(ask(one, GRANT, header="Bearer abc"))
    assert_one_answer(ask(one, GRANT | {"client_id": id_}))
    assert_one_answer(ask(one, GRANT | {"client_id": id_, "client_secret": "wrong"}))
    assert_one_answer(ask(one, GRANT | {"client_id": "another"}, header=by_secret(crm)))
    one.callers.disable("crm")
    assert_one_answer(ask(one, GRANT, header=by_secret(crm)))


def test_assertions_that_are_not_exactly_right_are_the_same_answer(
    one: Stage, sign: Sign, signer: Added
) -> None:
    """Expiry, life, audience, issuer, subject, id and time are each checked."""
    now = int(one.clock.timestamp())
    for claims in (
        {"exp": now - 31},
        {"exp": now + 400},
        {"exp": None},
        {"exp": "soon"},
        {"exp": float("nan")},
        {"exp": True},
        {"aud": "https://other.example"},
        {"aud": [ISSUER, "https://other.example"]},
        {"aud": []},
        {"aud": None},
        {"iss": "dbc_" + "A" * 22},
        {"iss": None},
        {"sub": "dbc_" + "A" * 22},
        {"jti": None},
        {"jti": ""},
        {"jti": 7},
        {"nbf": now + 300},
        {"iat": now + 300},
        {"iat": "now"},
    ):
        assert_one_answer(ask(one, assertion(sign(**claims))))
    assert_one_answer(ask(one, assertion(sign()) | {"client_id": "dbc_" + "A" * 22}))
    assert_one_answer(ask(one, assertion(sign()) | {"client_assertion_type": "something"}))
    assert ask(one, assertion(sign()) | {"client_id": signer.caller.client_id})[0] == 200


def test_the_assertion_does_not_choose_how_it_is_checked(one: Stage, sign: Sign, key: ECKey) -> None:
    """Neither none, nor HMAC under the public key, nor another key, nor an unknown kid is accepted."""
    other = ECKey.generate_key("P-256", private=True)
    public_as_secret = OctKey.import_key(json.dumps(key.as_dict(private=False)))
    assert_one_answer(ask(one, assertion(sign(by=other))))
    assert_one_answer(ask(one, assertion(sign(header={"kid": "k2"}))))
    assert_one_answer(ask(one, assertion(sign(by=public_as_secret, header={"alg": "HS256"}))))
    head, claims, _ = sign(header={"kid": None}).split(".")
    assert_one_answer(ask(one, assertion(f"eyJhbGciOiJub25lIn0.{claims}.")))
    assert_one_answer(ask(one, assertion(f"{head}.{claims}.")))
    assert ask(one, assertion(sign(header={"kid": None})))[0] == 200


def test_a_caller_with_a_secret_cannot_sign_and_one_that_signs_has_no_secret(
    one: Stage, crm: Added, signer: Added, sign: Sign
) -> None:
    """One way for each caller."""
    id_ = crm.caller.client_id
    assert_one_answer(ask(one, assertion(sign(iss=id_, sub=id_))))
    assert_one_answer(ask(one, GRANT, header=basic(signer.caller.client_id, "")))
    assert signer.client_secret is None


def test_more_than_one_way_of_authentication_is_an_error(one: Stage, crm: Added, sign: Sign) -> None:
    """RFC 6749 §2.3, even when both are right."""
    assert crm.client_secret is not None
    secret = {"client_id": crm.caller.client_id, "client_secret": crm.client_secret.reveal()}
    for form, header in (
        (GRANT | secret, by_secret(crm)),
        (assertion(sign()), by_secret(crm)),
        (assertion(sign()) | secret, None),
    ):
        status, body, _ = ask(one, form, header=header)
        assert (status, body["error"]) == (400, "invalid_request")


def test_malformed_requests_are_told_so(one: Stage, crm: Added) -> None:
    """Method, content type, encoding, size, repeated and missing parameters, unknown grants."""
    header = by_secret(crm)
    good = urlencode(GRANT).encode()
    refused = [
        (ask(one, good, header=header, method="GET"), 405, "invalid_request"),
        (ask(one, good, headers={"Authorization": header}), 400, "invalid_request"),
        (ask(one, good, headers={"content-type": "application/json"}), 400, "invalid_request"),
        (ask(one, good + b"&x=\xff", header=header), 400, "invalid_request"),
        (ask(one, good + b"&x=%ff", header=header), 400, "invalid_request"),
        (ask(one, good + b"&x=" + b"a" * 70_000, header=header), 413, "invalid_request"),
        (ask(one, good + b"&a=1" * 100, header=header), 400, "invalid_request"),
        (ask(one, good + b"&" + good, header=header), 400, "invalid_request"),
        (ask(one, b"", header=header), 400, "invalid_request"),
        (ask(one, {"grant_type": "password"}, header=header), 400, "unsupported_grant_type"),
        (ask(one, {"grant_type": "<script>"}, header=header), 400, "unsupported_grant_type"),
    ]
    for (status, body, _), expected, error in refused:
        assert (status, body["error"]) == (expected, error)
        assert "<script>" not in json.dumps(body)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(body=st.binary(max_size=200), header=st.none() | st.text(max_size=60))
def test_no_request_breaks_the_endpoint(one: Stage, body: bytes, header: str | None) -> None:
    """Whatever comes is answered with an error in the shape of RFC 6749."""
    prefix = b"grant_type=client_credentials&client_assertion_type=x&client_assertion="
    for form in (body, prefix + body.hex().encode()):
        status, answer, _ = ask(one, form, header=header)
        assert status in {400, 401}
        assert answer["error"] in {"invalid_request", "invalid_client", "unsupported_grant_type"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.text(max_size=80)
    | st.binary(max_size=60).map(lambda data: f"eyJhbGciOiJFUzI1NiJ9.{data.hex()}.x")
)
def test_no_token_and_no_assertion_breaks_verification(one: Stage, text: str) -> None:
    """Whatever is called a token raises Unauthenticated and nothing else."""
    with pytest.raises(Unauthenticated):
        one.tokens.verify(Secret(text))


def test_our_own_trouble_is_not_the_callers_fault(one: Stage, crm: Added) -> None:
    """With the database gone the answer is 503 with Retry-After, in the shape of RFC 6749."""
    take_away(one.main)
    one.clock.jump(1)
    status, body, answer = ask(one, GRANT, header=by_secret(crm))
    bring_back(one.main)
    assert (status, body["error"]) == (503, "temporarily_unavailable")
    assert "Retry-After" in dict(answer.headers)


# -------------------------------------------------------------------------------------------------- our tokens


def forged(
    one: Stage, *, by: Key | None = None, header: Mapping[str, Any] | None = None, **claims: Any
) -> str:
    """Make a token of ours with something changed, signed with our key unless told otherwise."""
    key = one.keys.signer()
    now = int(one.clock.timestamp())
    id_ = one.callers.show("crm").caller.client_id
    good = {
        "iss": ISSUER,
        "aud": ISSUER,
        "sub": id_,
        "client_id": id_,
        "caller_version": 1,
        "scope": "token:issue",
        "jti": "j",
        "iat": now,
        "exp": now + 60,
    }
    chosen = {"alg": "ES256", "typ": "at+jwt", "kid": key.kid} | dict(header or {})
    return jwt.encode(chosen, good | claims, by or key, algorithms=[chosen["alg"]], default_type=None)


def test_only_exactly_our_tokens_are_believed(one: Stage, crm: Added) -> None:
    """Type, issuer, audience, expiry, key, algorithm and the version of the caller are each checked."""
    now = int(one.clock.timestamp())
    stranger = ECKey.generate_key("P-256", private=True)
    one.keys.signer()
    public_as_secret = OctKey.import_key(json.dumps(one.keys.public_jwks()))
    bad = [
        forged(one, header={"typ": "JWT"}),
        forged(one, header={"kid": "unknown"}),
        forged(one, by=stranger),
        forged(one, by=public_as_secret, header={"alg": "HS256"}),
        forged(one, iss="https://other.example"),
        forged(one, aud="https://other.example"),
        forged(one, sub="someone"),
        forged(one, exp=now - 1),
        forged(one, exp="never"),
        forged(one, caller_version=2),
        forged(one, client_id=7, sub=7),
    ]
    for token in bad:
        with pytest.raises(Unauthenticated):
            one.authentication.authenticate(f"Bearer {token}")
    assert one.authentication.authenticate(f"Bearer {forged(one)}").name == crm.caller.name


def test_a_token_is_not_believed_beyond_its_expiry(one: Stage, crm: Added) -> None:
    """The cache that makes it cheap does not make it last."""
    _, body, _ = ask(one, GRANT, header=by_secret(crm))
    header = f"Bearer {body['access_token']}"
    one.clock.jump(899)
    one.authentication.authenticate(header)
    one.clock.jump(2)
    with pytest.raises(Unauthenticated):
        one.authentication.authenticate(header)


def test_a_revoked_token_dies_and_its_siblings_live(one: Stage, crm: Added) -> None:
    """Revocation is by token, within a second, on a process that believed it."""
    headers = []
    for _ in range(2):
        _, body, _ = ask(one, GRANT, header=by_secret(crm))
        headers.append(f"Bearer {body['access_token']}")
        one.authentication.authenticate(headers[-1])
    verified = one.tokens.verify(Secret(headers[0].removeprefix("Bearer ")))
    assert one.tokens.revoke(verified)
    assert not one.tokens.revoke(verified)
    one.clock.jump(1)
    with pytest.raises(Unauthenticated):
        one.authentication.authenticate(headers[0])
    one.authentication.authenticate(headers[1])


def test_signing_keys_rotate_and_old_tokens_live_out_their_time(one: Stage, crm: Added) -> None:
    """After thirty days another key signs; a key is swept when nothing can depend on it any more."""
    _, body, _ = ask(one, GRANT, header=by_secret(crm))
    first = one.keys.signer().kid
    assert one.keys.rotate() != first
    one.clock.jump(1)
    second = one.keys.signer().kid
    assert second != first
    one.authentication.authenticate(f"Bearer {body['access_token']}")
    one.clock.jump(30 * 86_400 + 1)
    third = one.keys.signer().kid
    assert third not in {first, second}
    assert {jwk["kid"] for jwk in one.keys.public_jwks()["keys"]} == {first, second, third}
    one.clock.jump(2_000)
    assert one.keys.sweep() == 2
    assert {jwk["kid"] for jwk in one.keys.public_jwks()["keys"]} == {third}


def test_spent_ids_are_forgotten_when_they_no_longer_matter(one: Stage, sign: Sign) -> None:
    """The table does not grow for ever."""
    assert ask(one, assertion(sign()))[0] == 200
    assert one.spent.sweep() == 0
    one.clock.jump(400)
    assert one.spent.sweep() == 1


# ------------------------------------------------------------------------------------------- published keys


def test_published_keys_are_fetched_cached_and_asked_again_for_a_new_kid(
    one: Stage, sign: Sign, key: ECKey, httpserver: HTTPServer
) -> None:
    """A caller rotates its keys where it publishes them; unknown kids do not make us a hammer."""
    fetched = []
    published = {"keys": [key.as_dict(private=False)]}

    def answer(_: Any) -> Any:
        fetched.append(1)
        return Response(json.dumps(published), content_type="application/json")

    httpserver.expect_request("/jwks").respond_with_handler(answer)
    added = one.add("remote", "token:issue@*", jwks_uri=httpserver.url_for("/jwks"))
    me = {"iss": added.caller.client_id, "sub": added.caller.client_id}
    assert ask(one, assertion(sign(**me)))[0] == 200
    assert ask(one, assertion(sign(**me)))[0] == 200
    assert len(fetched) == 1
    renewed = ECKey.generate_key("P-256", {"kid": "k2"}, private=True)
    published["keys"] = [renewed.as_dict(private=False)]
    for _ in range(3):
        assert_one_answer(ask(one, assertion(sign(by=renewed, header={"kid": "k2"}, **me))))
    assert len(fetched) == 1
    one.clock.jump(61)
    assert ask(one, assertion(sign(by=renewed, header={"kid": "k2"}, **me)))[0] == 200
    assert len(fetched) == 2


def test_keys_that_cannot_be_fetched_are_not_the_callers_fault_and_old_ones_serve_a_while(
    one: Stage, sign: Sign, key: ECKey, httpserver: HTTPServer
) -> None:
    """503 while they were never seen; afterwards the last ones seen serve for a day."""
    added = one.add("remote", "token:issue@*", jwks_uri=httpserver.url_for("/jwks"))
    me = {"iss": added.caller.client_id, "sub": added.caller.client_id}
    httpserver.expect_ordered_request("/jwks").respond_with_data("no", status=500)
    httpserver.expect_ordered_request("/jwks").respond_with_json({"keys": [key.as_dict(private=False)]})
    httpserver.expect_ordered_request("/jwks").respond_with_data("no", status=500)
    httpserver.expect_ordered_request("/jwks").respond_with_data("no", status=500)
    status, body, _ = ask(one, assertion(sign(**me)))
    assert (status, body["error"]) == (503, "temporarily_unavailable")
    one.clock.jump(6)
    assert ask(one, assertion(sign(**me)))[0] == 200
    one.clock.jump(3600)
    assert ask(one, assertion(sign(**me)))[0] == 200
    one.clock.jump(86_400)
    assert ask(one, assertion(sign(**me)))[0] == 503
