"""A handful of records per org, enough for a client to prove that its token opens the REST API.

It understands `SELECT fields|COUNT() FROM Account|Contact [WHERE field = 'value'] [LIMIT n]` and nothing
else.
"""

from __future__ import annotations

import re
from typing import Any

from emulator.minting import with_checksum
from emulator.vendor import RefusedError

PREFIXES = {"Account": "001", "Contact": "003"}
FIELDS = {"Account": ("Id", "Name"), "Contact": ("Id", "LastName", "Email", "AccountId")}
QUERY = re.compile(
    r"\s*SELECT\s+(?P<fields>COUNT\(\)|[\w\s,]+?)\s+FROM\s+(?P<type>\w+)"
    r"(?:\s+WHERE\s+(?P<field>\w+)\s*=\s*'(?P<value>[^']*)')?(?:\s+LIMIT\s+(?P<limit>\d+))?\s*",
    re.IGNORECASE,
)


def records(org_id: str, kind: str) -> list[dict[str, Any]]:
    """List the org's records of a type; ids differ between orgs. RefusedError for a type it does not keep."""
    if kind not in PREFIXES:
        raise RefusedError("INVALID_TYPE", f"sObject type '{kind}' is not supported.")
    ids = [with_checksum(f"{PREFIXES[kind]}{org_id[3:12]}{number:03d}") for number in range(1, 4)]
    if kind == "Account":
        return [{"Id": each, "Name": f"Company {number}"} for number, each in enumerate(ids, 1)]
    accounts = records(org_id, "Account")
    return [
        {
            "Id": each,
            "LastName": f"Person {number}",
            "Email": f"person{number}@customer.example",
            "AccountId": accounts[number - 1]["Id"],
        }
        for number, each in enumerate(ids, 1)
    ]


def query(org_id: str, soql: str, *, version: str) -> dict[str, Any]:
    """Answer a query as /query does; RefusedError with MALFORMED_QUERY when it is beyond us."""
    match = QUERY.fullmatch(soql)
    if match is None:
        raise RefusedError("MALFORMED_QUERY", f"unexpected token in: {soql}")
    kind = match["type"].capitalize()
    found = [
        row
        for row in records(org_id, kind)
        if match["field"] is None or row.get(match["field"]) == match["value"]
    ]
    found = found[: int(match["limit"])] if match["limit"] else found
    if match["fields"].upper() == "COUNT()":
        return {"totalSize": len(found), "done": True, "records": []}
    names = [name.strip() for name in match["fields"].split(",")]
    return {
        "totalSize": len(found),
        "done": True,
        "records": [with_attributes(kind, row, version=version, names=names) for row in found],
    }


def with_attributes(
    kind: str, row: dict[str, Any], *, version: str, names: list[str] | None = None
) -> dict[str, Any]:
    """Return a record the way the REST API shows it."""
    url = f"/services/data/{version}/sobjects/{kind}/{row['Id']}"
    chosen = row if names is None else {name: row.get(name) for name in names}
    return {"attributes": {"type": kind, "url": url}, **chosen}


def described(kind: str) -> dict[str, Any]:
    """Return the head of a type's description."""
    return {"name": kind, "label": kind, "keyPrefix": PREFIXES[kind], "queryable": True, "custom": False}
