"""The words in which HubSpot refuses: the token endpoint's error table and the bodies of its APIs.

Where HubSpot publishes neither text nor status, the value is marked `unpublished`: a client must not lean on it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Any, Literal

from flask import Response, g

from emulator.clock import iso
from emulator.serving import json_response

ErrorStyle = Literal["old", "new"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One row of the token endpoint's error table."""

    status: int
    error: str
    message: str
    old_message: str | None = None
    old_status: int | None = None


# Statuses and messages as reported; `unpublished` marks what nobody has shown.
VERDICTS: dict[str, Verdict] = {
    "BAD_REFRESH_TOKEN": Verdict(
        400,
        "invalid_grant",
        "refresh token is invalid, expired or revoked",
        old_message="missing or invalid refresh token",
    ),
    # unpublished: status and error
    "MISMATCH_REFRESH_TOKEN_CLIENT": Verdict(
        400, "invalid_grant", "refresh token was not issued to this client"
    ),
    "BAD_HUB": Verdict(400, "access_denied", "missing or unknown hub id", old_status=403),
    "BAD_AUTH_CODE": Verdict(400, "invalid_grant", "missing or unknown auth code"),
    "EXPIRED_AUTH_CODE": Verdict(400, "invalid_grant", "auth code is expired"),  # unpublished: error, message
    "BAD_CLIENT_ID": Verdict(400, "invalid_client", "missing or unknown client id"),
    "BAD_CLIENT_SECRET": Verdict(
        400, "invalid_client", "missing or invalid client secret"
    ),  # unpublished: message
    "BAD_REDIRECT_URI": Verdict(400, "invalid_grant", "redirect uri does not match"),  # unpublished
    "BAD_CODE_VERIFIER": Verdict(400, "invalid_grant", "code verifier does not match"),  # unpublished
    "BAD_SCOPES": Verdict(400, "invalid_scope", "missing or invalid scopes"),  # unpublished
    "BAD_GRANT_TYPE": Verdict(400, "unsupported_grant_type", "missing or invalid grant type"),  # unpublished
    "RATE_LIMIT": Verdict(429, "rate_limited", "You have reached your rate limit."),  # unpublished: error
}
API_PROBLEMS: dict[str, tuple[int, str]] = {
    "INVALID_AUTHENTICATION": (401, "Authentication credentials not found."),
    "EXPIRED_AUTHENTICATION": (401, "The OAuth token used to make this call expired 1 second(s) ago."),
    "MISSING_SCOPES": (403, "This app hasn't been granted all required scopes to make this call."),
    "NOT_INSTALLED": (403, "This app is not installed in this account."),
    "MIGRATING": (477, "This account is being moved to another data centre."),
    "API_RATE_LIMIT": (429, "You have reached your ten_secondly_rolling limit."),
}


def token_problem(name: str, detail: str | None, *, style: ErrorStyle) -> Response:
    """Answer like the token endpoint, in the old style or with the RFC 6749 fields beside it."""
    verdict = _in_style(VERDICTS[name], style)
    message = detail or verdict.message
    body: dict[str, Any] = {"status": name, "message": message, "correlationId": str(uuid.uuid4())}
    if name == "RATE_LIMIT":
        body = {**body, "status": "error", "errorType": "RATE_LIMIT"}
    if style == "new":
        body = {"error": verdict.error, "error_description": message, **body}
    return json_response(body, verdict.status)


def _in_style(verdict: Verdict, style: ErrorStyle) -> Verdict:
    if style == "new":
        return verdict
    message, status = verdict.old_message or verdict.message, verdict.old_status or verdict.status
    return replace(verdict, message=message, status=status)


def api_problem(name: str, detail: str | None, *, now: float) -> Response:
    """Answer like HubSpot's CRM APIs: status, message, correlationId, category, context."""
    status, message = API_PROBLEMS[name]
    correlation = str(uuid.uuid4())
    body: dict[str, Any] = {
        "status": "error", "message": detail or message, "correlationId": correlation, "category": name,
    }  # fmt: skip
    body |= _extra(name, now=now)
    response = json_response(body, status)
    response.headers["X-HubSpot-Correlation-Id"] = correlation
    if status == 401:
        response.headers["X-HubSpot-Auth-Failure"] = "401 Unauthorized"
    if name == "MIGRATING":
        response.headers["Retry-After"] = str(g.get("retry_after", 86400))
    return response


def _extra(name: str, *, now: float) -> dict[str, Any]:
    match name:
        case "EXPIRED_AUTHENTICATION":
            return {"context": {"expire time": [iso(g.get("expired_at", now - 1))]}}
        case "MISSING_SCOPES":
            context = {"requiredGranularScopes": ["oauth"]}
            return {
                "errors": [
                    {"message": "One or more of the following scopes are required.", "context": context}
                ]
            }
        case "NOT_INSTALLED":
            return {"category": "INVALID_AUTHENTICATION"}
        case "API_RATE_LIMIT":
            return {
                "category": "RATE_LIMITS",
                "errorType": "RATE_LIMIT",
                "policyName": "TEN_SECONDLY_ROLLING",
            }
    return {}
