"""A HubSpot and a Salesforce authorization server on loopback, for the demo, the tests and the benches.

Why: real vendors cannot be asked to rotate a token and lose the answer. These can, and they keep count, so
that a test can ask whether a client behaved. They are written from the vendors' documented behaviour alone
and held to it by independent clients.

What it must never know: the product. Nothing here imports it, so that both cannot be wrong in the same way; only
`demo` and its two files, which walk through the product from outside, know its addresses and its commands.

One decision with its price: the vendors speak real HTTP from a threaded development server that closes every
connection after one answer. Broken answers are then really broken on the wire; the price is a few hundred
requests a second at most, and no protection against a hostile network. It is not for exposure.

The map: `process` binds the ports, `serving` is the door every request passes, `faults` what can go wrong
there, `vendor` what both servers share, `hubspot` and `salesforce` the rules, `*_answers` their refusals,
`*_web` their HTTP faces, `ledger` what was received, `control_web` and `control` the way in for tests, `world`
set-up in bulk and for the demo.
"""

from emulator.control import (
    AccessTruth,
    Consent,
    Control,
    ControlError,
    GrantTruth,
    Minted,
    SeenRequest,
    Totals,
    VendorControl,
)
from emulator.process import Emulator, running

__all__ = [
    "AccessTruth",
    "Consent",
    "Control",
    "ControlError",
    "Emulator",
    "GrantTruth",
    "Minted",
    "SeenRequest",
    "Totals",
    "VendorControl",
    "running",
]
