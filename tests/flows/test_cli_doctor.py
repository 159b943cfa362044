"""`connection doctor` and the facts in `connection show`, for people and for programs."""

from pathlib import Path

import pytest

from tests.flows.cli_stage import terminal
from tests.installation import connect


def test_the_doctor_ends_with_0_when_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, the evidence, nobody to call."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        connect(made.host(), made, "hubspot", name="acme")
        said = opened.type("connection", "doctor", "acme")
        assert (said.code, said.err) == (0, "")
        assert said.out.startswith("acme: healthy. All is well.\n")
        assert "who" not in said.out
        report = opened.json("connection", "doctor", "acme")
        assert (report["healthy"], report["fault"], report["name"]) == (True, "none", "acme")


def test_the_doctor_ends_with_1_and_says_who_does_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault, cause and code, who, how, the evidence and what else it may be; the same in JSON."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        host = made.host()
        connection = connect(host, made, "hubspot", name="acme")
        made.emulator.control.hubspot.change_account(connection.account_id, active=False)
        host.refresher.ask(connection).result(30)
        said = opened.type("connection", "doctor", "acme")
        assert (said.code, said.err) == (1, "")
        assert said.out.startswith("acme: doubtful. ")
        assert "  fault     connection (account_gone, by refused:account_gone)" in said.out
        assert "  who       the HubSpot account's admin" in said.out
        assert "It may also be (account_moved): " in said.out
        spoken = opened.type("connection", "doctor", "acme", "--json")
        assert spoken.code == 1
        report = spoken.json
        assert (report["healthy"], report["fault"], report["cause"]) == (False, "connection", "account_gone")
        assert [other["cause"] for other in report["others"]] == ["account_moved"]
        assert opened.type("connection", "doctor", "nobody").code == 1


def test_show_tells_the_facts_of_a_salesforce_grant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation, life, idle days left and approvals; for HubSpot what applies."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        host = made.host()
        connect(host, made, "salesforce", name="org")
        connect(host, made, "hubspot", name="acme")
        org = opened.json("connection", "show", "org")
        assert (org["rotation"], org["idle_days_left"], org["life_measured"]) == ("unknown", 30.0, True)
        assert (org["approvals_known"], org["approvals_limit"], org["approvals_warning"]) == (1, 5, None)
        acme = opened.json("connection", "show", "acme")
        assert (acme["rotation"], acme["life_seconds"], acme["idle_days_left"]) == ("not_seen", 1800.0, None)
        text = opened.done("connection", "show", "org").out
        assert "idle_days_left" in text
        for _ in range(4):
            connect(host, made, "salesforce", name="org")
        assert (
            "the next pushes the oldest out" in opened.json("connection", "show", "org")["approvals_warning"]
        )
        listed = {row["name"]: row for row in opened.json("connection", "list")}
        assert listed["org"]["approvals_known"] == 5
