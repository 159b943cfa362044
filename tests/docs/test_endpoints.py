"""README's endpoints are those of the contract at /openapi.json."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.web.application import create_app
from tests.docs.tables import README
from tests.installation import installation

# The contract does not describe itself.
NOT_IN_THE_CONTRACT = {"GET /openapi.json"}


@pytest.fixture
def described(tmp_path: Path) -> Iterator[set[str]]:
    """Method and path of every operation in the contract."""
    with installation(f"sqlite:///{tmp_path}/drawbridge.db", tmp_path) as made:
        app = create_app(made.host("command"))
        contract = app.test_client().get("/openapi.json").get_json()
        yield {
            f"{method.upper()} {path}"
            for path, operations in contract["paths"].items()
            for method in operations
            if method in ("get", "post", "delete", "put", "patch")
        }


def test_readme_names_every_endpoint_and_no_other(described: set[str]) -> None:
    """What README promises is in the contract, and what the contract holds is in README."""
    table = README.read_text().split("<!-- endpoints: begin -->")[1].split("<!-- endpoints: end -->")[0]
    named = set(re.findall(r"^\| `([A-Z]+ /[^`]*)`", table, re.MULTILINE))
    assert named - NOT_IN_THE_CONTRACT == described
