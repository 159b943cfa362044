"""Everything an operator can set, read once at start: the environment over `config/settings.toml` over the
defaults.

Each setting is one line of `_SETTINGS`: its field, its default and its help, from which the schema, the
table in the README and the messages come. Faults are collected and told all at once, by the names of the
settings and never with their values, for a value may be a secret put into the wrong place.

Decision: a name that begins with DRAWBRIDGE_ and is not a setting is a fault, so that a typing error cannot
leave a default in force unnoticed. The price is that a newer setting in the environment stops an older
version.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import SplitResult, urlsplit

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate

from app.errors import ConfigurationFault
from app.secret import Secret

__all__ = ["LEASE_MARGIN", "PREFIX", "Row", "Settings", "load", "table"]

_ROOT: Final = Path(__file__).resolve().parent.parent
PREFIX: Final = "DRAWBRIDGE_"

LEASE_MARGIN: Final = 10.0
"""Seconds a lease must outlast the provider's time-out: the answer is journalled, fsynced and stored within
them.
"""

_FILE: Final = "_FILE"
_TESTS: Final = "DRAWBRIDGE_TEST_"  # read by the test suite, never by the program
_LARGEST_FILE: Final = 65_536
_SHORTEST_SECRET: Final = 16
"""Characters; a shared secret somebody typed is guessed, one from a generator is longer than this anyway."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The checked settings of one installation; durations in seconds."""

    # The URL may hold a password, so it is not shown.
    database_url: str = field(repr=False)
    state_dir: Path
    public_url: str
    bind: str
    environment: Literal["development", "production"]
    keyring: Secret | None
    # Where the keyring came from, if from a file: `keys add` writes there, and changes of it are noticed.
    keyring_file: Path | None
    hubspot_client_id: str | None
    hubspot_client_secret: tuple[Secret, ...]
    hubspot_app_id: str | None
    hubspot_scopes: tuple[str, ...]
    hubspot_optional_scopes: tuple[str, ...]
    hubspot_api_url: str
    hubspot_authorize_url: str
    hubspot_oauth_version: str
    hubspot_api_version: str
    hubspot_pkce: bool
    salesforce_client_id: str | None
    salesforce_client_secret: tuple[Secret, ...]
    salesforce_login_url: str
    salesforce_scopes: tuple[str, ...]
    salesforce_api_version: str
    refresh_ahead_seconds: float
    provider_timeout_seconds: float
    lease_seconds: float
    outage_grace_seconds: float
    web_threads: int
    web_workers: int
    trusted_proxies: tuple[Network, ...]
    metrics_bind: str | None
    metrics_token: Secret | None
    log_level: str
    audit_retention_days: int
    allow_loopback_providers: bool
    notice_url: str | None
    notice_secret: Secret | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of settings: the full name, the default as it would be written, help, and
    whether it is a secret, which `config/settings.toml` may not hold.
    """

    name: str
    default: str | None
    help: str
    secret: bool


def load(environ: Mapping[str, str], *, config_file: Path | None) -> Settings:
    """The settings of this process. Raises ConfigurationFault that lists every fault.

    An empty value counts as not set. `NAME_FILE` in the environment names a file whose text, without the
    line end, is the value of `NAME`. A `config_file` that is given must exist.
    """
    told = _Told([], set())
    given = _from_file(config_file, told) | _from_environment(environ, told)
    values = _parsed(given, told)
    for name, sentence in _contradictions(values):
        # A value that could not be read is no ground for a second complaint.
        if name not in told.broken:
            told.fault(name, sentence)
    if told.faults:
        raise ConfigurationFault(list(dict.fromkeys(told.faults)))
    if values["public_url"] is None:
        values["public_url"] = _own_url(values["bind"])
    values["state_dir"] = _anchored(values["state_dir"])
    values["database_url"] = _anchored_url(values["database_url"])
    file = environ.get(f"{PREFIX}KEYRING{_FILE}")
    return Settings(**values, keyring_file=Path(file).absolute() if file else None)


def _anchored(path: Path) -> Path:
    """A relative path counts from the project's folder, so that every command finds the same data wherever it is run."""
    return _ROOT / path


