"""Settings: where they come from, what is refused, and that every fault is told at once."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app import settings
from app.errors import ConfigurationFault
from app.secret import Secret
from app.settings import Settings, load, table

ROOT = Path(__file__).parents[2]
KEYRING = '{"active":"k1","keys":{"k1":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}'
PRODUCTION = {"ENVIRONMENT": "production", "PUBLIC_URL": "https://broker.example.com", "KEYRING": KEYRING}


def read(*, config_file: Path | None = None, **given: str) -> Settings:
    return load({f"DRAWBRIDGE_{name}": value for name, value in given.items()}, config_file=config_file)


def faults(*, config_file: Path | None = None, **given: str) -> list[str]:
    with pytest.raises(ConfigurationFault) as caught:
        read(config_file=config_file, **given)
    return list(caught.value.faults)


def test_nothing_set_is_a_development_installation() -> None:
    """The defaults alone make a program that starts; relative paths count from the project's folder."""
    got = read()
    root = Path(settings.__file__).resolve().parents[1]
    assert got.database_url == f"sqlite:///{root}/var/drawbridge.db"
    assert got.state_dir == root / "var"
    assert got.public_url == "http://127.0.0.1:8080"
    assert got.environment == "development"
    assert got.keyring is None
    assert (got.provider_timeout_seconds, got.lease_seconds, settings.LEASE_MARGIN) == (20, 45, 10)
    assert (got.web_threads, got.web_workers, got.outage_grace_seconds) == (16, 2, 60)
    assert (got.refresh_ahead_seconds, got.audit_retention_days, got.log_level) == (300, 400, "INFO")
    assert got.hubspot_api_url == "https://api.hubapi.com"
    assert (got.hubspot_oauth_version, got.hubspot_api_version) == ("2026-03", "2026-09")
    assert got.salesforce_api_version == "v67.0"
    assert got.hubspot_pkce is True
    assert got.allow_loopback_providers is False
    assert got.trusted_proxies == ()
    assert got.hubspot_client_secret == ()


def test_every_setting_is_read_into_its_type() -> None:
    """All of them given at once, as a large installation would."""
    got = read(
        **PRODUCTION,
        DATABASE_URL="postgresql://u:p@db/drawbridge",
        BIND="[::]:8080",
        HUBSPOT_CLIENT_ID="11111111-2222-3333-4444-555555555555",
        HUBSPOT_CLIENT_SECRET="new, old",
        HUBSPOT_APP_ID="123",
        HUBSPOT_SCOPES="oauth crm.objects.contacts.read,oauth",
        HUBSPOT_PKCE="no",
        TRUSTED_PROXIES="10.0.0.0/8, fd00::/8",
        METRICS_BIND="127.0.0.1:9100",
        METRICS_TOKEN="0123456789abcdef",
        NOTICE_URL="https://ops.example.com/hook",
        NOTICE_SECRET="0123456789abcdef",
        LOG_LEVEL="debug",
        PROVIDER_TIMEOUT_SECONDS="7.5",
    )
    assert got.hubspot_client_secret == (Secret("new"), Secret("old"))
    assert got.hubspot_scopes == ("oauth", "crm.objects.contacts.read")
    assert [str(one) for one in got.trusted_proxies] == ["10.0.0.0/8", "fd00::/8"]
    assert (got.log_level, got.hubspot_pkce, got.provider_timeout_seconds) == ("DEBUG", False, 7.5)
    assert got.keyring == Secret(KEYRING)
    assert got.metrics_token == got.notice_secret == Secret("0123456789abcdef")


