"""The memory of one vendor: every record under one lock, with the moves that both vendors share.

The rules of a vendor (who may refresh, what a revocation takes along) live with the vendor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from emulator.clock import ShiftedClock
from emulator.ledger import Ledger, Revocation
from emulator.minting import Minter, sha256
from emulator.model import Access, Account, App, Code, Grant

# Enough to prove what a grant handed out; beyond it the oldest tokens are forgotten, as if never issued.
KEPT_ACCESS_TOKENS = 200


# client id, account id, user id
ApprovalKey = tuple[str, str, str]


class Store:
    """Apps, accounts, grants, codes and tokens of one vendor. Callers hold `lock` over compound moves."""

    def __init__(self, clock: ShiftedClock, minter: Minter, *, ledger: Ledger) -> None:
        self.lock = threading.RLock()
        self.apps: dict[str, App] = {}
        self.accounts: dict[str, Account] = {}
        self.grants: dict[str, Grant] = {}
        self._codes: dict[str, Code] = {}
        self._by_refresh: dict[str, Grant] = {}
        self._by_access: dict[str, Access] = {}
        self._approvals: dict[ApprovalKey, list[Grant]] = {}
        self._clock = clock
        self._minter = minter
        self._ledger = ledger

    def open_grant(self, grant: Grant) -> Grant:
        """Keep a new grant and make its refresh token findable."""
        with self.lock:
            self.grants[grant.id] = grant
            if grant.refresh is not None:
                self._by_refresh[sha256(grant.refresh)] = grant
                self._approvals.setdefault(_approval_key(grant), []).append(grant)
            return grant

    def approvals(self, key: ApprovalKey) -> list[Grant]:
        """List the live approvals of one user for one app, oldest first."""
        with self.lock:
            live = [grant for grant in self._approvals.get(key, []) if grant.live]
            self._approvals[key] = live
            return list(live)

    def rotate(self, grant: Grant, fresh: str) -> None:
        """Replace a grant's refresh token; the old one stays known as voided (RFC 9700 section 4.14.2)."""
        with self.lock:
            if grant.refresh is not None:
                grant.voided.add(sha256(grant.refresh))
            grant.refresh = fresh
            grant.rotations += 1
            self._by_refresh[sha256(fresh)] = grant

    def grant_of_refresh(self, token_sha256: str | None) -> Grant | None:
        """Find the grant that a current or voided refresh token belongs to."""
        with self.lock:
            return self._by_refresh.get(token_sha256 or "")

    def add_access(self, grant: Grant, token: str, *, lifetime: float) -> Access:
        """Keep a new access token that lives for `lifetime` seconds."""
        now = self._clock.now()
        access = Access(token, sha256(token), grant.id, now, now + lifetime, lifetime)
        with self.lock:
            grant.access.append(access)
            self._by_access[access.sha256] = access
            for old in grant.access[:-KEPT_ACCESS_TOKENS]:
                del self._by_access[old.sha256]
            del grant.access[:-KEPT_ACCESS_TOKENS]
        return access

    def access(self, token: str) -> Access | None:
        """Find an access token, dead or alive."""
        with self.lock:
            return self._by_access.get(sha256(token))

    def revoke(self, grant: Grant, reason: str, *, with_access: bool) -> None:
        """Kill a grant's refresh token and, if asked, its access tokens; the first reason stays."""
        now = self._clock.now()
        with self.lock:
            if grant.revoked is None:
                grant.revoked, grant.revoked_at = reason, now
                note = Revocation(grant.id, grant.account_id, grant.client_id, now, reason)
                self._ledger.note_revocation(note)
            for access in grant.access if with_access else ():
                if access.revoked is None:
                    access.revoked, access.revoked_at = reason, now

    def add_code(self, code: Code) -> Code:
        """Keep an authorization code."""
        with self.lock:
            self._codes[code.value] = code
            return code

    def code(self, value: str) -> Code | None:
        """Find an authorization code, used or not."""
        with self.lock:
            return self._codes.get(value)

    def matching(self, test: Callable[[Grant], bool]) -> list[Grant]:
        """List the grants that pass `test`, oldest first."""
        with self.lock:
            return [grant for grant in self.grants.values() if test(grant)]

    def users(self) -> Iterator[tuple[Account, str]]:
        """Yield every account with each of its user ids."""
        with self.lock:
            pairs = [(account, user.id) for account in self.accounts.values() for user in account.users]
        yield from pairs

    def forget(self) -> None:
        """Drop every app, account, grant and token."""
        with self.lock:
            records = (
                self.apps, self.accounts, self.grants, self._codes, self._by_refresh, self._by_access,
                self._approvals,
            )  # fmt: skip
            for record in records:
                record.clear()


def _approval_key(grant: Grant) -> ApprovalKey:
    return grant.client_id, grant.account_id, grant.user_id