def _anchored_url(url: str) -> str:
    scheme, _, path = url.partition("sqlite:///")
    return f"sqlite:///{_ROOT / path}" if not scheme and path else url


def _own_url(bind: str) -> str:
    """Where a browser on this machine finds what listens there."""
    host, _, port = bind.rpartition(":")
    if host in ("", "unix"):
        return "http://localhost"
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"  # noqa: S104 - compared, not bound


def table() -> tuple[Row, ...]:
    """Every setting, in the order they are explained in."""
    return tuple(Row(f"{PREFIX}{name}", one.default, one.help, one.secret) for name, one in _SETTINGS.items())


@dataclass(frozen=True, slots=True)
class _Told:
    """The faults told so far, and the settings they are about."""

    faults: list[str]
    broken: set[str]

    def fault(self, name: str, sentence: str) -> None:
        self.faults.append(f"{PREFIX}{name} {sentence}")
        self.broken.add(name)


# -- where values come from


def _from_environment(environ: Mapping[str, str], told: _Told) -> dict[str, Any]:
    ours = {name.removeprefix(PREFIX): value for name, value in environ.items() if _is_ours(name)}
    files = {f"{name}{_FILE}": name for name in _SETTINGS}
    for name in ours:
        if name not in _SETTINGS and name not in files:
            told.faults.append(f"{PREFIX}{name} is not a setting{_nearest(name)}")
    given: dict[str, Any] = {name: value for name, value in ours.items() if name in _SETTINGS and value}
    for variable, name in files.items():
        if not ours.get(variable):
            continue
        if name in given:
            told.fault(name, f"and {PREFIX}{variable} are both given; keep one.")
        else:
            given |= _file_value(name, Path(ours[variable]), told)
    return given


def _is_ours(name: str) -> bool:
    return name.startswith(PREFIX) and not name.startswith(_TESTS)


def _file_value(name: str, file: Path, told: _Told) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            text = stream.read(_LARGEST_FILE + 1)
        if len(text) <= _LARGEST_FILE:
            value = text.decode().rstrip("\r\n")
            return {name: value} if value else {}
        sentence = f"names a file larger than {_LARGEST_FILE} bytes."
    except OSError as error:
        sentence = f"names a file that cannot be read: {error.strerror}."
    except ValueError:
        sentence = "names a file that is not UTF-8 text."
    told.broken.add(name)
    told.faults.append(f"{PREFIX}{name}{_FILE} {sentence}")
    return {}


def _from_file(config_file: Path | None, told: _Told) -> dict[str, Any]:
    if config_file is None:
        return {}
    try:
        document = tomllib.loads(config_file.read_text(encoding="utf-8"))
    except OSError as error:
        told.faults.append(f"The settings file {config_file} cannot be read: {error.strerror}.")
        return {}
    except ValueError:
        told.faults.append(f"The settings file {config_file} is not TOML in UTF-8.")
        return {}
    given = {}
    for key, value in document.items():
        name = key.upper()
        if name not in _SETTINGS:
            told.faults.append(f"{key} in {config_file} is not a setting{_nearest(name)}")
        elif _SETTINGS[name].secret or (name == "DATABASE_URL" and _has_password(value)):
            told.faults.append(
                f"{key} in {config_file} is a secret; set {PREFIX}{name} or {PREFIX}{name}{_FILE}."
            )
        elif value != "":
            given[name] = value
    return given


def _has_password(url: object) -> bool:
    return isinstance(url, str) and "@" in url and ":" in url.partition("://")[2].rpartition("@")[0]


