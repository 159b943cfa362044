"""Callers, apps, keys and the trail from the command line."""

import base64
import json
import os
import pty
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from app.bootstrap import Services
from tests.flows.cli_stage import audited, terminal
from tests.installation import connect


def basic(added: dict[str, str]) -> str:
    """The Authorization header of what `caller add` printed."""
    text = f"{added['client_id']}:{added['client_secret']}"
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_a_caller_from_its_making_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added, given, taken, rotated, disabled, enabled and removed: each acts, and each is on record."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        added = opened.json("caller", "add", "apex", "--allow", "token:issue@hubspot-*", "--rate", "20")
        authenticate = made.host().authentication.authenticate
        assert authenticate(basic(added)).name == "apex"
        given = opened.json("caller", "allow", "apex", "connection:read@*")
        assert given["permissions"] == ["connection:read@*", "token:issue@hubspot-*"]
        taken = opened.json("caller", "deny", "apex", "token:issue@hubspot-*")
        assert taken["permissions"] == ["connection:read@*"]
        rotated = opened.json("caller", "rotate", "apex")
        assert rotated["client_secret"] != added["client_secret"]
        assert made.host().authentication.authenticate(basic(rotated)).name == "apex"
        assert not opened.json("caller", "disable", "apex")["enabled"]
        assert opened.json("caller", "enable", "apex")["enabled"]
        [listed] = opened.json("caller", "list")
        assert listed["name"] == "apex"
        assert "client_secret" not in listed
        opened.done("caller", "remove", "apex")
        assert opened.json("caller", "list") == []
        did = [
            action for actor, action, target in audited(opened) if (actor, target) == ("admin:cli", "apex")
        ]
        words = ["added", "given", "taken", "rotated", "disabled", "enabled", "removed"]
        assert [action.rpartition(":")[2] for action in did] == words


