"""The yardstick: a Flask route that returns the same bytes and headers and does nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from flask import Flask, Response


def create_app() -> Flask:
    """An app whose one route answers with the body in the file BARE_BODY."""
    app = Flask(__name__)
    body = Path(os.environ["BARE_BODY"]).read_bytes()

    @app.get("/v1/connections/<name>/token")
    def token(name: str) -> Response:
        answer = Response(body, mimetype="application/json")
        answer.headers["Cache-Control"] = "no-store"
        return answer

    return app