def _nearest(name: str) -> str:
    known = [*_SETTINGS, *(f"{one}{_FILE}" for one in _SETTINGS)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {PREFIX}{close[0]}?" if close else "."


# -- from text to values


def _parsed(given: Mapping[str, Any], told: _Told) -> dict[str, Any]:
    """Every setting as its value; one that is absent or broken as its default, or None."""
    schema = Schema.from_dict({name: one.field for name, one in _SETTINGS.items()})(unknown=EXCLUDE)
    defaults = {name: one.default for name, one in _SETTINGS.items() if one.default is not None}
    try:
        values: Mapping[str, Any] = schema.load(defaults | dict(given))
    except ValidationError as error:
        for name, sentences in error.messages_dict.items():
            told.fault(name, " ".join(map(str, sentences)))
        values = error.valid_data if isinstance(error.valid_data, dict) else {}
    return {name.lower(): values.get(name, one.absent) for name, one in _SETTINGS.items()}


class _Read(fields.Field[Any]):
    """A setting read by a function from text to value, which raises ValidationError with the rest of a
    sentence.
    """

    def __init__(self, read: Callable[[str], Any]) -> None:
        super().__init__()
        self._read = read

    def _deserialize(self, value: Any, attr: str | None, data: Any, **_: Any) -> Any:
        return self._read(_text(value))


class _Number(fields.Float):
    """A finite number of seconds within bounds."""

    def __init__(self, least: float, most: float) -> None:
        super().__init__(validate=_range(least, most), error_messages=_same("is not a number."))


class _Whole(fields.Integer):
    """A whole number within bounds."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__(validate=_range(least, most), error_messages=_same("is not a whole number."))


class _Switch(fields.Boolean):
    """true or false, in the spellings marshmallow knows."""

    def __init__(self) -> None:
        super().__init__(error_messages=_same("is neither true nor false."))


def _same(sentence: str) -> dict[str, Any]:
    """One sentence for every way in which a value is not what it should be."""
    return dict.fromkeys(("invalid", "special", "too_large", "null", "required"), sentence)


def _range(least: float, most: float) -> validate.Range:
    return validate.Range(least, most, error=f"is not between {least:g} and {most:g}.")


def _text(value: object) -> str:
    """TOML has lists and numbers where the environment has text."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return " ".join(value)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).strip()
    raise ValidationError("is not text.")


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        for word in words:
            if text.lower() == word.lower():
                return word
        raise ValidationError(f"is not one of {', '.join(words)}.")

    return read


def _matching(pattern: str, *, like: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValidationError(f"does not look like {like}.")
        return text

    return read


def _secret(text: str) -> Secret:
    return Secret(text)


def _secrets(text: str) -> tuple[Secret, ...]:
    """A comma list, newest first."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValidationError("has an empty part between its commas.")
    return tuple(map(Secret, parts))


def _shared_secret(text: str) -> Secret:
    if len(text) < _SHORTEST_SECRET:
        raise ValidationError(f"is shorter than {_SHORTEST_SECRET} characters.")
    return Secret(text)


def _keyring(text: str) -> Secret:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise ValidationError('is not JSON; it looks like {"active":"k1","keys":{"k1":"…"}}.') from None
    return Secret(text)


def _scopes(text: str) -> tuple[str, ...]:
    """Scope tokens (RFC 6749 §3.3) between spaces or commas, each once, in the order given."""
    scopes = [scope for scope in re.split(r"[\s,]+", text) if scope]
    if any(re.fullmatch(r"[\x21\x23-\x5B\x5D-\x7E]+", scope) is None for scope in scopes):
        raise ValidationError("holds a scope with characters no scope may have (RFC 6749 §3.3).")
    return tuple(dict.fromkeys(scopes))


def _networks(text: str) -> tuple[Network, ...]:
    networks = []
    for part in text.replace(",", " ").split():
        try:
            networks.append(ipaddress.ip_network(part))
        except ValueError:
            raise ValidationError(
                "holds something that is not an address range such as 10.0.0.0/8."
            ) from None
        if networks[-1].prefixlen == 0:
            raise ValidationError("trusts every address there is.")
    return tuple(networks)


def _bind(text: str) -> str:
    """host:port, [v6]:port or unix:/path, as gunicorn takes them."""
    if re.fullmatch(r"unix:/\S+", text):
        return text
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    valid_host = re.fullmatch(r"[A-Za-z0-9.-]+", host) or (bracketed and ":" in host)
    if not valid_host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValidationError("is not host:port or unix:/path.")
    return text


def _database(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if scheme == "postgres":
        raise ValidationError("begins with postgres://; write postgresql://.")
    if not separator or scheme not in ("sqlite", "postgresql"):
        raise ValidationError("is neither sqlite:///file nor postgresql://user@host/database.")
    if scheme == "sqlite" and (not re.fullmatch(r"/[^?#]+", rest) or rest == "/:memory:"):
        raise ValidationError(
            "does not name a file; write sqlite:///relative/file.db or sqlite:////absolute/file.db."
        )
    if scheme == "postgresql" and _split(text) is None:
        raise ValidationError("is not a valid postgresql:// URL.")
    return text


def _origin(text: str) -> str:
    parts = _split(_url(text))
    assert parts is not None
    if parts.path.strip("/"):
        raise ValidationError("has a path; it must be scheme and host alone.")
    return f"{parts.scheme}://{parts.netloc.lower()}"


def _url(text: str) -> str:
    """http or https with a host; whether http may be is decided with the other settings in view."""
    parts = _split(text)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValidationError("is not an https URL.")
    if parts.username is not None or parts.password is not None:
        raise ValidationError("holds a user name or password.")
    if parts.query or parts.fragment:
        raise ValidationError("has a query or a fragment.")
    return text.rstrip("/")


def _split(text: str) -> SplitResult | None:
    """The parts of a URL, or None when it has none that make sense."""
    if re.search(r"[\x00-\x20\x7f\\]", text):
        return None
    try:
        parts = urlsplit(text)
        return parts if parts.port != 0 else None
    except ValueError:
        return None


# -- what cannot be together

_PROVIDER_URLS: Final = ("HUBSPOT_API_URL", "HUBSPOT_AUTHORIZE_URL", "SALESFORCE_LOGIN_URL")


def _contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and fault of every setting that does not go with another one."""
    if values["environment"] == "production":
        yield from _unsafe_in_production(values)
    loopback = bool(values["allow_loopback_providers"])
    for name in _PROVIDER_URLS:
        yield from _misdirected(name, values[name.lower()], allow_loopback=loopback)
    yield from _misdirected("NOTICE_URL", values["notice_url"], allow_loopback=loopback)
    yield from _half_given(values)
    yield from _bad_scopes(values)
    yield from _short_lease(values)


def _unsafe_in_production(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    public = values["public_url"]
    if public is None:
        yield (
            "PUBLIC_URL",
            "is needed in production: the https address under which this installation is reached.",
        )
    elif not public.startswith("https://"):
        yield "PUBLIC_URL", "is not https, which production demands."
    if values["keyring"] is None:
        yield "KEYRING", "is needed in production, which never invents a key."
    if values["allow_loopback_providers"]:
        yield "ALLOW_LOOPBACK_PROVIDERS", "is for tests and the demo; production refuses it."


def _misdirected(name: str, url: str | None, *, allow_loopback: bool) -> Iterator[tuple[str, str]]:
    if url is None:
        return
    loopback = _is_loopback(urlsplit(url).hostname or "")
    if loopback and not allow_loopback:
        yield name, f"points at this machine; only tests and the demo may ({PREFIX}ALLOW_LOOPBACK_PROVIDERS)."
    elif not loopback and not url.startswith("https://"):
        yield name, "is not https."


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_PAIRS: Final = (
    ("HUBSPOT_CLIENT_ID", "HUBSPOT_CLIENT_SECRET"),
    ("HUBSPOT_CLIENT_SECRET", "HUBSPOT_CLIENT_ID"),
    # A Salesforce app without a secret may be: JWT bearer needs none.
    ("SALESFORCE_CLIENT_SECRET", "SALESFORCE_CLIENT_ID"),
    ("NOTICE_URL", "NOTICE_SECRET"),
    ("NOTICE_SECRET", "NOTICE_URL"),
)


def _half_given(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for given, needed in _PAIRS:
        if values[given.lower()] and not values[needed.lower()]:
            yield needed, f"is needed with {PREFIX}{given}."


def _bad_scopes(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "oauth" not in values["hubspot_scopes"]:
        yield "HUBSPOT_SCOPES", "lacks oauth, which every HubSpot app has."
    if set(values["hubspot_scopes"]) & set(values["hubspot_optional_scopes"]):
        yield "HUBSPOT_OPTIONAL_SCOPES", f"repeats scopes of {PREFIX}HUBSPOT_SCOPES."
    if not {"refresh_token", "offline_access"} & set(values["salesforce_scopes"]):
        yield "SALESFORCE_SCOPES", "lacks refresh_token, without which Salesforce gives no refresh token."


def _short_lease(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    lease, timeout = values["lease_seconds"], values["provider_timeout_seconds"]
    if lease is not None and timeout is not None and lease <= timeout + LEASE_MARGIN:
        needed = f"{PREFIX}PROVIDER_TIMEOUT_SECONDS ({timeout:g}) and a margin of {LEASE_MARGIN:g} seconds"
        yield "LEASE_SECONDS", f"({lease:g}) must be more than {needed} together."


# -- the settings


@dataclass(frozen=True, slots=True)
class _Setting:
    field: fields.Field[Any]
    help: str
    default: str | None = None
    secret: bool = False
    absent: Any = None


_SETTINGS: Final[Mapping[str, _Setting]] = {
    "DATABASE_URL": _Setting(
        _Read(_database),
        "Where everything is kept: `sqlite:///file` for one machine, `postgresql://user:password@host/name` "
        "to scale out. A password belongs in the environment.",
        "sqlite:///var/drawbridge.db",
    ),
    "STATE_DIR": _Setting(
        _Read(Path),
        "Directory for what must survive outside the database: journal, audit reserve, development keyring, "
        "metrics. A persistent volume in containers.",
        "./var",
    ),
    "PUBLIC_URL": _Setting(
        _Read(_origin),
        "Scheme and host under which browsers, HubSpot and Salesforce reach this installation. Needed and "
        "https in production; otherwise `http://` and BIND.",
    ),
    "BIND": _Setting(_Read(_bind), "Address and port the web server listens on.", "127.0.0.1:8080"),
    "ENVIRONMENT": _Setting(
        _Read(_one_of("development", "production")),
        "`production` demands https and a keyring and refuses loopback providers; `development` makes a "
        "keyring itself.",
        "development",
    ),
    "KEYRING": _Setting(
        _Read(_keyring),
        'The key encryption keys: `{"active":"k2","keys":{"k1":"<base64, 32 bytes>","k2":"…"}}`. Development '
        "makes one in STATE_DIR.",
        secret=True,
    ),
    "HUBSPOT_CLIENT_ID": _Setting(
        _Read(_matching(r"[A-Za-z0-9._-]{4,200}", like="a client id")),
        "Client id of the HubSpot app called `default`.",
    ),
    "HUBSPOT_CLIENT_SECRET": _Setting(
        _Read(_secrets),
        "Its client secret; during a rotation a comma list, newest first.",
        secret=True,
        absent=(),
    ),
    "HUBSPOT_APP_ID": _Setting(
        _Read(_matching(r"[0-9]{1,18}", like="a number")),
        "Its numeric app id, which signed calls from HubSpot carry.",
    ),
    "HUBSPOT_SCOPES": _Setting(
        _Read(_scopes),
        "Scopes an install must grant; exactly the required ones of the app.",
        "oauth crm.objects.contacts.read crm.objects.contacts.write crm.objects.companies.read "
        "crm.objects.companies.write crm.objects.deals.read crm.objects.deals.write crm.objects.owners.read "
        "crm.schemas.contacts.read crm.schemas.contacts.write crm.schemas.companies.read "
        "crm.schemas.companies.write crm.schemas.deals.read crm.schemas.deals.write",
        absent=(),
    ),
    "HUBSPOT_OPTIONAL_SCOPES": _Setting(
        _Read(_scopes),
        "Scopes an install may grant; accounts without the feature go without.",
        "crm.objects.leads.read crm.objects.leads.write sales-email-read",
        absent=(),
    ),
    "HUBSPOT_API_URL": _Setting(_Read(_origin), "HubSpot's API host.", "https://api.hubapi.com"),
    "HUBSPOT_AUTHORIZE_URL": _Setting(
        _Read(_url), "HubSpot's page that asks for consent.", "https://app.hubspot.com/oauth/authorize"
    ),
    "HUBSPOT_OAUTH_VERSION": _Setting(
        _Read(_matching(r"v[13]|\d{4}-\d{2}(-beta)?", like="2026-03")),
        "Version of HubSpot's token endpoints.",
        "2026-03",
    ),
    "HUBSPOT_API_VERSION": _Setting(
        _Read(_matching(r"\d{4}-\d{2}(-beta)?", like="2026-09")), "Version of HubSpot's CRM API.", "2026-09"
    ),
    "HUBSPOT_PKCE": _Setting(_Switch(), "Whether installs at HubSpot use PKCE (RFC 7636).", "true"),
    "SALESFORCE_CLIENT_ID": _Setting(
        _Read(_matching(r"[A-Za-z0-9._-]{4,300}", like="a consumer key")),
        "Consumer key of the Salesforce app called `default`.",
    ),
    "SALESFORCE_CLIENT_SECRET": _Setting(
        _Read(_secrets),
        "Its consumer secret; during a rotation a comma list, newest first.",
        secret=True,
        absent=(),
    ),
    "SALESFORCE_LOGIN_URL": _Setting(
        _Read(_origin),
        "Where users of Salesforce log in; My Domain is better than the shared hosts.",
        "https://login.salesforce.com",
    ),
    "SALESFORCE_SCOPES": _Setting(
        _Read(_scopes), "Scopes asked for at Salesforce.", "api id refresh_token", absent=()
    ),
    "SALESFORCE_API_VERSION": _Setting(
        _Read(_matching(r"v(3[1-9]|[4-9]\d|\d{3})\.0", like="v67.0")),
        "Version of Salesforce's REST API.",
        "v67.0",
    ),
    "REFRESH_AHEAD_SECONDS": _Setting(
        _Number(0, 86_400),
        "How long before its expiry a token is refreshed in the background; never more than a third of its "
        "life.",
        "300",
    ),
    "PROVIDER_TIMEOUT_SECONDS": _Setting(
        _Number(0.1, 300), "Total time one request to a provider may take.", "20"
    ),
    "LEASE_SECONDS": _Setting(
        _Number(0.2, 900),
        "How long one process may hold the right to refresh a connection; more than the time-out and "
        f"{LEASE_MARGIN:g} seconds.",
        "45",
    ),
    "OUTAGE_GRACE_SECONDS": _Setting(
        _Number(0, 3_600),
        "How long known valid tokens are still handed out when the database is gone; 0 stops at once.",
        "60",
    ),
    "WEB_THREADS": _Setting(_Whole(4, 512), "Threads of each web process.", "16"),
    "WEB_WORKERS": _Setting(_Whole(1, 128), "Web processes.", "2"),
    "TRUSTED_PROXIES": _Setting(
        _Read(_networks),
        "Address ranges of reverse proxies whose forwarded headers are believed; none unless set.",
        absent=(),
    ),
    "METRICS_BIND": _Setting(_Read(_bind), "An address and port of its own for `/metrics`."),
    "METRICS_TOKEN": _Setting(
        _Read(_shared_secret), "Bearer token that opens `/metrics` on the web server.", secret=True
    ),
    "LOG_LEVEL": _Setting(
        _Read(_one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")),
        "The quietest level that is logged.",
        "INFO",
    ),
    "AUDIT_RETENTION_DAYS": _Setting(_Whole(1, 36_500), "How long audit entries are kept.", "400"),
    "ALLOW_LOOPBACK_PROVIDERS": _Setting(
        _Switch(), "Lets providers live on this machine over http: for tests and the demo.", "false"
    ),
    "NOTICE_URL": _Setting(
        _Read(_url),
        "https address that is told when a connection needs to be reconnected, when a whole app begins and stops"
        " failing, and when either recovers.",
    ),
    "NOTICE_SECRET": _Setting(
        _Read(_shared_secret), "Key these notices are signed with (HMAC-SHA256).", secret=True
    ),
}
