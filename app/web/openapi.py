"""The description of the API (OpenAPI 3.1), and the pages that people read instead of it.

flask-smorest describes its own routes; the hand-out path and the OAuth endpoints are described here by hand. Each documented
constraint is one the code enforces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from flask import Blueprint, Flask, Response, current_app, render_template
from werkzeug.routing import BaseConverter

from app.access.permissions import Action
from app.bootstrap import VERSION
from app.errors import NotFound
from app.web import problems
from app.web.api import Api, error_response
from app.web.arguments import LONGEST_MAX_WAIT, LONGEST_MIN_TTL, NAME_PATTERN

__all__ = ["DOCUMENT", "NameConverter", "begin", "blueprint", "finish"]

DOCUMENT: Final = "drawbridge.openapi"
_VERSION: Final = "3.1.0"
_ABOUT: Final = (
    "Keeps the OAuth tokens of connected HubSpot and Salesforce accounts and hands out valid ones to callers that may have "
    "them. Every request under /v1 carries a caller credential: Basic with client id and secret, or Bearer with a token "
    "from /oauth/token. What is not known is refused: parameters, members and names."
)

blueprint: Final = Blueprint("docs", __name__)


class NameConverter(BaseConverter):
    """A connection's name in a path; anything else is no path of ours."""

    regex = NAME_PATTERN
    part_isolating = True


def begin(app: Flask) -> Api:
    """The API of an application, ready for its blueprints; the name converter is registered with both."""
    app.url_map.converters["name"] = NameConverter
    app.config.update(API_TITLE="Drawbridge", API_VERSION=VERSION, OPENAPI_VERSION=_VERSION)
    api = Api(
        app,
        spec_kwargs={
            "info": {"description": _ABOUT},
            "security": [{"basic": []}, {"bearer": []}],
            "servers": [{"url": "/"}],
        },
    )
    api.register_converter(NameConverter, lambda _: _NAME)
    spec = api.spec
    spec.components.security_scheme(
        "basic", {"type": "http", "scheme": "basic", "description": "Client id and secret."}
    )
    spec.components.security_scheme(
        "bearer",
        {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "From /oauth/token."},
    )
    for name, schema in _SCHEMAS.items():
        spec.components.schema(name, component=schema)
    for status, says in _ERRORS.items():
        spec.components.response(error_response(status), _problem_response(status, says))
    return api


def finish(app: Flask, api: Api) -> None:
    """Add what is described by hand and keep the document."""
    for endpoint, operations in _OPERATIONS.items():
        api.spec.path(rule=next(app.url_map.iter_rules(endpoint)), operations=deepcopy(operations))
    app.extensions[DOCUMENT] = api.spec.to_dict()


@blueprint.get("/openapi.json")
def show_document() -> Response:
    """The description itself."""
    return Response(json.dumps(current_app.extensions[DOCUMENT]), content_type="application/json")


@blueprint.get("/docs")
def show_docs() -> str:
    """The same as a page, without a script and without a foreign host."""
    document = current_app.extensions[DOCUMENT]
    return render_template("docs.html", document=document, operations=list(_operations(document)))


@blueprint.get("/problems")
def show_problems() -> str:
    """Every error code on one page."""
    return render_template("problems.html", kinds=problems.kinds())


