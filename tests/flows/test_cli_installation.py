"""The installation as a whole from the command line: check, migrate, adopt, login links, and how failures look."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from app.cli.program import program
from app.secret import Secret
from tests.flows.cli_stage import Terminal, audited, terminal
from tests.installation import connect

ROOT = Path(__file__).parents[2]


def commands(group: click.Group, *above: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with its words."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield (*above, name), command


ALL = dict(commands(program))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_takes_json_and_shows_an_example(words: tuple[str, ...]) -> None:
    """Its help has a sentence, an example that begins with its own words, and --json."""
    command = ALL[words]
    assert any("--json" in parameter.opts for parameter in command.params)
    assert command.help is not None
    assert f"drawbridge {' '.join(words)}" in command.help


def test_no_secret_can_be_an_argument() -> None:
    """An option about a secret or key is a file or a switch, never a text that `ps` would show."""
    harmless = {"jwks_uri", "key"}  # an address; the name of a key encryption key
    for words, command in ALL.items():
        for parameter in command.params:
            name = parameter.name or ""
            if any(part in name for part in ("secret", "key", "token", "password")) and name not in harmless:
                is_switch = isinstance(parameter, click.Option) and parameter.is_flag
                assert is_switch or isinstance(parameter.type, click.File), (words, name)


def test_help_imports_nothing_heavy() -> None:
    """The help of everything comes without the database, the cryptography or the web server being loaded."""
    code = (
        "import sys; from app.cli.program import program;"
        "heavy = {'sqlalchemy', 'cryptography', 'flask', 'requests', 'rich', 'marshmallow'} & set(sys.modules);"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_check_lists_every_fault_at_once(tmp_path: Path) -> None:
    """Three faults are three lines and exit code 1; nothing is made on the disk."""
    environment = {
        "DRAWBRIDGE_STATE_DIR": str(tmp_path / "state"),
        "DRAWBRIDGE_WEB_THREADS": "many",
        "DRAWBRIDGE_LEASE_SECONDS": "21",
        "DRAWBRIDGE_DATABASE_ULR": "sqlite:///x.db",
    }
    said = Terminal(environment).type("check", "--json")
    assert said.code == 1
    assert not said.json["ok"]
    for name in ("WEB_THREADS", "LEASE_SECONDS", "DATABASE_ULR"):
        assert any(name in fault for fault in said.json["faults"]), said.json
    assert list(tmp_path.iterdir()) == []


def test_check_knows_a_database_that_is_not_there_yet_from_a_wrong_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first start all is in order; with another keyring than the database's it is not."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        assert opened.done("check").out.startswith("Everything is in order.")
        fresh = Terminal(made.environment(DATABASE_URL=f"sqlite:///{tmp_path / 'none.db'}"))
        assert "no database yet" in fresh.done("check").out
        assert not (tmp_path / "none.db").exists()
        other = tmp_path / "other.json"
        other.write_text(made.keyring_file().read_text().replace("AAEC", "AAED"))
        other.chmod(0o600)
        wrong = Terminal(made.environment(KEYRING_FILE=str(other))).type("check", "--json")
        assert wrong.code == 1
        [fault] = wrong.json["faults"]
        assert "sealed" in fault


def test_a_fault_of_the_settings_stops_every_command_with_sentences(tmp_path: Path) -> None:
    """Any command that needs the settings says all faults, each on its line, and exits with 1."""
    environment = {
        "DRAWBRIDGE_WEB_THREADS": "many",
        "DRAWBRIDGE_LEASE_SECONDS": "x",
        "DRAWBRIDGE_STATE_DIR": str(tmp_path),
    }
    said = Terminal(environment).type("connection", "list")
    assert said.code == 1
    assert said.out == ""
    assert said.err.count("drawbridge: DRAWBRIDGE_") == 2


def test_an_unmigrated_database_is_refused_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command over an empty database says which command makes it; `migrate` may then run twice."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        empty = Terminal(made.environment(DATABASE_URL=f"sqlite:///{tmp_path / 'empty.db'}"))
        said = empty.type("caller", "list")
        assert said.code == 1
        assert "drawbridge migrate" in said.err
        assert empty.json("migrate") == {"changed": True}
        assert empty.json("migrate") == {"changed": False}
        assert opened.json("migrate") == {"changed": False}


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    """A command that does not exist, a missing argument and a bad option are the user's mistake, not a failure."""
    shell = Terminal({"DRAWBRIDGE_STATE_DIR": str(tmp_path)})
    assert shell.type("no-such-command").code == 2
    assert shell.type("connection", "show").code == 2
    assert shell.type("audit", "verify", "--head", "nonsense").code == 2
    assert shell.type("app", "add", "salesforce", "--client-id", "x", "--no-secret").code == 2


def test_a_login_link_signs_in_once_and_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed URL carries a token that the installation accepts one time."""
    with terminal(tmp_path, monkeypatch) as (opened, made):
        link = opened.json("admin", "login-link")
        token = Secret(link["url"].partition("token=")[2])
        admins = made.host().admins
        assert admins.may_sign_in(token)
        admins.sign_in(token)
        assert not admins.may_sign_in(token)
        assert ("admin:cli", "web:admin_login:link_made", "") in audited(opened)


def test_adopt_ends_the_hold_of_a_copied_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another PUBLIC_URL a refresh is refused until the operator says yes; a no changes nothing."""
    with terminal(tmp_path, monkeypatch) as (_, made):
        connect(made.host(), made, "hubspot", name="acme")
        copy = Terminal(made.environment(host="copy", PUBLIC_URL="http://localhost:9999"))
        held = copy.type("connection", "refresh", "acme")
        assert held.code == 1
        assert "drawbridge adopt" in held.err
        assert copy.type("adopt", standard_input="n\n").code == 1
        assert copy.type("connection", "refresh", "acme").code == 1
        assert copy.json("adopt", "--yes") == {"adopted": True, "was": "copied"}
        assert copy.json("connection", "refresh", "acme")["generation"] == 2
        assert ("admin:cli", "broker:installation:adopted", "") in audited(copy)
