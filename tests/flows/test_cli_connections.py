"""Connections from the command line: made, listed, moved, refreshed, switched and taken away."""

import base64
import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from app.crypto.sealed_box import seal_to
from app.secret import Secret
from tests.flows.cli_stage import Terminal, audited, terminal
from tests.flows.worker_stage import CLIENTS
from tests.installation import SALESFORCE, Installation, connect


def line_of(made: Installation, provider: str, **changes: object) -> str:
    """One line for `import`, of a fresh grant."""
    grant = made.emulator.control.vendor(provider).grant(CLIENTS[provider])
    line = {
        "provider": provider,
        "account_id": grant.account,
        "user_id": grant.user,
        "refresh_token": grant.refresh_token,
        "instance_url": grant.instance_url if provider == "salesforce" else None,
    }
    return json.dumps(line | changes)


def test_a_connect_link_leads_to_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL names the provider's connect page and carries a token that stands for app and name."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        link = opened.json("connection", "link", "acme", "--app", "hubspot")
        address, _, token = link["url"].partition("?link=")
        assert address == "http://localhost:8000/connect/hubspot"
        stands_for = made.host().connect.look_at_link(Secret(token))
        assert (stands_for.app.reference, stands_for.name) == ("hubspot/default", "acme")
        assert ("admin:cli", "broker:connect_link:made", "acme") in audited(opened)
        assert opened.type("connection", "link", "acme", "--app", "nowhere").code == 1


def test_list_and_show_tell_everything_but_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State, expiry and scopes are there for people and programs; access and refresh token are in neither."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        host = made.host()
        connection = connect(host, made, "salesforce", name="acme")
        found = host.store.tokens_of(connection.id)
        assert found is not None
        shown = opened.json("connection", "show", "acme")
        assert (shown["state"], shown["generation"], shown["app"]) == ("healthy", 1, "salesforce/default")
        assert "api" in shown["scopes_granted"]
        texts = [
            opened.done("connection", "show", "acme").out,
            opened.done("connection", "list").out,
            json.dumps(shown),
        ]
        for token in (found[1].access_token, found[1].refresh_token):
            assert token is not None
            assert all(token.reveal() not in text for text in texts)
        assert opened.json("connection", "list", "--state", "disabled") == []
        assert [row["name"] for row in opened.json("connection", "list", "--app", "salesforce")] == ["acme"]
        assert opened.type("connection", "show", "nobody").code == 1


def test_import_stores_what_is_in_order_and_reports_the_rest_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two good lines of four are stored; the others are named with their numbers, and the exit code is 1."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        good = [line_of(made, "hubspot", name="first"), line_of(made, "salesforce", name="second")]
        lines = "\n".join([good[0], "not json", good[1], '{"provider": "hubspot", "account_id": "1"}'])
        said = opened.type("connection", "import", standard_input=lines)
        assert said.code == 1
        assert [line.split(":")[0] for line in said.out.splitlines()[:4]] == [
            "line 1",
            "line 2",
            "line 3",
            "line 4",
        ]
        assert "2 stored, 2 failed" in said.out
        assert "importing" in said.err
        again = opened.json("connection", "import", standard_input=good[0])
        assert again["results"] == [{"line": 1, "outcome": "replaced", "name": "first", "problem": None}]
        assert [row["name"] for row in opened.json("connection", "list")] == ["first", "second"]
        assert opened.json("connection", "refresh", "second")["generation"] == 2


ODD = {
    "deep": b"[" * 200_000,
    "half a pair": rb'{"provider": "hubspot", "account_id": "1", "refresh_token": "r\ud800"}',
    "half a pair in a name": rb'{"provider": "hubspot", "account_id": "1", "r\udfff": "r"}',
    "a null": rb'{"provider": "hubspot", "account_id": "1\u0000", "refresh_token": "r"}',
    "a null in a list": rb'{"provider": "hubspot", "account_id": "1", "refresh_token": "r", "scopes": ["a\u0000"]}',
    "latin-1": '{"provider": "hubspot", "account_id": "1", "refresh_token": "ré"}'.encode("latin-1"),
    "a bare byte": b"\xff",
}