def test_a_secret_is_printed_once_for_people_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`caller add` shows id and secret on standard output; `caller list` shows no secret."""
    with terminal(tmp_path, monkeypatch) as (opened, _):
        said = opened.done("caller", "add", "apex", "--allow", "token:issue@*")
        secret = said.out.split()[3]
        assert said.out.split()[::2] == ["client_id", "client_secret"]
        assert "this once" in said.err
        assert secret not in opened.done("caller", "list").out


@pytest.mark.parametrize("words", [("add", "other"), ("rotate", "apex")])
def test_a_secret_is_shown_whatever_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str]
) -> None:
    """It is kept nowhere else, so it is out before the program ends, which may fail."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        opened.done("caller", "add", "apex")
        close = Services.close

        def fail(services: Services) -> None:
            close(services)
            raise OSError("The disk has gone.")

        with monkeypatch.context() as patch:
            patch.setattr(Services, "close", fail)
            said = opened.type("caller", *words, "--json")
        assert said.code == 1
        assert made.host().authentication.authenticate(basic(said.json)).name == words[1]


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_a_secret_that_was_not_shown_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redirection: str
) -> None:
    """An output that takes nothing is exit code 1, with the command that makes another secret."""
    with terminal(tmp_path, monkeypatch) as (_, made):
        done = subprocess.run(
            ["sh", "-c", f"{sys.executable} -m app caller add apex {redirection}"],
            env={**os.environ, **made.environment()},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "caller rotate apex" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad names, bad permissions, taken names and unknown callers are exit code 1 and change nothing."""
    with terminal(tmp_path, monkeypatch) as (opened, _):
        opened.done("caller", "add", "apex")
        for words in (
            ("caller", "add", "Apex!"),
            ("caller", "add", "apex"),
            ("caller", "add", "other", "--allow", "token:eat@*"),
            ("caller", "add", "other", "--allow-ip", "not-an-address"),
            ("caller", "allow", "nobody", "token:issue@*"),
            ("caller", "deny", "apex", "token:issue@*"),
        ):
            said = opened.type(*words)
            assert said.code == 1, words
            assert said.err.startswith("drawbridge: ")
        assert [caller["name"] for caller in opened.json("caller", "list")] == ["apex"]


def test_an_app_gets_its_secrets_from_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added, listed, rotated and removed; the secrets come in by a file or a pipe and never out."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        file = tmp_path / "secrets.txt"
        file.write_text("newest-one\nolder-one\n")
        added = opened.json(
            *("app", "add", "salesforce/emea", "--client-id", "3MVG9x", "--scopes", "api refresh_token"),
            *("--secret-file", str(file)),
        )
        assert added["redirect_uri"] == "http://localhost:8000/connect/salesforce/callback"
        stored = made.host().apps
        row = stored.find("salesforce/emea")
        assert [secret.reveal() for secret in stored.open(row.id).secrets] == ["newest-one", "older-one"]
        opened.done("app", "rotate", "salesforce/emea", standard_input="third-one\n")
        assert [secret.reveal() for secret in stored.open(row.id).secrets] == ["third-one"]
        listing = opened.done("app", "list").out + opened.done("app", "list", "--json").out
        assert "salesforce/emea" in listing
        assert "-one" not in listing
        opened.done("app", "remove", "salesforce/emea")
        names = [app["app"] for app in opened.json("app", "list")]
        assert names == ["hubspot/default", "salesforce/default"]
        actions = [action for _, action, target in audited(opened) if target == "salesforce/emea"]
        assert actions == ["broker:app:added", "broker:app:rotated", "broker:app:removed"]


def test_an_app_in_use_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`app remove` refuses while a connection goes through the app, and an unknown option of a provider is named."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        connect(made.host(), made, "hubspot", name="acme")
        said = opened.type("app", "remove", "hubspot")
        assert said.code == 1
        assert "1 connection" in said.err
        bad = opened.type(
            "app", "add", "hubspot/x", "--client-id", "abcd", "--no-secret", "--option", "colour=red"
        )
        assert bad.code == 1
        assert "colour" in bad.err


def test_keys_are_changed_while_everything_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """add, rotate, retire: each record is sealed under the new key, and the old one can go only afterwards."""
    with terminal(tmp_path, monkeypatch, KEYRING_FILE="") as (opened, made):
        connect(made.host(), made, "hubspot", name="acme")
        made.close()
        [first] = opened.json("keys", "list")
        assert first["active"]
        second = opened.json("keys", "add")["id"]
        assert opened.type("keys", "retire", first["id"]).code == 1
        said = opened.done("keys", "rotate")
        assert "re-sealing" in said.err
        rows = {row["id"]: row for row in opened.json("keys", "list")}
        assert rows[second]["active"]
        assert rows[first["id"]]["records"] == 0
        assert opened.json("connection", "refresh", "acme")["generation"] == 2
        assert opened.type("keys", "rotate").code == 1  # nothing is left to do, which is said
        assert opened.json("keys", "retire", first["id"])["retired"]
        actions = [action for _, action, _ in audited(opened) if "key" in action]
        assert actions == ["crypto:key:added", "crypto:key:activated", "crypto:key:retired"]


def test_what_does_not_open_is_named_when_the_keys_are_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are re-sealed; exit code 1, the record's name and what to do tell that the old key is still needed."""
    with terminal(tmp_path, monkeypatch, KEYRING_FILE="") as (opened, made):
        host = made.host()
        connect(host, made, "hubspot", name="acme")
        connect(host, made, "salesforce", name="org")
        made.close()
        with sqlite3.connect(made.settings().database_url.removeprefix("sqlite:///")) as database:
            database.execute("UPDATE connections SET sealed = x'00' WHERE name = 'acme'")
        database.close()
        opened.done("keys", "add")
        said = opened.type("keys", "rotate", "--json")
        assert (said.code, json.loads(said.out)["unopenable"]) == (1, ["connection acme"])
        assert "must not be retired: connection acme." in said.err
        assert opened.json("connection", "refresh", "org")["generation"] == 2


def test_the_trail_is_verified_against_what_somebody_else_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound as it is; broken, with the row named and exit code 1, once a row was edited or a head is further on."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        opened.done("caller", "add", "apex")
        assert opened.json("audit", "verify")["sound"]
        row = json.loads(opened.done("audit", "export").out.splitlines()[0])
        head = f"{row['writer']}:{row['n']}:{row['mac']}"
        assert opened.json("audit", "verify", "--head", head)["sound"]
        ahead = opened.type("audit", "verify", "--head", f"{row['writer']}:{row['n'] + 1}:{row['mac']}")
        assert ahead.code == 1
        edit(made.settings().database_url, "UPDATE audit SET target = 'somebody'")
        broken = opened.type("audit", "verify", "--json")
        assert broken.code == 1
        assert broken.json["bad"]["n"] == row["n"]
        assert row["writer"] in broken.err


def test_output_that_nobody_reads_any_more_ends_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`audit export | head -1` is no failure."""
    with terminal(tmp_path, monkeypatch) as (opened, _):
        for number in range(3):
            opened.done("caller", "add", f"caller{number}")
        root = str(Path(__file__).parents[2])
        environment = os.environ | dict(opened.environment) | {"PYTHONPATH": root}
        command = [sys.executable, "-m", "app", "audit", "export"]
        reading, writing = os.pipe()
        with subprocess.Popen(command, env=environment, stdout=writing, stderr=subprocess.PIPE) as process:
            os.close(reading)
            os.close(writing)
            _, complaint = process.communicate(timeout=60)
        assert process.returncode == 0
        assert complaint == b""


def edit(database_url: str, statement: str) -> None:
    """Change the trail behind everybody's back."""
    file = database_url.removeprefix("sqlite:///").replace(".db", "-audit.db")
    with sqlite3.connect(file) as connection:
        connection.execute(statement)
    connection.close()


def test_a_prompt_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the client secret is asked for without echo, and is neither printed nor in a complaint."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        root = str(Path(__file__).parents[2])
        environment = os.environ | dict(opened.environment) | {"PYTHONPATH": root}
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "app", "app", "add", "hubspot/eu", "--client-id", "abcdef"]
        with subprocess.Popen(
            command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        ) as process:
            os.close(theirs)
            shown = b""
            while b"Client secret" not in shown:
                shown += os.read(ours, 1024)
            os.write(ours, b"very-secret-text\n")
            shown += rest_of(ours)
        os.close(ours)
        assert process.returncode == 0, shown
        assert b"very-secret-text" not in shown
        apps = made.host().apps
        assert apps.open(apps.find("hubspot/eu").id).secrets[0].reveal() == "very-secret-text"


def rest_of(descriptor: int) -> bytes:
    """Everything until the other side of the terminal closes, which Linux reports as an error."""
    read = b""
    try:
        while chunk := os.read(descriptor, 1024):
            read += chunk
    except OSError:
        return read
    return read
