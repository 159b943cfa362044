"""The words in which Salesforce refuses: OAuth errors with a description, REST errors as an array.

`unpublished` marks texts that no vendor page shows, so that a client must decide on `error` alone there.
"""

from __future__ import annotations

from flask import Response

from emulator.serving import json_response

# name: (status, error, error_description)
PROBLEMS: dict[str, tuple[int, str, str]] = {
    "expired": (400, "invalid_grant", "expired access/refresh token"),
    "busy": (400, "invalid_grant", "token request is already being processed"),
    "busy_2024": (400, "invalid_grant", "expired authorization code"),
    "expired_code": (400, "invalid_grant", "expired authorization code"),
    "invalid_code": (400, "invalid_grant", "invalid authorization code"),  # unpublished
    "bad_verifier": (400, "invalid_grant", "invalid code verifier"),  # unpublished
    "authentication_failure": (400, "invalid_grant", "authentication failure"),
    "audience": (400, "invalid_grant", "Audience validation failed"),
    "not_approved": (400, "invalid_grant", "user hasn't approved this consumer"),
    "bad_assertion": (400, "invalid_grant", "invalid assertion"),  # unpublished
    "expired_assertion": (400, "invalid_grant", "assertion is expired"),  # unpublished
    "ip_restricted": (400, "invalid_grant", "ip restricted"),
    "inactive_user": (400, "invalid_grant", "inactive user"),
    "inactive_org": (400, "invalid_grant", "inactive organization"),
    "no_run_as": (400, "invalid_grant", "no client credentials user enabled"),  # unpublished
    "not_my_domain": (400, "invalid_grant", "request not supported on this domain"),  # unpublished
    "invalid_client": (400, "invalid_client", "invalid client credentials"),
    "invalid_client_id": (400, "invalid_client_id", "client identifier invalid"),
    "unsupported_grant_type": (400, "unsupported_grant_type", "grant type not supported"),
    "redirect_uri_mismatch": (400, "redirect_uri_mismatch", "redirect_uri must match configuration"),
    "invalid_scope": (400, "invalid_scope", "the requested scope is not allowed"),  # unpublished
    "invalid_request": (400, "invalid_request", "missing required parameter"),  # unpublished
    "invalid_token": (400, "invalid_token", "invalid token"),  # unpublished
    "app_blocked": (400, "OAUTH_APP_BLOCKED", "this app is blocked by admin"),  # unpublished
    "rate_limit_exceeded": (400, "rate_limit_exceeded", "too many requests"),  # unpublished
}
# errorCode: (status, message); bodies are arrays
API_PROBLEMS: dict[str, tuple[int, str]] = {
    "INVALID_SESSION_ID": (401, "Session expired or invalid"),
    "REQUEST_LIMIT_EXCEEDED": (403, "TotalRequests Limit exceeded."),
    "SERVER_UNAVAILABLE": (503, "Service temporarily unavailable"),
    "UNSUPPORTED_API_VERSION": (410, "This API version is no longer available"),
    "NOT_FOUND": (404, "The requested resource does not exist"),
    "MALFORMED_QUERY": (400, "unexpected token"),
    "INVALID_TYPE": (400, "sObject type is not supported."),
}


def oauth_problem(name: str, detail: str | None) -> Response:
    """Answer like the OAuth endpoints: error and error_description."""
    status, error, description = PROBLEMS[name]
    return json_response({"error": error, "error_description": detail or description}, status)


def api_problem(name: str, detail: str | None) -> Response:
    """Answer like the REST API: an array of message and errorCode."""
    status, message = API_PROBLEMS[name]
    return json_response([{"message": detail or message, "errorCode": name}], status)