def test_all_faults_are_told_at_once() -> None:
    """One start, one list: nobody should mend them one by one."""
    told = faults(
        ENVIRONMENT="production",
        DATABASE_URL="mysql://db",
        PUBLIC_URL="http://broker.example.com",
        BIND="everywhere",
        KEYRING="{",
        HUBSPOT_CLIENT_ID="an-id-without-secret",
        SALESFORCE_SCOPES="api",
        LEASE_SECONDS="30",
        WEB_THREADS="many",
        TRUSTED_PROXIES="10.0.0.1/8",
        ALLOW_LOOPBACK_PROVIDERS="true",
        WEB_THREDS="8",
        METRICS_TOKEN="short",
    )
    names = {fault.split()[0].removeprefix("DRAWBRIDGE_") for fault in told}
    assert names == {
        "DATABASE_URL",
        "PUBLIC_URL",
        "BIND",
        "KEYRING",
        "HUBSPOT_CLIENT_SECRET",
        "SALESFORCE_SCOPES",
        "LEASE_SECONDS",
        "WEB_THREADS",
        "TRUSTED_PROXIES",
        "ALLOW_LOOPBACK_PROVIDERS",
        "WEB_THREDS",
        "METRICS_TOKEN",
    }
    assert len(told) == len(names)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DATABASE_URL", "postgres://db/x", "postgresql://"),
        ("DATABASE_URL", "sqlite://", "does not name a file"),
        ("DATABASE_URL", "sqlite:///:memory:", "does not name a file"),
        ("DATABASE_URL", "nonsense", "neither"),
        ("DATABASE_URL", "postgresql://h:port/x", "not a valid"),
        ("PUBLIC_URL", "https://broker.example.com/path", "has a path"),
        ("PUBLIC_URL", "https://u:p@broker.example.com", "user name"),
        ("PUBLIC_URL", "https://broker.example.com?x=1", "query"),
        ("PUBLIC_URL", "broker.example.com", "not an https URL"),
        ("PUBLIC_URL", "https://", "not an https URL"),
        ("BIND", "127.0.0.1", "host:port"),
        ("BIND", "127.0.0.1:99999", "host:port"),
        ("ENVIRONMENT", "staging", "not one of"),
        ("HUBSPOT_SCOPES", "crm.objects.contacts.read", "lacks oauth"),
        ("HUBSPOT_SCOPES", 'oauth "quoted"', "RFC 6749"),
        ("HUBSPOT_OPTIONAL_SCOPES", "oauth", "repeats"),
        ("HUBSPOT_API_URL", "http://api.hubapi.com", "not https"),
        ("HUBSPOT_API_URL", "http://127.0.0.1:9000", "points at this machine"),
        ("HUBSPOT_API_URL", "https://localhost", "points at this machine"),
        ("HUBSPOT_OAUTH_VERSION", "latest", "2026-03"),
        ("HUBSPOT_APP_ID", "abc", "number"),
        ("HUBSPOT_PKCE", "perhaps", "true nor false"),
        ("SALESFORCE_API_VERSION", "v30.0", "v67.0"),
        ("SALESFORCE_API_VERSION", "67.0", "v67.0"),
        ("PROVIDER_TIMEOUT_SECONDS", "nan", "not a number"),
        ("PROVIDER_TIMEOUT_SECONDS", "0", "between"),
        ("OUTAGE_GRACE_SECONDS", "-1", "between"),
        ("WEB_WORKERS", "1.5", "whole number"),
        ("TRUSTED_PROXIES", "0.0.0.0/0", "every address"),
        ("TRUSTED_PROXIES", "proxy.example.com", "address range"),
        ("METRICS_TOKEN", "x" * 15, "shorter"),
        ("NOTICE_SECRET", "x" * 16, "needed with"),
        ("NOTICE_URL", "http://ops.example.com", "not https"),
        ("KEYRING", "not json", "not JSON"),
        ("LOG_LEVEL", "LOUD", "not one of"),
    ],
)
def test_a_wrong_value_is_refused_by_name_without_its_value(name: str, value: str, says: str) -> None:
    """The sentence says what is wrong; a value may be a secret in the wrong place."""
    told = faults(**{name: value})
    assert any(says in fault for fault in told)
    assert value in {"sqlite://", "oauth"} or len(value) < 6 or not any(value in fault for fault in told)


