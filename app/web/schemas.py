"""What the API's answers look like, for marshmallow and for the description."""

from __future__ import annotations

import re
from typing import Any, Final

from marshmallow import RAISE, Schema, ValidationError, fields, validate

from app.broker.connection import AdminState, Health, Rotation
from app.oauth2.causes import Fault
from app.web.arguments import NAME_PATTERN

__all__ = [
    "STATES",
    "Connections",
    "DisconnectQuery",
    "DoctorReport",
    "HealthEntry",
    "HealthReport",
    "ListQuery",
    "NoQuery",
    "OneConnection",
    "Possibility",
]

STATES: Final = (
    *(health.value for health in Health),
    AdminState.DISABLED.value,
    AdminState.DISCONNECTING.value,
)
_MOST: Final = 500


def _text(says: str, **more: Any) -> fields.String:
    return fields.String(required=True, metadata={"description": says, **more})


def _moment(says: str) -> fields.DateTime:
    return fields.DateTime(format="iso", required=True, allow_none=True, metadata={"description": says})


class OneConnection(Schema):
    """One linked account; never its tokens."""

    name = _text("Its name, set by an admin.")
    provider = _text("hubspot, salesforce, …")
    app = fields.String(
        required=True, allow_none=True, metadata={"description": "The OAuth client it goes through."}
    )
    account_id = _text("HubSpot portal or Salesforce org.")
    user_id = _text("The user it acts for; empty where the account alone is meant.")
    grant_type = _text("authorization_code, jwt_bearer or client_credentials.")
    state = _text(
        "What an admin wants of it, unless that is `enabled`; then what the last refreshes say.",
        enum=list(STATES),
    )
    generation = fields.Integer(
        required=True, metadata={"description": "Counts every change of the stored tokens.", "minimum": 0}
    )
    expires_at = _moment("When the present access token dies.")
    scopes_wanted = fields.List(fields.String(), required=True, metadata={"description": "Asked for."})
    scopes_granted = fields.List(fields.String(), required=True, metadata={"description": "Given."})
    instance_url = fields.String(
        required=True, allow_none=True, metadata={"description": "Where a Salesforce org is reached."}
    )
    connected_at = _moment("When somebody last went through the provider's consent page.")
    last_refresh_at = _moment("When tokens last came.")
    last_used_at = _moment("When somebody last asked for a token; a few seconds late.")
    last_error = fields.String(
        required=True,
        allow_none=True,
        metadata={"description": "What was wrong at the last refresh, if it failed."},
    )
    last_error_at = _moment("When that was.")
    retry_at = _moment("Not refreshed before then.")

    rotation = fields.String(
        required=True,
        allow_none=True,
        metadata={
            "description": "Whether the provider replaces the refresh token: seen, not_seen or unknown; null without one.",
            "enum": [*(rotation.value for rotation in Rotation), None],
        },
    )
    life_seconds = fields.Float(
        required=True,
        allow_none=True,
        metadata={"description": "How long an access token lives as a whole.", "minimum": 0},
    )
    life_measured = fields.Boolean(
        required=True,
        allow_none=True,
        metadata={"description": "True where the provider told that life, false where it is assumed."},
    )
    idle_days_left = fields.Float(
        required=True,
        allow_none=True,
        metadata={
            "description": "Salesforce: days until a refresh token that nobody uses may die, of 30 from the last refresh; "
            "null where the provider has no such limit or the last use is not known.",
            "minimum": 0,
        },
    )
    approvals_known = fields.Integer(
        required=True,
        allow_none=True,
        metadata={"description": "Salesforce: approvals of this user for this app known here.", "minimum": 0},
    )
    approvals_limit = fields.Integer(
        required=True,
        allow_none=True,
        metadata={"description": "How many may stand; one more pushes the oldest out.", "minimum": 1},
    )
    approvals_warning = fields.String(
        required=True, allow_none=True, metadata={"description": "A sentence when the limit is near."}
    )


class Possibility(Schema):
    """One thing that may be the matter with a connection."""

    fault = _text("Whose fault it is.", enum=[fault.value for fault in Fault])
    cause = _text("What stands behind it, as one word.")
    sentence = _text("The same as a plain sentence.")
    who = _text("Who can mend it.")
    how = _text("How.")
    evidence = fields.List(
        fields.String(), required=True, metadata={"description": "What speaks for it, in sentences."}
    )


class DoctorReport(Possibility):
    """What is the matter with a connection; never its tokens."""

    name = _text("The connection.")
    state = _text("As the connection shows it.", enum=list(STATES))
    healthy = fields.Boolean(required=True, metadata={"description": "Whether nothing is wrong."})
    code = _text("What it was judged by: the last error, or a word of ours.")
    others = fields.List(
        fields.Nested(Possibility),
        required=True,
        metadata={"description": "What else it may be, the likeliest first."},
    )


class Connections(Schema):
    """A page of connections."""

    connections = fields.List(fields.Nested(OneConnection), required=True)
    next = fields.String(
        required=True,
        allow_none=True,
        metadata={"description": "Give it as `after` for the page behind; null at the end."},
    )


class _Strict(Schema):
    class Meta:
        unknown = RAISE


class NoQuery(_Strict):
    """No parameters."""


class _WholeNumber(fields.Integer):
    """Plain digits; the library would take 1_0, +1 and blanks around it as well."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **more: Any) -> int:
        if re.fullmatch(r"0|[1-9][0-9]{0,8}", value) is None:
            raise self.make_error("invalid", input=value)
        return int(value)


class _Switch(fields.Boolean):
    """true or false and no other spelling."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **more: Any) -> bool:
        if value not in ("true", "false"):
            raise ValidationError("is true or false.")
        return bool(value == "true")


def _check_name(value: str) -> None:
    if re.fullmatch(NAME_PATTERN, value) is None:
        raise ValidationError("is no name of a connection.")


class ListQuery(_Strict):
    """Which page."""

    after = fields.String(
        validate=_check_name,
        metadata={
            "description": "Only names behind this one.",
            "pattern": f"^{NAME_PATTERN}$",
            "maxLength": 63,
        },
    )
    limit = _WholeNumber(
        load_default=100,
        validate=validate.Range(1, _MOST, error=f"is not between 1 and {_MOST}."),
        error_messages={"invalid": "is not a whole number."},
        metadata={"description": "At most so many; a page may hold fewer and still have a `next`."},
    )


class DisconnectQuery(_Strict):
    """How to disconnect."""

    uninstall = _Switch(
        load_default=False,
        metadata={
            "description": "Remove the app from the whole account as well, for all its users, where the provider can."
        },
    )


class HealthEntry(Schema):
    """One look at one thing."""

    status = _text("pass, warn or fail.", enum=["pass", "warn", "fail"])
    componentId = fields.String()  # noqa: N815 - the draft's names
    componentType = fields.String()  # noqa: N815
    observedValue = fields.Float()  # noqa: N815
    observedUnit = fields.String()  # noqa: N815
    output = fields.String()


class HealthReport(Schema):
    """draft-inadarei-api-health-check-06."""

    status = _text("The worst of all checks.", enum=["pass", "warn", "fail"])
    version = _text("Of this program.")
    description = _text("What this is.")
    checks = fields.Dict(keys=fields.String(), values=fields.List(fields.Nested(HealthEntry)), required=True)
