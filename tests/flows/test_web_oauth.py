"""Our own authorization server over HTTP: RFC 6749 shapes, keys and metadata that agree with each other."""

from __future__ import annotations

from typing import Any

from joserfc import jwt
from joserfc.jwk import KeySet

from tests.web_stage import PUBLIC_URL, Stage

FORM = {"grant_type": "client_credentials"}
URLENCODED = "application/x-www-form-urlencoded"


def test_a_credential_is_exchanged_for_a_token_that_verifies_with_the_published_keys(
    either_stage: Stage,
) -> None:
    """An ES256 JWT of this issuer, good for 15 minutes, accepted on /v1."""
    answer = either_stage.ask("/oauth/token", method="POST", data=FORM)
    assert answer.status == 200
    assert answer.raw.headers["Cache-Control"] == "no-store"
    body = answer.json
    assert body["expires_in"] <= 900
    keys = either_stage.ask("/oauth/jwks", caller=None)
    assert keys.raw.mimetype == "application/jwk-set+json"
    assert not [key for key in keys.json["keys"] if "d" in key]
    decoded = jwt.decode(body["access_token"], KeySet.import_key_set(keys.json), algorithms=["ES256"])
    assert decoded.claims["iss"] == PUBLIC_URL
    bearer = {"Authorization": f"Bearer {body['access_token']}"}
    assert either_stage.ask("/v1/connections", headers=bearer).status == 200


def test_errors_have_the_shape_of_rfc_6749(stage: Stage) -> None:
    """Whichever layer finds them: a JSON object with `error`, and 401 with a Basic challenge."""
    cases: list[tuple[dict[str, Any], str | None, int, str]] = [
        ({"data": {"grant_type": "password"}}, "caller", 400, "unsupported_grant_type"),
        ({"data": {**FORM, "scope": "everything"}}, "caller", 400, "invalid_scope"),
        (
            {"data": "grant_type=client_credentials&grant_type=x", "content_type": URLENCODED},
            "caller",
            400,
            "invalid_request",
        ),
        ({"json": FORM}, "caller", 400, "invalid_request"),
        ({"data": FORM}, None, 401, "invalid_client"),
        ({"data": b"x" * 70_000, "content_type": URLENCODED}, "caller", 413, "invalid_request"),
    ]
    for sent, caller, status, word in cases:
        answer = stage.ask("/oauth/token", method="POST", caller=caller, **sent)
        assert (answer.status, answer.json["error"]) == (status, word)
        assert answer.raw.mimetype == "application/json"
        assert ("WWW-Authenticate" in answer.raw.headers) is (status == 401)
    wrong_method = stage.ask("/oauth/token")
    assert (wrong_method.status, wrong_method.json["error"]) == (405, "invalid_request")


def test_the_metadata_names_only_what_is_there(stage: Stage) -> None:
    """Every endpoint in it answers, and there is no other."""
    metadata = stage.ask("/.well-known/oauth-authorization-server", caller=None).json
    assert metadata["issuer"] == PUBLIC_URL
    endpoints = {key: value for key, value in metadata.items() if key.endswith(("_endpoint", "_uri"))}
    assert set(endpoints) == {"token_endpoint", "jwks_uri"}
    for url in endpoints.values():
        path = url.removeprefix(PUBLIC_URL)
        assert stage.ask(path, method="OPTIONS").status == 405
    for grant in metadata["grant_types_supported"]:
        assert stage.ask("/oauth/token", method="POST", data={"grant_type": grant}).status == 200
    for path in ("/oauth/introspect", "/oauth/revoke"):
        assert stage.ask(path, method="POST").status == 404