@pytest.mark.parametrize(("timeout", "lease"), [("20", "30"), ("35", "45"), ("20", "10")])
def test_a_lease_that_does_not_outlast_the_time_out_is_refused(timeout: str, lease: str) -> None:
    """A lease that ends during a request lets a second holder present the same refresh token."""
    assert "LEASE_SECONDS" in faults(PROVIDER_TIMEOUT_SECONDS=timeout, LEASE_SECONDS=lease)[0]
    assert read(PROVIDER_TIMEOUT_SECONDS="20", LEASE_SECONDS="30.1").lease_seconds == 30.1


@pytest.mark.parametrize("missing", ["KEYRING", "PUBLIC_URL"])
def test_production_does_not_start_without_what_it_would_have_to_invent(missing: str) -> None:
    """No invented key, no guessed address."""
    assert read(**PRODUCTION).environment == "production"
    (told,) = faults(**{name: value for name, value in PRODUCTION.items() if name != missing})
    assert told.startswith(f"DRAWBRIDGE_{missing} is needed in production")


def test_loopback_providers_are_for_tests_and_never_for_production() -> None:
    """The switch of the demo must not weaken an installation that counts."""
    got = read(ALLOW_LOOPBACK_PROVIDERS="1", HUBSPOT_API_URL="http://127.0.0.1:9000/")
    assert got.hubspot_api_url == "http://127.0.0.1:9000"
    (told,) = faults(**PRODUCTION, ALLOW_LOOPBACK_PROVIDERS="true")
    assert "production refuses" in told


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("PUBLIC_URI", "PUBLIC_URL"),
        ("KEYRING_FIEL", "KEYRING_FILE"),
        ("HUBSPOT_SECRET", "HUBSPOT_CLIENT_SECRET"),
        ("public_url", None),
        ("FROBNICATE", None),
    ],
)
def test_a_name_that_is_not_a_setting_is_a_fault(wrong: str, meant: str | None) -> None:
    """A typing error must not leave a default in force; a close match is named."""
    (told,) = faults(**{wrong: "x"})
    assert "is not a setting" in told
    assert (f"did you mean DRAWBRIDGE_{meant}?" in told) if meant else ("did you mean" not in told)


def test_names_of_others_are_left_alone() -> None:
    """The environment is full of them, the test suite's own among them."""
    load({"PATH": "/bin", "DRAWBRIDGE_TEST_DATABASE_URL": "x", "drawbridge_x": "y"}, config_file=None)


# -- files


def test_a_value_can_come_from_a_file(tmp_path: Path) -> None:
    """As Docker and Kubernetes hand secrets over; the line end is not part of it."""
    secret = tmp_path / "secret"
    secret.write_text("from-file\n")
    keyring = tmp_path / "keyring"
    keyring.write_text(KEYRING)
    got = read(KEYRING_FILE=str(keyring), HUBSPOT_CLIENT_SECRET_FILE=str(secret), HUBSPOT_CLIENT_ID="some-id")
    assert got.hubspot_client_secret == (Secret("from-file"),)
    assert got.keyring == Secret(KEYRING)


def test_an_empty_value_or_file_counts_as_not_set(tmp_path: Path) -> None:
    """Compose passes what the shell does not have as empty text."""
    empty = tmp_path / "empty"
    empty.write_text("\n")
    got = read(WEB_THREADS="", HUBSPOT_CLIENT_SECRET_FILE=str(empty), KEYRING_FILE="", KEYRING="")
    assert (got.web_threads, got.hubspot_client_secret, got.keyring) == (16, (), None)


def test_a_value_and_its_file_exclude_each_other(tmp_path: Path) -> None:
    """Which of the two would hold is not for guessing."""
    file = tmp_path / "keyring"
    file.write_text(KEYRING)
    (told,) = faults(KEYRING=KEYRING, KEYRING_FILE=str(file))
    assert "both given" in told


