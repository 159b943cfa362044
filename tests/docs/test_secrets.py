"""Where a secret may be read in clear."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

# Each of these computes with a secret or sends it to who it is for; a new name here deserves a second look.
MAY_REVEAL: Final = {
    "app/access/authorization_server.py",
    "app/access/signing.py",
    "app/broker/admins.py",
    "app/broker/apps.py",
    "app/broker/connect.py",
    "app/broker/notices.py",
    "app/broker/store.py",
    "app/broker/transfer.py",
    "app/cli/admin.py",
    "app/cli/callers.py",
    "app/cli/connections.py",
    "app/cli/secret_input.py",
    "app/crypto/keyring.py",
    "app/crypto/sealed_box.py",
    "app/http_client/client.py",
    "app/oauth2/client.py",
    "app/oauth2/handshake.py",
    "app/providers/salesforce.py",
    "app/web/asking.py",
    "app/web/connect.py",
    "app/web/tokens.py",
}


def test_secrets_are_revealed_where_they_must_leave_and_nowhere_else() -> None:
    """`.reveal()` stands only in the files listed here, and each of them still needs it."""
    found = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "app").rglob("*.py")
        if ".reveal()" in file.read_text(encoding="utf-8")
    }
    assert found == MAY_REVEAL
