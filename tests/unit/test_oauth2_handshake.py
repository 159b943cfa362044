"""The secrets of a trip through the browser."""

import re

from app.oauth2 import handshake
from app.secret import Secret


def test_challenge_is_the_published_one() -> None:
    """The verifier of RFC 7636 appendix B gives the challenge printed there."""
    verifier = Secret("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
    assert handshake.challenge(verifier) == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def test_new_values_are_long_and_never_the_same() -> None:
    """State, verifier and browser token carry 256 bits in characters every URL and cookie takes."""
    values = [
        text
        for _ in range(50)
        for text in (
            handshake.new_state(), handshake.new_verifier().reveal(), handshake.new_browser_token().reveal(),
        )
    ]  # fmt: skip
    assert len(set(values)) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{43}", value) for value in values)


def test_browser_is_bound_to_the_provider() -> None:
    """The same cookie gives another digest at another provider, and another cookie another one."""
    token, other = handshake.new_browser_token(), handshake.new_browser_token()
    stored = handshake.browser_hash(token, "hubspot")
    assert handshake.matches(stored, handshake.browser_hash(token, "hubspot"))
    assert not handshake.matches(stored, handshake.browser_hash(token, "salesforce"))
    assert not handshake.matches(stored, handshake.browser_hash(other, "hubspot"))


def test_a_no_is_told_from_a_failure() -> None:
    """Both spellings of a denied consent count, and nothing else does."""
    assert handshake.denied("access_denied")
    assert handshake.denied("access-denied")
    assert not handshake.denied("server_error")
    assert not handshake.denied("")


def test_state_is_stored_as_a_digest() -> None:
    """What the table holds finds the trip and does not finish it; no callback is too strange to compare."""
    state = handshake.new_state()
    assert state not in handshake.state_hash(state)
    assert handshake.matches(handshake.state_hash(state), handshake.state_hash(state))
    assert not handshake.matches(handshake.state_hash(state), handshake.state_hash("\ud800 forged"))
    assert not handshake.matches(handshake.state_hash(state), "\ud800 forged")