def test_a_file_that_cannot_be_read_is_one_fault(tmp_path: Path) -> None:
    """Missing, a directory, too large or not text; and no second complaint that the value is missing."""
    large = tmp_path / "large"
    large.write_bytes(b"x" * 70_000)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for file, says in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
        (large, "larger"),
        (binary, "UTF-8"),
    ):
        given = {name: value for name, value in PRODUCTION.items() if name != "KEYRING"}
        (told,) = faults(**given, KEYRING_FILE=str(file))
        assert told.startswith("DRAWBRIDGE_KEYRING_FILE names a file")
        assert says in told


def test_the_environment_goes_over_the_settings_file(tmp_path: Path) -> None:
    """And the file over the defaults, in TOML's own types."""
    file = tmp_path / "settings.toml"
    file.write_text(
        'web_threads = 4\nweb_workers = 3\nhubspot_pkce = false\nbind = ""\n'
        'hubspot_scopes = ["oauth", "a.b"]\nprovider_timeout_seconds = 5.5\nhubspot_app_id = 77\n'
    )
    got = read(config_file=file, WEB_THREADS="32")
    assert (got.web_threads, got.web_workers, got.hubspot_pkce) == (32, 3, False)
    assert (got.hubspot_scopes, got.provider_timeout_seconds) == (("oauth", "a.b"), 5.5)
    assert (got.hubspot_app_id, got.bind) == ("77", "127.0.0.1:8080")


def test_the_settings_file_holds_no_secret_and_no_unknown_name(tmp_path: Path) -> None:
    """It is committed and copied; a secret in it is refused without being quoted."""
    file = tmp_path / "settings.toml"
    file.write_text(
        'keyring = "hunter2"\nnotice_secret = "hunter2"\nweb_thread = 4\n[section]\nx = 1\nbind = "x"\n'
        'hubspot_pkce = ["a"]\n'
    )
    told = faults(config_file=file)
    assert sum("is a secret" in fault for fault in told) == 2
    assert any("did you mean DRAWBRIDGE_WEB_THREADS?" in fault for fault in told)
    assert any(fault.startswith("section in") for fault in told)
    assert "hunter2" not in " ".join(told)
    file.write_text('database_url = "postgresql://u:hunter2@db/x"\n')
    (told_of_url,) = faults(config_file=file)
    assert "hunter2" not in told_of_url
    file.write_text('database_url = "postgresql://u@db/x"\nbind = 1.5\nhubspot_scopes = [1]\n')
    assert [fault.split()[0] for fault in faults(config_file=file)] == [
        "DRAWBRIDGE_BIND",
        "DRAWBRIDGE_HUBSPOT_SCOPES",
    ]


@pytest.mark.parametrize("text", [b"= nonsense", b"\xff\xfe"])
def test_a_settings_file_that_is_not_toml_is_a_fault(tmp_path: Path, text: bytes) -> None:
    """As is one that was named and is not there."""
    file = tmp_path / "settings.toml"
    file.write_bytes(text)
    assert "is not TOML" in faults(config_file=file)[0]
    assert "cannot be read" in faults(config_file=tmp_path / "none.toml")[0]


def test_the_settings_file_we_ship_says_what_holds_anyway(tmp_path: Path) -> None:
    """As shipped it changes nothing, and its commented lines are the defaults."""
    shipped = ROOT / "config" / "settings.toml"
    assert read(config_file=shipped) == read()
    lines = []
    for line in shipped.read_text().splitlines():
        text = line.removeprefix("# ")
        if text.partition(" = ")[0].replace("_", "").isalnum() or text.startswith(("    ", "]")):
            lines.append(text)
    file = tmp_path / "settings.toml"
    file.write_text("\n".join(lines))
    names = {row.name.removeprefix("DRAWBRIDGE_").lower() for row in table() if not row.secret}
    assert {line.partition(" = ")[0] for line in lines if " = " in line} == names
    # Examples that are not defaults, and secrets that would go with them.
    got = read(
        config_file=file, HUBSPOT_CLIENT_SECRET="x", NOTICE_SECRET="x" * 16, SALESFORCE_CLIENT_SECRET="x"
    )
    for name in names - {
        "public_url",
        "hubspot_client_id",
        "hubspot_app_id",
        "salesforce_client_id",
        "metrics_bind",
        "notice_url",
    }:
        assert getattr(got, name) == getattr(read(), name), name