@pytest.mark.parametrize("words", [(), ("--app", "hubspot"), ("--key-file", "private.pem")])
def test_an_odd_line_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """Endless nesting and what is no text are refused by their line; the line after them is stored."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        good = line_of(made, "hubspot", name="good").encode()
        if "--key-file" in words:
            private, public = key_pair(tmp_path)
            good = base64.b64encode(seal_to(public.read_bytes(), good))
            words = ("--key-file", str(private))
        lines = b"\n".join([*ODD.values(), good])
        said = opened.type("connection", "import", "--json", *words, standard_input=lines)
        assert said.code == 1
        assert "fault of the program" not in said.err
        results = json.loads(said.out)["results"]
        outcomes = dict(zip([*ODD, "good"], [result["outcome"] for result in results], strict=True))
        assert outcomes == dict.fromkeys(ODD, "failed") | {"good": "added"}
        assert [row["name"] for row in opened.json("connection", "list")] == ["good"]


def test_letters_of_every_script_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What UTF-8 can write is in order, spelt out or escaped, a pair of surrogates included."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        plain = line_of(made, "hubspot", name="first", access_token="é\N{GRINNING FACE}")
        written = json.dumps(json.loads(plain), ensure_ascii=False)
        for line in (plain, written):
            assert opened.json("connection", "import", standard_input=line.encode())["stored"] == 1


def test_a_connection_moves_to_another_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `export` seals to a key, `import` with that key takes over; here it is never refreshed again."""
    with terminal(tmp_path, monkeypatch) as (here, made):
        connect(made.host(), made, "salesforce", name="acme")
        private, public = key_pair(tmp_path)
        moved = tmp_path / "moved.txt"
        here.done("connection", "export", "acme", "--to", str(public), "--output", str(moved), "--yes")
        assert moved.stat().st_mode & 0o077 == 0
        there = Terminal(made.environment(host="there", DATABASE_URL=f"sqlite:///{tmp_path / 'there.db'}"))
        there.done("migrate")
        sealed = moved.read_text()
        assert there.type("connection", "import", standard_input=sealed).code == 1
        taken = there.json("connection", "import", "--key-file", str(private), standard_input=sealed)
        assert taken["stored"] == 1
        assert there.json("connection", "refresh", "acme")["state"] == "healthy"
        refused = here.type("connection", "refresh", "acme")
        assert refused.code == 1
        assert "another installation" in refused.err
        assert ("admin:cli", "broker:connection:exported", "acme") in audited(here)
        assert ("admin:cli", "broker:connection:imported", "acme") in audited(there)


def test_refresh_says_what_became_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refresh that works shows the next generation; one the provider fails is a sentence and exit code 1."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        connect(made.host(), made, "hubspot", name="acme")
        assert "Refreshed acme" in opened.done("connection", "refresh", "acme").out
        made.emulator.control.hubspot.misbehave("status", status=503)
        failed = opened.type("connection", "refresh", "acme")
        assert failed.code == 1
        assert failed.out == ""
        assert failed.err.startswith("drawbridge: ")
        refreshes = [
            action for _, action, target in audited(opened) if target == "acme" and "refresh" in action
        ]
        assert len(refreshes) == 2


def test_switching_and_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """disable, enable and rename act at once and are on record; a taken name is refused."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        connect(made.host(), made, "hubspot", name="acme")
        connect(made.host(), made, "salesforce", name="taken")
        assert opened.json("connection", "disable", "acme")["state"] == "disabled"
        assert opened.type("connection", "refresh", "acme").code == 1
        assert opened.json("connection", "enable", "acme")["state"] == "healthy"
        assert opened.type("connection", "rename", "acme", "taken").code == 1
        assert opened.type("connection", "rename", "acme", "No Name").code == 1
        assert opened.json("connection", "rename", "acme", "globex")["name"] == "globex"
        actions = [action.rpartition(":")[2] for actor, action, _ in audited(opened) if actor == "admin:cli"]
        assert actions[-4:] == [
            "disabled",
            "ended",
            "enabled",
            "renamed",
        ]  # ended: the refresh that was refused


def test_disconnecting_wants_the_name_and_uninstalling_its_own_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong name or a wrong word changes nothing; the right ones, or --yes and --yes-uninstall, do it."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        connect(made.host(), made, "hubspot", name="acme")
        assert opened.type("connection", "disconnect", "acme", standard_input="amce\n").code == 1
        wrong_word = opened.type(
            "connection", "disconnect", "acme", "--uninstall", standard_input="acme\nyes\n"
        )
        assert wrong_word.code == 1
        assert "WHOLE" in wrong_word.err
        assert (
            opened.type("connection", "disconnect", "acme", "--uninstall", "--yes", standard_input="").code
            == 1
        )
        assert opened.json("connection", "show", "acme")["state"] == "healthy"
        said = opened.done("connection", "disconnect", "acme", standard_input="acme\n")
        assert "disconnected" in said.out
        assert opened.json("connection", "show", "acme")["state"] == "disconnecting"
        connect(made.host(), made, "salesforce", name="other")
        assert (
            opened.type("connection", "disconnect", "other", "--yes", "--uninstall", "--yes-uninstall").code
            == 1
        )
        assert opened.json("connection", "disconnect", "other", "--yes")["state"] == "disconnecting"


def test_a_grant_without_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`connection add` mints a first token by JWT bearer; its parts must fit together."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        made.emulator.control.salesforce.change_app(SALESFORCE, jwt_public_key=public.decode())
        file = tmp_path / "server.key"
        file.write_bytes(private)
        words = ("connection", "add", "minted", "--app", "salesforce", "--grant", "jwt_bearer")
        assert opened.type(*words).code == 2
        added = opened.json(*words, "--subject", "ada@acme.example", "--key-file", str(file))
        assert (added["grant"], added["state"]) == ("jwt_bearer", "healthy")
        assert opened.json("connection", "refresh", "minted")["generation"] == 2
        refused = opened.type(
            *("connection", "add", "nope", "--app", "salesforce", "--grant", "jwt_bearer"),
            *("--subject", "nobody@acme.example", "--key-file", str(file)),
        )
        assert refused.code == 1
        assert ("admin:cli", "broker:connection:connected", "minted") in audited(opened)


def key_pair(folder: Path) -> tuple[Path, Path]:
    """Keys made as `connection export --help` says."""
    private, public = folder / "private.pem", folder / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "X25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public
