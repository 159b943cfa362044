"""The description is held to the program: whatever it promises, requests made from it must find."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from werkzeug.serving import make_server

from tests.web_stage import Stage

DAYS = 3 * 86_400
METHODS = ("get", "post", "delete")
# 503 is a described answer here: a second forced refresh within 30 seconds is told to come back.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "503"]

[[operations]]
include-path-regex = "/token$"
parameters = {{ name = "{name}" }}
"""


@contextmanager
def served(stage: Stage) -> Iterator[str]:
    """The application on a real socket; its address."""
    server = make_server("127.0.0.1", 0, stage.app, threaded=True)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def described(stage: Stage) -> dict[str, Any]:
    """Every path with its operations."""
    paths: dict[str, Any] = stage.ask("/openapi.json", caller=None).json["paths"]
    return {path: {name: item[name] for name in METHODS if name in item} for path, item in paths.items()}


def test_every_promise_of_the_description_holds(stage: Stage, tmp_path: Path) -> None:
    """schemathesis finds nothing: right requests are taken, wrong ones refused, all answers are as described."""
    # Half of a token's life must exceed the largest min_ttl that is described, or a described request would be refused.
    stage.emulator.control.hubspot.settings(token_lifetime=DAYS)
    name = stage.connect(account="101").name
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(name=name))
    with served(stage) as url:
        run = subprocess.run(
            [
                str(Path(sys.executable).parent / "schemathesis"),
                f"--config-file={config}",
                "run",
                f"{url}/openapi.json",
                "--checks=all",
                "--max-examples=25",
                "--seed=1",
                "--no-color",
                f"--header=Authorization: {stage.basic('caller')}",
            ],
            check=False,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert run.returncode == 0, run.stdout[-8000:]
    count = sum(len(operations) for operations in described(stage).values())
    assert f"Tested: {count}" in run.stdout


def test_a_method_that_is_not_described_is_405_and_names_those_that_are(stage: Stage) -> None:
    """405 carries Allow (RFC 9110 §15.5.6)."""
    for path, operations in described(stage).items():
        real = path.replace("{name}", "some-name")
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            if method.lower() in operations:
                continue
            answer = stage.ask(real, method=method)
            assert answer.status == 405, (method, path, answer.status)
            allowed = set(answer.raw.headers["Allow"].split(", ")) - {"HEAD"}
            assert allowed == {name.upper() for name in operations}


def test_every_route_of_the_api_is_described(stage: Stage) -> None:
    """Nothing under /v1 or /oauth answers without being in the description, and the other way round."""
    routes = {
        (rule.rule.replace("<name:name>", "{name}"), method.lower())
        for rule in stage.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.rule.startswith(("/v1/", "/oauth/", "/.well-known/"))
    }
    api = {
        (path, method)
        for path, operations in described(stage).items()
        for method in operations
        if path.startswith(("/v1/", "/oauth/", "/.well-known/"))
    }
    assert routes == api


def test_the_docs_show_every_operation_and_no_foreign_host(stage: Stage) -> None:
    """The page is made of the description, works without a script and loads nothing from elsewhere."""
    page = stage.ask("/docs", caller=None)
    for path, operations in described(stage).items():
        for method in operations:
            assert f"{method.upper()} {path}" in page.text
    assert "<script" not in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_every_type_of_a_problem_leads_to_a_page(stage: Stage) -> None:
    """`type` resolves, for each code the description lists."""
    document = stage.ask("/openapi.json", caller=None).json
    codes = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert {"unauthenticated", "needs_reconnect", "refresh_in_progress", "internal"} <= set(codes)
    for code in codes:
        page = stage.ask(f"/problems/{code}", caller=None)
        assert page.status == 200
        assert code in page.text
    assert stage.ask("/problems/none", caller=None).status == 404
