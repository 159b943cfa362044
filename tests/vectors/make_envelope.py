"""Make `envelope.json` again without the product's code: an independent reading of the format.

Run it as `python tests/vectors/make_envelope.py` only for a new version of the format; what version 1 says
must stay.
"""

import base64
import json
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CASES = [
    {
        "says": "a token record",
        "kek_id": "k1",
        "kek": bytes(range(32)),
        "data_key": bytes(range(32, 64)),
        "key_nonce": bytes(range(64, 76)),
        "record_nonce": bytes(range(76, 88)),
        "place": {"table": "connections", "column": "sealed", "row_id": "c0ffee", "generation": 7},
        "plaintext": b'{"access_token":"at","refresh_token":"rt"}',
    },
    {
        "says": "nothing at all, under a long name, at the first generation",
        "kek_id": "K" + "x_-9" * 7 + "end",
        "kek": b"\xff" * 31 + b"\x00",
        "data_key": b"\x80" * 32,
        "key_nonce": b"\x00" * 12,
        "record_nonce": b"\xff" * 12,
        "place": {"table": "apps", "column": "secrets", "row_id": "", "generation": 0},
        "plaintext": b"",
    },
    {
        "says": "a row named outside ASCII, at the highest generation",
        "kek_id": "2026-11",
        "kek": bytes(reversed(range(32))),
        "data_key": bytes(reversed(range(32, 64))),
        "key_nonce": b"key-nonce-12",
        "record_nonce": b"rec-nonce-12",
        "place": {"table": "t", "column": "c", "row_id": "Zürich", "generation": 2**63 - 1},
        "plaintext": bytes(range(256)) * 3,
    },
]


def joined(*parts: bytes) -> bytes:
    """Each part after its length in four bytes."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def sealed(case: dict) -> bytes:
    """The record as the format says."""
    place = case["place"]
    row = [place[name].encode() for name in ("table", "column", "row_id")]
    name = case["kek_id"].encode()
    wrapped = AESGCM(case["kek"]).encrypt(
        case["key_nonce"], case["data_key"], joined(b"drawbridge/envelope/1/key", name, *row)
    )
    bound_to = joined(b"drawbridge/envelope/1/record", *row, place["generation"].to_bytes(8, "big"))
    record = AESGCM(case["data_key"]).encrypt(case["record_nonce"], case["plaintext"], bound_to)
    return (
        b"\x01\x01" + bytes([len(name)]) + name + case["key_nonce"] + wrapped + case["record_nonce"] + record
    )


def readable(case: dict) -> dict:
    """Bytes as base64, the sealed record beside what it was made from."""
    whole = case | {"blob": sealed(case)}
    return {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in whole.items()}


if __name__ == "__main__":
    text = json.dumps(
        {"format": 1, "cases": [readable(case) for case in CASES]}, indent=2, ensure_ascii=False
    )
    Path(__file__).with_name("envelope.json").write_text(text + "\n", encoding="utf-8")