# -- the table, and what is shown


def test_the_table_has_every_setting_and_its_default() -> None:
    """The README's table is held to this one; a default written there means what the program does."""
    rows = table()
    assert [row.name.removeprefix("DRAWBRIDGE_").lower() for row in rows] == [
        field.name for field in fields(Settings) if field.name != "keyring_file"
    ]
    assert all(row.help.endswith(".") and row.default != "" for row in rows)
    assert {row.name.removeprefix("DRAWBRIDGE_") for row in rows if row.secret} == {
        "KEYRING",
        "HUBSPOT_CLIENT_SECRET",
        "SALESFORCE_CLIENT_SECRET",
        "METRICS_TOKEN",
        "NOTICE_SECRET",
    }
    written = {row.name: row.default for row in rows if row.default is not None}
    assert load(written, config_file=None) == read()


def test_settings_do_not_show_what_is_secret() -> None:
    """They end up in tracebacks and debuggers."""
    got = read(
        **PRODUCTION,
        DATABASE_URL="postgresql://u:hunter2@db/x",
        HUBSPOT_CLIENT_ID="some-id",
        HUBSPOT_CLIENT_SECRET="hunter3",
    )
    shown = repr(got)
    assert "hunter" not in shown
    assert "AAAA" not in shown


@pytest.mark.parametrize(
    ("bind", "url"),
    [
        ("127.0.0.1:1", "http://127.0.0.1:1"),
        ("0.0.0.0:80", "http://127.0.0.1:80"),
        ("[::]:80", "http://127.0.0.1:80"),
        ("[::1]:80", "http://[::1]:80"),
        ("unix:/run/x.sock", "http://localhost"),
    ],
)
def test_development_finds_its_own_address(bind: str, url: str) -> None:
    """What a browser on this machine would type."""
    assert read(BIND=bind).public_url == url


NAMES = [row.name for row in table()]


@given(
    st.dictionaries(st.sampled_from(NAMES), st.text(st.characters(exclude_characters="\x00"), max_size=60))
)
@example({"DRAWBRIDGE_PUBLIC_URL": "https://[x"})
@example({"DRAWBRIDGE_PUBLIC_URL": "https://h:0"})
@example({"DRAWBRIDGE_WEB_THREADS": "9" * 5000})
@example({"DRAWBRIDGE_KEYRING": "[" * 100_000})
@example({"DRAWBRIDGE_PROVIDER_TIMEOUT_SECONDS": "1e999"})
def test_any_environment_gives_settings_or_faults(environ: dict[str, str]) -> None:
    """Nothing but ConfigurationFault comes out, whatever stands in the variables."""
    got = outcome(environ, None)
    if isinstance(got, Settings):
        assert got.lease_seconds > got.provider_timeout_seconds + settings.LEASE_MARGIN
    else:
        assert got


def outcome(environ: dict[str, str], config_file: Path | None) -> Settings | tuple[str, ...]:
    try:
        return load(environ, config_file=config_file)
    except ConfigurationFault as fault:
        return fault.faults


@given(
    st.dictionaries(
        st.sampled_from([name.removeprefix("DRAWBRIDGE_").lower() for name in NAMES]),
        st.booleans() | st.integers() | st.text(max_size=20) | st.lists(st.integers() | st.text(max_size=9)),
    )
)
def test_any_toml_gives_settings_or_faults(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, object]
) -> None:
    """The same for a file with values of the wrong type."""
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(
        "\n".join(f"{name} = {json.dumps(value)}" for name, value in document.items()), encoding="utf-8"
    )
    assert outcome({}, file)
