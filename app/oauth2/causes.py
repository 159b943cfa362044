"""Why a token request brought no token: the causes behind the codes, whose fault each is, who mends it and how.

A code (`outcomes`) says what the provider answered; several causes may stand behind one code. Here are the causes that
any OAuth client can meet and what to do about them in general. A vendor's file says which of them stand behind its codes,
the likeliest first, and words of its own where its set-up pages are called something else.

`{title}` in a text is the vendor's name, `{admin}` who administers the account there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

__all__ = ["BEHIND", "FAULTS", "REMEDIES", "Cause", "Fault", "Remedy"]


class Fault(StrEnum):
    """Whose fault it is, which decides who is called at night."""

    NONE = "none"  # nothing is wrong
    CONNECTION = "connection"  # this one account's grant or settings
    APP = "app"  # the OAuth client as it is registered, for all its connections
    OUTAGE = "outage"  # the provider, for now
    OWN = "own"  # this installation: network, clock, disk, keys


class Cause(StrEnum):
    """What may stand behind a code."""

    # connection
    APP_UNINSTALLED = "app_uninstalled"
    GRANT_REVOKED = "grant_revoked"
    USER_INACTIVE = "user_inactive"
    ACCOUNT_INACTIVE = "account_inactive"
    ACCOUNT_GONE = "account_gone"
    ACCOUNT_MOVED = "account_moved"
    ACCOUNT_CHANGED = "account_changed"
    APPROVALS_EXCEEDED = "approvals_exceeded"
    IDLE_EXPIRED = "idle_expired"
    TOKEN_POLICY = "token_policy"  # noqa: S105 - the name of a cause
    CREDENTIALS_CHANGED = "credentials_changed"
    LOST_ANSWER = "lost_answer"
    USED_ELSEWHERE = "used_elsewhere"
    OTHER_CLIENT = "other_client"
    USER_NOT_APPROVED = "user_not_approved"
    RUN_AS_USER = "run_as_user"
    ADDRESS_NOT_ALLOWED = "address_not_allowed"
    APP_BLOCKED = "app_blocked"
    ACCESS_DENIED = "access_denied"
    NO_REFRESH_TOKEN = "no_refresh_token"  # noqa: S105 - the name of a cause
    KEY_UNUSABLE = "key_unusable"
    UNRECOGNISED = "unrecognised"
    # app
    CLIENT_SECRET_REFUSED = "client_secret_refused"  # noqa: S105 - the name of a cause
    CLIENT_UNKNOWN = "client_unknown"
    CLIENT_SWAPPED = "client_swapped"
    APP_TOKENS_REVOKED = "app_tokens_revoked"
    REDIRECT_MISMATCH = "redirect_mismatch"
    GRANT_TYPE_OFF = "grant_type_off"
    SCOPE_REFUSED = "scope_refused"
    REQUEST_REFUSED = "request_refused"
    VERIFIER_REFUSED = "verifier_refused"
    CERTIFICATE_REFUSED = "certificate_refused"
    WRONG_AUDIENCE = "wrong_audience"
    MY_DOMAIN_REQUIRED = "my_domain_required"
    WRONG_ENDPOINT = "wrong_endpoint"
    UNRECOGNISED_ALIKE = "unrecognised_alike"
    # outage
    PROVIDER_DOWN = "provider_down"
    PROVIDER_UNREACHABLE = "provider_unreachable"
    RATE_LIMITED = "rate_limited"
    ANSWER_MISSING = "answer_missing"
    ANSWER_UNREADABLE = "answer_unreadable"
    ACCOUNT_MOVING = "account_moving"
    BUSY = "busy"
    MASS_REFUSAL = "mass_refusal"
    # own
    NETWORK_BLOCKED = "network_blocked"
    TLS_INTERCEPTED = "tls_intercepted"
    ADDRESS_FORBIDDEN = "address_forbidden"
    EGRESS_CHANGED = "egress_changed"
    CLOCK_WRONG = "clock_wrong"
    TOO_SLOW = "too_slow"
    PROGRAM_FAULT = "program_fault"


@dataclass(frozen=True, slots=True)
class Remedy:
    """One plain sentence on what is wrong, who can mend it, and how."""

    sentence: str
    who: str
    how: str

    def named(self, *, title: str, admin: str) -> Remedy:
        """The same with the vendor's name and its admin's title put in."""
        fill = {"title": title, "admin": admin}
        sentence, who, how = (text.format_map(fill) for text in (self.sentence, self.who, self.how))
        return Remedy(sentence[:1].upper() + sentence[1:], who, how)


_ADMIN: Final = "{admin}"
_YOU: Final = "you, in Drawbridge's app settings and on the app's page at {title}"
_PROVIDER: Final = "{title}"
_OPERATOR: Final = "the operator of this installation"
_NOBODY: Final = "nobody: it passes by itself"
_AGAIN: Final = (
    "Connect the account again: on the admin page, or send a link made with `drawbridge connection link`."
)
_WAIT: Final = (
    "Nothing needs doing: it is asked again by itself, and what still lives is handed out meanwhile."
)

_CONNECTION: Final = {
    Cause.APP_UNINSTALLED: Remedy("The app was removed from the account at {title}.", _ADMIN, _AGAIN),
    Cause.GRANT_REVOKED: Remedy(
        "Somebody revoked the approval at {title}.",
        _ADMIN,
        f"Ask whether that was meant. {_AGAIN}",
    ),
    Cause.USER_INACTIVE: Remedy(
        "The user who approved the app is inactive at {title}.",
        _ADMIN,
        "Activate the user again, or connect the account again as another user, best an integration user.",
    ),
    Cause.ACCOUNT_INACTIVE: Remedy(
        "The account itself is inactive or locked at {title}.",
        _ADMIN,
        "Have the account activated at {title}; the connection then goes on by itself.",
    ),
    Cause.ACCOUNT_GONE: Remedy(
        "{title} does not know the account any more: it was deleted, or the app was disconnected from it.",
        _ADMIN,
        f"If the account still exists: {_AGAIN} If not: `drawbridge connection disconnect`.",
    ),
    Cause.ACCOUNT_MOVED: Remedy(
        "The account was moved at {title} and the approval did not move with it.", _ADMIN, _AGAIN
    ),
    Cause.ACCOUNT_CHANGED: Remedy(
        "The answer was for another account than the one connected here; its token was not stored.",
        _ADMIN,
        "Connect what answers now as a new connection, then disconnect this one.",
    ),
    Cause.APPROVALS_EXCEEDED: Remedy(
        "Later approvals of the same user for the same app pushed this one out.",
        _ADMIN,
        f"Give each installation (development, staging, production) a user or an app of its own. {_AGAIN}",
    ),
    Cause.IDLE_EXPIRED: Remedy(
        "The refresh token was not used for longer than {title} allows.",
        _ADMIN,
        f"{_AGAIN} Keep a worker running: it uses idle connections in time.",
    ),
    Cause.TOKEN_POLICY: Remedy(
        "The token or session policy set at {title} ended the refresh token.",
        _ADMIN,
        f"Let refresh tokens live until they are revoked, or until they are idle for long. {_AGAIN}",
    ),
    Cause.CREDENTIALS_CHANGED: Remedy(
        "The password of the user who approved the app was changed or has expired, and that ended the approval.",
        _ADMIN,
        f"{_AGAIN} An integration user whose password does not expire prevents the next time.",
    ),
    Cause.LOST_ANSWER: Remedy(
        "An answer of {title} was lost on its way; it held the only good refresh token.", _ADMIN, _AGAIN
    ),
    Cause.USED_ELSEWHERE: Remedy(
        "Another program uses the same refresh token; where tokens rotate, that revokes them all.",
        "the operator of that other program",
        f"Stop the other one: a copy of this database, or whatever held these tokens before. {_AGAIN}",
    ),
    Cause.OTHER_CLIENT: Remedy(
        "The refresh token was issued to another client id than the one it was presented with.",
        "you, in Drawbridge's app settings",
        "Import the connection under the app it was made with, or connect the account again through this app.",
    ),
    Cause.USER_NOT_APPROVED: Remedy(
        "The user this connection acts for is not approved for the app.",
        _ADMIN,
        "Approve the app for the user at {title}; the connection then goes on by itself.",
    ),
    Cause.RUN_AS_USER: Remedy(
        "The app has no usable user to run as in that account.",
        _ADMIN,
        "Set an active user for the client credentials flow in the app's policies.",
    ),
    Cause.ADDRESS_NOT_ALLOWED: Remedy(
        "The account does not allow requests from the address of this installation.",
        _ADMIN,
        "Allow this installation's outgoing address there; the connection then goes on by itself.",
    ),
    Cause.APP_BLOCKED: Remedy(
        "The account's admin has blocked the app, or never installed it.",
        _ADMIN,
        "Install or unblock the app in the account; the connection then goes on by itself.",
    ),
    Cause.ACCESS_DENIED: Remedy(
        "{title} denies the app access to this account.",
        _ADMIN,
        "Look at the app's settings in the account, then connect it again if it does not go on by itself.",
    ),
    Cause.NO_REFRESH_TOKEN: Remedy(
        "The connection has no refresh token: it was imported without one, or {title} gave none.",
        "you, in Drawbridge",
        f"Look whether the app asks for the scope that brings refresh tokens. {_AGAIN}",
    ),
    Cause.KEY_UNUSABLE: Remedy(
        "No assertion can be signed: the connection lacks its user or a usable RSA private key.",
        "you, in Drawbridge",
        "Disconnect it and add it again with `drawbridge connection add … --subject … --key-file …`.",
    ),
    Cause.UNRECOGNISED: Remedy(
        "{title} refuses this connection's request for a reason we do not know; nothing is marked dead for it.",
        _ADMIN,
        "See in the account at {title} whether user, account and app are in order there; if all is well, report the "
        "code. It is asked again by itself.",
    ),
}

_APP: Final = {
    Cause.CLIENT_SECRET_REFUSED: Remedy(
        "{title} refuses every client secret we have: it was rotated there.",
        _YOU,
        "Copy the present secret from the app's page: `drawbridge app rotate`, or the setting …_CLIENT_SECRET. "
        "No connection is lost.",
    ),
    Cause.CLIENT_UNKNOWN: Remedy(
        "{title} does not know the client id: it is mistyped, or the app was deleted.",
        _YOU,
        "Compare the client id with the app's page. No connection is lost while the app exists.",
    ),
    Cause.CLIENT_SWAPPED: Remedy(
        "The app's client id was exchanged for another: the refresh tokens belong to the one before.",
        _YOU,
        "Put the old client id back, and add the new one as an app of its own: `drawbridge app add`.",
    ),
    Cause.APP_TOKENS_REVOKED: Remedy(
        "All tokens of the app were revoked at once, as when its key and secret are replaced or it is deleted.",
        _YOU,
        "See on the app's page what was changed; then every account must be connected again.",
    ),
    Cause.REDIRECT_MISMATCH: Remedy(
        "The redirect address is not registered on the app's page at {title}.",
        _YOU,
        "Register PUBLIC_URL + /connect/…/callback there, to the letter.",
    ),
    Cause.GRANT_TYPE_OFF: Remedy(
        "The app may not use this kind of grant at {title}, or it is switched off.",
        _YOU,
        "Switch the flow on in the app's settings at {title}.",
    ),
    Cause.SCOPE_REFUSED: Remedy(
        "{title} does not give the app the scopes it asks for.",
        _YOU,
        "Make the scopes here and on the app's page the same.",
    ),
    Cause.REQUEST_REFUSED: Remedy(
        "{title} finds the request malformed.", _YOU, "Look at the app's options: `drawbridge app list`."
    ),
    Cause.VERIFIER_REFUSED: Remedy(
        "{title} refuses the PKCE verifier.", _YOU, "Switch the app's option pkce off, or report this."
    ),
    Cause.CERTIFICATE_REFUSED: Remedy(
        "{title} does not accept the signed assertion: the certificate at the app has expired, "
        "or is not the one of the private key here.",
        _YOU,
        "Upload a valid certificate of this private key to the app, or add the connection again with the new key.",
    ),
    Cause.WRONG_AUDIENCE: Remedy(
        "{title} refuses the audience of the assertion.",
        "you, in Drawbridge's app settings",
        "Set the app's option jwt_audience to the login host of the account, or correct its login_url.",
    ),
    Cause.MY_DOMAIN_REQUIRED: Remedy(
        "This grant works at the account's own domain only, not at a shared login host.",
        "you, in Drawbridge's app settings",
        "Set the app's option login_url to the account's own domain.",
    ),
    Cause.WRONG_ENDPOINT: Remedy(
        "There is no usable token endpoint at the configured address.",
        "you, in Drawbridge's app settings",
        "Correct the app's address options: `drawbridge app list` shows them.",
    ),
    Cause.UNRECOGNISED_ALIKE: Remedy(
        "{title} refuses many connections of the app for a reason we do not know; nothing is marked dead for it.",
        _YOU,
        "Look at {title}'s status page and at the app's page there; if all is well, report the code.",
    ),
}

_OUTAGE: Final = {
    Cause.PROVIDER_DOWN: Remedy("{title} answers that it cannot serve right now.", _PROVIDER, _WAIT),
    Cause.PROVIDER_UNREACHABLE: Remedy(
        "{title}'s token endpoint cannot be reached, while other hosts can.", _PROVIDER, _WAIT
    ),
    Cause.RATE_LIMITED: Remedy(
        "{title} asks us to slow down.",
        _NOBODY,
        f"{_WAIT} If it stays, lower the app's option max_refreshes_per_second.",
    ),
    Cause.ANSWER_MISSING: Remedy(
        "{title} took the request and gave no complete answer in time.", _PROVIDER, _WAIT
    ),
    Cause.ANSWER_UNREADABLE: Remedy(
        "{title}, or something in front of it, answered with a page instead of a token answer.",
        _PROVIDER,
        f"{_WAIT} If it stays, look for a proxy between this installation and {{title}}.",
    ),
    Cause.ACCOUNT_MOVING: Remedy(
        "{title} is moving the account to another place, or asks the wrong one of its regions.",
        _PROVIDER,
        "Nothing needs doing: it is asked again by itself; such a move may take a day.",
    ),
    Cause.BUSY: Remedy(
        "{title} is already processing a request with the same refresh token.", _NOBODY, _WAIT
    ),
    Cause.MASS_REFUSAL: Remedy(
        "{title} refuses many connections of the app at once, which points at {title} or at the app, not at them.",
        _PROVIDER,
        "Look at {title}'s status page before connecting anything again; no connection is marked for an hour.",
    ),
}

_OWN: Final = {
    Cause.NETWORK_BLOCKED: Remedy(
        "This installation does not get out to {title}: name resolution, a firewall or the egress stands in the way.",
        _OPERATOR,
        "On the host named below try to reach {title} with curl; look at DNS, firewall and egress rules.",
    ),
    Cause.TLS_INTERCEPTED: Remedy(
        "The certificate shown is not {title}'s: a proxy breaks TLS open, or the authorities of this host are too old.",
        _OPERATOR,
        "Exempt {title} from TLS inspection, or update the host's certificate authorities. Nothing was sent.",
    ),
    Cause.ADDRESS_FORBIDDEN: Remedy(
        "The provider's name leads to an address that must not be asked, such as one inside this network.",
        _OPERATOR,
        "Correct the host's name resolution, or the app's address options.",
    ),
    Cause.EGRESS_CHANGED: Remedy(
        "Several accounts refuse the address of this installation at once: its outgoing address has changed.",
        _OPERATOR,
        "Restore the outgoing address, or give the new one to the admins of these accounts.",
    ),
    Cause.CLOCK_WRONG: Remedy(
        "The clocks of this installation disagree; what is signed with a wrong time is refused.",
        _OPERATOR,
        "Let NTP keep the clock of the database's host and of every other host.",
    ),
    Cause.TOO_SLOW: Remedy(
        "A process of this installation was too slow or frozen, so that its right to refresh ran out unsent.",
        _OPERATOR,
        "Look at the host's load and memory. Nothing was sent; it is tried again by itself.",
    ),
    Cause.PROGRAM_FAULT: Remedy(
        "A fault of this program stopped the refresh.",
        _OPERATOR,
        "Find the event broker:refresh:crashed in the log and report it.",
    ),
}

FAULTS: Final[Mapping[Cause, Fault]] = MappingProxyType(
    dict.fromkeys(_CONNECTION, Fault.CONNECTION)
    | dict.fromkeys(_APP, Fault.APP)
    | dict.fromkeys(_OUTAGE, Fault.OUTAGE)
    | dict.fromkeys(_OWN, Fault.OWN)
)
REMEDIES: Final[Mapping[Cause, Remedy]] = MappingProxyType(_CONNECTION | _APP | _OUTAGE | _OWN)

_REFUSED: Final = (
    Cause.GRANT_REVOKED,
    Cause.TOKEN_POLICY,
    Cause.USED_ELSEWHERE,
    Cause.LOST_ANSWER,
    Cause.APP_TOKENS_REVOKED,
)
_DOWN: Final = (Cause.PROVIDER_DOWN,)
_NO_ANSWER: Final = (Cause.ANSWER_MISSING,)
_NO_WAY: Final = (Cause.NETWORK_BLOCKED, Cause.PROVIDER_UNREACHABLE)
_NOBODY_THERE: Final = (Cause.PROVIDER_UNREACHABLE, Cause.NETWORK_BLOCKED)

# Which causes stand behind a code, the likeliest first. Looked up as "kind:code", then "code", then "kind:".
BEHIND: Final[Mapping[str, tuple[Cause, ...]]] = MappingProxyType(
    {
        "refused:": _REFUSED,
        "no_refresh_token": (Cause.NO_REFRESH_TOKEN,),
        "account_changed": (Cause.ACCOUNT_CHANGED,),
        "lost_answer": (Cause.LOST_ANSWER,),
        "misconfigured:": (Cause.UNRECOGNISED, Cause.UNRECOGNISED_ALIKE),
        "access_denied": (Cause.ACCESS_DENIED,),
        "assertion_failed": (Cause.KEY_UNUSABLE,),
        "bad_request": (Cause.WRONG_ENDPOINT,),
        "bad_url": (Cause.WRONG_ENDPOINT,),
        "client_id_unknown": (Cause.CLIENT_UNKNOWN,),
        "client_secret_refused": (Cause.CLIENT_SECRET_REFUSED,),
        "code_verifier_refused": (Cause.VERIFIER_REFUSED,),
        "invalid_client": (Cause.CLIENT_SECRET_REFUSED, Cause.CLIENT_UNKNOWN),
        "invalid_request": (Cause.REQUEST_REFUSED,),
        "invalid_scope": (Cause.SCOPE_REFUSED,),
        "not_https": (Cause.WRONG_ENDPOINT,),
        "nothing_to_refresh": (Cause.NO_REFRESH_TOKEN,),
        "redirect_uri_mismatch": (Cause.REDIRECT_MISMATCH,),
        "unauthorized_client": (Cause.GRANT_TYPE_OFF,),
        "unsupported_grant_type": (Cause.GRANT_TYPE_OFF,),
        "wrong_endpoint": (Cause.WRONG_ENDPOINT,),
        "rate_limited:": (Cause.RATE_LIMITED,),
        "rate_limited": (Cause.RATE_LIMITED,),
        "unavailable:": _DOWN,
        "busy": (Cause.BUSY, Cause.USED_ELSEWHERE),
        "unknown:": _NO_ANSWER,
        "http_error": _DOWN,
        "internal": (Cause.PROGRAM_FAULT,),
        "malformed": (Cause.ANSWER_UNREADABLE,),
        "no_token": (Cause.ANSWER_UNREADABLE,),
        "not_json": (Cause.ANSWER_UNREADABLE,),
        "oversized": (Cause.ANSWER_UNREADABLE,),
        "redirect": (Cause.ANSWER_UNREADABLE, Cause.WRONG_ENDPOINT),
        "server_error": _DOWN,
        "token_type": (Cause.ANSWER_UNREADABLE,),
        "unexpected_status": (Cause.ANSWER_UNREADABLE,),
        "not_sent:": _NOBODY_THERE,
        "abandoned": (Cause.TOO_SLOW,),
        "address_not_allowed": (Cause.ADDRESS_FORBIDDEN,),
        "dns": _NO_WAY,
        "host_not_allowed": (Cause.ADDRESS_FORBIDDEN,),
        "loopback": (Cause.ADDRESS_FORBIDDEN,),
        "tls_untrusted": (Cause.TLS_INTERCEPTED, Cause.PROVIDER_UNREACHABLE),
        "unreachable": _NO_WAY,
    }
)
