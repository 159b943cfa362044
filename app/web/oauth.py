"""Our own authorization server's endpoints: token (RFC 6749 §3.2), keys (RFC 7517) and metadata (RFC 8414)."""

from __future__ import annotations

import json
from typing import Final

from flask import Blueprint, Response, request

from app.access.authorization_server import TokenRequest
from app.access.keysets import ALGORITHMS
from app.access.permissions import Action
from app.web.asking import client_address, services

__all__ = ["blueprint"]

blueprint: Final = Blueprint("oauth", __name__)

_CACHE: Final = "public, max-age=300"


@blueprint.post("/oauth/token")
def issue_token() -> Response:
    """Exchange a caller's credential for a short token of ours; decided by `access` alone."""
    ours = services()
    answer = ours.authorization_server.respond(
        TokenRequest(
            method=request.method,
            headers=dict(request.headers),
            body=request.get_data(),
            address=client_address(request.environ, ours.settings),
        )
    )
    return Response(answer.body, answer.status, headers=list(answer.headers))


@blueprint.get("/oauth/jwks")
def show_keys() -> Response:
    """The public keys our tokens are signed with."""
    return _public(services().signing_keys.public_jwks(), content_type="application/jwk-set+json")


@blueprint.get("/.well-known/oauth-authorization-server")
def show_metadata() -> Response:
    """What there is, and nothing that is not."""
    issuer = services().settings.public_url.rstrip("/")
    return _public(
        {
            "issuer": issuer,
            "token_endpoint": f"{issuer}/oauth/token",
            "jwks_uri": f"{issuer}/oauth/jwks",
            "scopes_supported": [action.value for action in Action],
            "response_types_supported": [],  # RFC 8414 §2 demands it; there is no authorization endpoint
            "grant_types_supported": ["client_credentials"],
            "token_endpoint_auth_methods_supported": [
                "client_secret_basic",
                "client_secret_post",
                "private_key_jwt",
            ],
            "token_endpoint_auth_signing_alg_values_supported": list(ALGORITHMS),
            "service_documentation": f"{issuer}/docs",
        },
        content_type="application/json",
    )


def _public(body: object, *, content_type: str) -> Response:
    return Response(json.dumps(body), content_type=content_type, headers={"Cache-Control": _CACHE})
