"""The image and the compose file keep what their comments promise.

No container is built here (that needs a daemon and minutes); what is read is the text a build would follow.
"""

import fnmatch
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LEASE_SECONDS = 45  # the default of DRAWBRIDGE_LEASE_SECONDS
SECRET_SETTINGS = ("KEYRING", "DATABASE_URL", "HUBSPOT_CLIENT_SECRET", "SALESFORCE_CLIENT_SECRET")


class Instruction(NamedTuple):
    """One instruction of a Dockerfile with its arguments as written, continued lines joined."""

    word: str
    rest: str


def stages() -> list[list[Instruction]]:
    """Return the instructions of each stage, the final one last."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", text)
    found: list[list[Instruction]] = []
    for line in filter(None, joined.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append(Instruction(word, rest))
    return found


def final(word: str) -> list[str]:
    """Return the arguments of every such instruction in the final stage."""
    return [instruction.rest for instruction in stages()[-1] if instruction.word == word]


def image_environment() -> dict[str, str]:
    """Return the variables the image sets."""
    return dict(pair.split("=", 1) for rest in final("ENV") for pair in shlex.split(rest))


def compose() -> dict[str, Any]:
    """Parse the compose file."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "config" / "compose.yaml").read_text())
    return document


def seconds(duration: str) -> int:
    """Read the durations the compose file uses."""
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def test_every_stage_starts_from_a_tagged_slim_python() -> None:
    """Both stages share one base of a named version, so that the environment fits the Python running it."""
    bases = [stage[0].rest.split(" AS ")[0] for stage in stages()]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.11[\w.]*-slim-\w+", bases[0])


def test_environment_is_the_locked_one_made_by_the_launchers_uv() -> None:
    """The image installs what uv.lock says, without test tools, with the uv version the launcher pins."""
    runs = " && ".join(instruction.rest for instruction in stages()[0] if instruction.word == "RUN")
    launcher = (ROOT / "drawbridge").read_text()
    pinned = re.search(r'^UV_VERSION = "(.+)"$', launcher, flags=re.MULTILINE)
    assert pinned is not None
    assert f"uv=={pinned.group(1)}" in shlex.split(runs)
    assert "uv sync --locked --no-dev" in runs
    assert not any("uv" in shlex.split(rest) or "pip" in shlex.split(rest) for rest in final("RUN"))


def test_container_runs_as_a_numbered_user_who_owns_the_state_volume_alone() -> None:
    """Nothing is copied for that user to own; what may change is the volume."""
    user = final("USER")
    assert user == ["10001:10001"]
    assert final("VOLUME") == ['["/var/lib/drawbridge"]']
    assert image_environment()["DRAWBRIDGE_STATE_DIR"] == "/var/lib/drawbridge"
    assert not any("--chown" in rest or "--chmod" in rest for rest in final("COPY"))
    words = [instruction.word for instruction in stages()[-1]]
    assert not {"RUN", "COPY"} & set(words[words.index("USER") :])


def test_nothing_is_written_outside_volume_and_tmp() -> None:
    """With a read-only root, byte code stays unwritten and the default database lies in the volume."""
    assert image_environment()["PYTHONDONTWRITEBYTECODE"] == "1"
    assert "ln -s /var/lib/drawbridge var" in " && ".join(final("RUN"))
    assert "DRAWBRIDGE_DATABASE_URL" not in image_environment()


def test_image_sets_no_secret_and_starts_in_production() -> None:
    """A container without a keyring must refuse to start, and none is baked in."""
    assert image_environment()["DRAWBRIDGE_ENVIRONMENT"] == "production"
    assert not {f"DRAWBRIDGE_{name}" for name in SECRET_SETTINGS} & image_environment().keys()
    assert not any(instruction.word == "ARG" for stage in stages() for instruction in stage)


def test_program_stops_by_sigterm_and_takes_its_command_as_argument() -> None:
    """The program is process 1 without a shell between, so that SIGTERM reaches it; web is the default."""
    assert final("STOPSIGNAL") == ["SIGTERM"]
    assert [json.loads(rest) for rest in final("ENTRYPOINT")] == [["python", "-m", "app"]]
    assert [json.loads(rest) for rest in final("CMD")] == [["web"]]


def test_health_check_tells_a_live_server_from_a_failing_one(
    httpserver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very program of the health check ends well on 200 from /livez and badly on anything else."""
    options, _, command = final("HEALTHCHECK")[0].partition("CMD ")
    assert {"--interval", "--timeout", "--start-period"} <= {word.split("=")[0] for word in options.split()}
    python, flag, program = json.loads(command)
    assert (python, flag) == ("python", "-c")
    assert image_environment()["DRAWBRIDGE_BIND"].endswith(":8080")
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    here = compile(
        program.replace("http://127.0.0.1:8080", httpserver.url_for("").rstrip("/")), "check", "exec"
    )
    httpserver.expect_oneshot_request("/livez").respond_with_data("")
    exec(here, {})  # noqa: S102
    httpserver.expect_oneshot_request("/livez").respond_with_data("", status=503)
    with pytest.raises(OSError, match="503"):
        exec(here, {})  # noqa: S102


def test_build_context_holds_only_what_is_copied() -> None:
    """Everything is kept out but what the image copies, so that no key or database slips into a layer."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = [
        source
        for stage in stages()
        for instruction in stage
        if instruction.word == "COPY"
        for source in sources(instruction.rest)
    ]
    assert allowed == set(copied)
    assert any(fnmatch.fnmatch("app/__pycache__", line) for line in lines[1:])


def sources(rest: str) -> list[str]:
    """Return what a COPY takes from the build context."""
    return [] if rest.startswith("--from=") else rest.split()[:-1]


@pytest.mark.parametrize("name", ["web", "worker", "migrate"])
def test_service_is_locked_down_and_given_time_to_stop(name: str) -> None:
    """Each process of ours runs read-only, without capabilities, and may finish a refresh it has begun."""
    service = compose()["services"][name]
    assert service["command"] == [name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["tmpfs"] == ["/tmp"]  # noqa: S108
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["volumes"] == ["state:/var/lib/drawbridge"]
    assert seconds(service["stop_grace_period"]) >= LEASE_SECONDS + 25


def test_secrets_come_from_files_and_never_by_value() -> None:
    """Each secret setting is given as a file of a compose secret that exists, outside the checkout."""
    document = compose()
    environment = document["services"]["web"]["environment"]
    for name in SECRET_SETTINGS:
        assert f"DRAWBRIDGE_{name}" not in environment
        assert environment[f"DRAWBRIDGE_{name}_FILE"] == f"/run/secrets/{name.lower()}"
        assert name.lower() in document["services"]["web"]["secrets"]
    folders = {str(Path(secret["file"]).parent) for secret in document["secrets"].values()}
    assert folders == {"${DRAWBRIDGE_SECRETS_DIR:-/etc/drawbridge}"}


def test_database_is_migrated_before_anything_serves() -> None:
    """Web and worker start on a healthy database whose tables are up to date."""
    services = compose()["services"]
    for name in ("web", "worker"):
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert "pg_isready" in services["postgres"]["healthcheck"]["test"]


def test_database_and_broker_are_not_offered_to_other_hosts() -> None:
    """PostgreSQL has no port on the host and no way out; the broker is reached through a proxy here."""
    document = compose()
    assert "ports" not in document["services"]["postgres"]
    assert document["services"]["postgres"]["networks"] == ["inside"]
    assert document["networks"]["inside"] == {"internal": True}
    assert all(port.startswith("127.0.0.1:") for port in document["services"]["web"]["ports"])