@blueprint.get("/problems/<code>")
def show_problem(code: str) -> str:
    """One error code: what `type` of a problem points at."""
    found = [kind for kind in problems.kinds() if kind.code == code]
    if not found:
        raise NotFound("There is no such code.")
    return render_template("problems.html", kinds=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    method: str
    path: str
    summary: str
    description: str
    parameters: tuple[Mapping[str, Any], ...]
    body: Mapping[str, Any]
    responses: tuple[tuple[str, str], ...]


def _operations(document: Mapping[str, Any]) -> Iterator[_Operation]:
    for path, item in document["paths"].items():
        shared = item.get("parameters", [])
        for method in ("get", "post", "delete"):
            if method in item:
                yield _operation(path, method, item[method], shared)


def _operation(path: str, method: str, found: Mapping[str, Any], shared: list[Any]) -> _Operation:
    content = found.get("requestBody", {}).get("content", {})
    body: Mapping[str, Any] = next((kind["schema"].get("properties", {}) for kind in content.values()), {})
    return _Operation(
        method=method.upper(),
        path=path,
        summary=found.get("summary", ""),
        description=found.get("description", ""),
        parameters=(*shared, *found.get("parameters", [])),
        body=body,
        responses=tuple(
            (str(status), _says(answer)) for status, answer in sorted(found["responses"].items())
        ),
    )


def _says(answer: Mapping[str, Any]) -> str:
    reference = answer.get("$ref", "")
    if reference:
        return _ERRORS[int(reference.rpartition("Problem")[2])]
    return str(answer.get("description", ""))


# What is written by hand

_NAME: Final = {"type": "string", "pattern": f"^{NAME_PATTERN}$", "maxLength": 63}

_ERRORS: Final[Mapping[int, str]] = {
    400: "Malformed: an unknown, repeated or impossible parameter.",
    401: "No valid caller credential.",
    403: "The caller may not do this; the same whether the connection exists or not.",
    404: "There is no such thing.",
    405: "The path does not take this method.",
    409: "needs_reconnect, connection_disabled or account_mismatch: an admin must act.",
    413: "The body is too large.",
    415: "The body is not in the format taken here.",
    429: "More requests than the caller's limit.",
    500: "Our own fault; the instance names the incident in the log.",
    503: "Not now: the provider, a refresh under way or this installation. Ask again after Retry-After.",
}
_WAITS: Final = frozenset({429, 503})
_CODES: Final = tuple(kind.code for kind in problems.kinds())

_SCHEMAS: Final[Mapping[str, dict[str, Any]]] = {
    "Problem": {
        "type": "object",
        "description": "RFC 9457.",
        "required": ["type", "title", "status", "detail", "instance", "code", "hint", "retryable"],
        "additionalProperties": False,
        "properties": {
            "type": {"type": "string", "format": "uri-reference", "description": "/problems/{code}, a page."},
            "title": {"type": "string"},
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "detail": {"type": "string"},
            "instance": {
                "type": "string",
                "format": "uri-reference",
                "description": "The path, and the X-Request-ID behind #.",
            },
            "code": {"type": "string", "enum": list(_CODES)},
            "hint": {"type": "string", "description": "Who can do what about it."},
            "retryable": {"type": "boolean", "description": "Whether the same request may succeed later."},
            "retry_after_seconds": {"type": "integer", "minimum": 1},
        },
    },
    "OAuthError": {
        "type": "object",
        "description": "RFC 6749 §5.2.",
        "required": ["error"],
        "properties": {"error": {"type": "string"}, "error_description": {"type": "string"}},
    },
    "Token": {
        "type": "object",
        "required": [
            "access_token",
            "token_type",
            "expires_at",
            "expires_in",
            "scopes",
            "connection",
            "provider",
            "account_id",
            "generation",
        ],
        "additionalProperties": False,
        "properties": {
            "access_token": {"type": "string", "description": "The provider's access token."},
            "token_type": {"type": "string", "const": "Bearer"},
            "expires_at": {"type": "string", "format": "date-time"},
            "expires_in": {"type": "integer", "minimum": 0, "description": "Whole seconds left."},
            "scopes": {"type": "array", "items": {"type": "string"}},
            "connection": {"type": "string"},
            "provider": {"type": "string"},
            "account_id": {"type": "string"},
            "instance_url": {
                "type": "string",
                "format": "uri",
                "description": "Where to call a Salesforce org.",
            },
            "generation": {"type": "integer", "minimum": 1},
        },
    },
}

_MIN_TTL: Final = {"type": "number", "minimum": 0, "maximum": LONGEST_MIN_TTL}
_MAX_WAIT: Final = {"type": "number", "minimum": 0, "maximum": LONGEST_MAX_WAIT}
_SAYS_MIN_TTL: Final = (
    "Seconds the token must still live. Default: 60 or a quarter of its life, whichever is less. More than half its life is "
    "refused with 400, naming the most."
)
_SAYS_MAX_WAIT: Final = "Seconds to wait for a refresh when no living token is left. Default 10."
_SCOPE: Final = "|".join(action.value for action in Action)


def _problem_response(status: int, says: str) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    if status in _WAITS:
        headers["Retry-After"] = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}
    if status == 401:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
    response: dict[str, Any] = {
        "description": says,
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    return response | ({"headers": headers} if headers else {})


def _json(schema: Any, says: str, *, kind: str = "application/json") -> dict[str, Any]:
    return {"description": says, "content": {kind: {"schema": schema}}}


def _refs(*statuses: int) -> dict[str, Any]:
    return {str(status): error_response(status) for status in statuses}


_TOKEN: Final = _json(
    {"$ref": "#/components/schemas/Token"}, "A token that lives at least as long as was asked for."
) | {"headers": {"Cache-Control": {"schema": {"type": "string", "const": "no-store"}}}}
_OAUTH_ERROR: Final = {"$ref": "#/components/schemas/OAuthError"}
_STRINGS: Final = {"type": "array", "items": {"type": "string"}}

_OPERATIONS: Final[Mapping[str, dict[str, Any]]] = {
    "token_get": {  # and token_post, at the same path
        "get": {
            "tags": ["tokens"],
            "operationId": "get_token",
            "summary": "Get a valid access token.",
            "description": "Answers at once while the stored token lives long enough, whatever the provider is doing.",
            "parameters": [
                {"in": "query", "name": "min_ttl", "schema": _MIN_TTL, "description": _SAYS_MIN_TTL},
                {"in": "query", "name": "max_wait", "schema": _MAX_WAIT, "description": _SAYS_MAX_WAIT},
            ],
            "responses": {"200": _TOKEN, **_refs(400, 401, 403, 404, 409, 429, 503)},
        },
        "post": {
            "tags": ["tokens"],
            "operationId": "post_token",
            "summary": "Get a valid access token, another than the one the provider refused.",
            "description": (
                "With `rejected` the token is refreshed only if that is still the current one, at most once in 30 seconds."
            ),
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "min_ttl": {**_MIN_TTL, "description": _SAYS_MIN_TTL},
                                "max_wait": {**_MAX_WAIT, "description": _SAYS_MAX_WAIT},
                                "rejected": {
                                    "type": "string",
                                    "pattern": "^[0-9a-f]{64}$",
                                    "description": "SHA-256 of the access token the provider refused.",
                                },
                            },
                        }
                    }
                },
            },
            "responses": {"200": _TOKEN, **_refs(400, 401, 403, 404, 409, 413, 415, 429, 503)},
        },
    },
    "oauth.issue_token": {
        "post": {
            "tags": ["oauth"],
            "operationId": "get_caller_token",
            "summary": "Exchange a caller's credential for a bearer token of ours, good for 15 minutes.",
            "description": (
                "RFC 6749 §4.4 with client_secret_basic as described here; client_secret_post and private_key_jwt "
                "(RFC 7523) are taken as well, one of them in a request."
            ),
            "security": [{"basic": []}],
            "requestBody": {
                "required": True,
                "content": {
                    "application/x-www-form-urlencoded": {
                        "schema": {
                            "type": "object",
                            "required": ["grant_type"],
                            "properties": {
                                "grant_type": {"type": "string", "const": "client_credentials"},
                                "scope": {
                                    "type": "string",
                                    "pattern": f"^(({_SCOPE})( ({_SCOPE}))*)?$",
                                    "maxLength": 200,
                                    "description": "Actions, between spaces; all the caller has where there is none.",
                                },
                            },
                            # RFC 6749 §3.2: what is not known is ignored, what is repeated is refused.
                            "additionalProperties": {"type": "string"},
                        }
                    }
                },
            },
            "responses": {
                "200": _json(
                    {
                        "type": "object",
                        "required": ["access_token", "token_type", "expires_in", "scope"],
                        "properties": {
                            "access_token": {"type": "string", "description": "A JWT after RFC 9068."},
                            "token_type": {"type": "string", "const": "Bearer"},
                            "expires_in": {"type": "integer", "maximum": 900},
                            "scope": {"type": "string"},
                        },
                    },
                    "A token of ours.",
                ),
                "400": _json(
                    _OAUTH_ERROR, "invalid_request, invalid_scope, unsupported_grant_type or the like."
                ),
                "401": _json(_OAUTH_ERROR, "invalid_client: unknown and wrong look the same."),
                "403": _json(_OAUTH_ERROR, "The caller may not come from that address."),
                "413": _json(_OAUTH_ERROR, "The body is too large."),
                "429": _json(_OAUTH_ERROR, "More requests than the caller's limit."),
                "503": _json(_OAUTH_ERROR, "temporarily_unavailable."),
            },
        }
    },
    "oauth.show_keys": {
        "get": {
            "tags": ["oauth"],
            "operationId": "show_keys",
            "summary": "The public keys our tokens are signed with (RFC 7517).",
            "security": [],
            "responses": {
                "200": _json(
                    {
                        "type": "object",
                        "required": ["keys"],
                        "properties": {"keys": {"type": "array", "items": {"type": "object"}}},
                    },
                    "A set of keys.",
                    kind="application/jwk-set+json",
                ),
                "503": _json(_OAUTH_ERROR, "temporarily_unavailable."),
            },
        }
    },
    "oauth.show_metadata": {
        "get": {
            "tags": ["oauth"],
            "operationId": "show_metadata",
            "summary": "What this authorization server can (RFC 8414).",
            "security": [],
            "responses": {
                "200": _json(
                    {
                        "type": "object",
                        "required": ["issuer", "token_endpoint", "jwks_uri", "response_types_supported"],
                        "properties": {
                            "issuer": {"type": "string", "format": "uri"},
                            "token_endpoint": {"type": "string", "format": "uri"},
                            "jwks_uri": {"type": "string", "format": "uri"},
                            "response_types_supported": _STRINGS,
                            "grant_types_supported": _STRINGS,
                            "scopes_supported": _STRINGS,
                            "token_endpoint_auth_methods_supported": _STRINGS,
                        },
                    },
                    "The metadata.",
                )
            },
        }
    },
}
