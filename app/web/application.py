"""create_app: the Flask application over ready-made services."""

from __future__ import annotations

from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Final

from flask import Flask

from app.bootstrap import Services
from app.broker.upkeep import Chore
from app.web import admin, connect, connections, counting, health, oauth, openapi, problems
from app.web.arguments import LARGEST_BODY
from app.web.connections import FORCED_PLACES
from app.web.envelope import Envelope
from app.web.health import READINESS, MetricsListener, Readiness
from app.web.tokens import EXPRESS, Express, Shortcut, TokenViews

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["create_app"]

_DAY: Final = 86_400


def create_app(services: Services) -> Flask:
    """The application; making it touches neither network nor database, and several may stand side by side."""
    app = Flask(
        "app.web", static_folder="static", template_folder="templates", root_path=str(Path(__file__).parent)
    )
    app.config.update(
        # One more than is taken: werkzeug cuts a chunked body off here without a word, and whoever reads it sees that.
        MAX_CONTENT_LENGTH=LARGEST_BODY + 1,
        MAX_FORM_MEMORY_SIZE=LARGEST_BODY,
        PROVIDE_AUTOMATIC_OPTIONS=False,  # nothing here is for pages of other origins
        PROPAGATE_EXCEPTIONS=False,
        SEND_FILE_MAX_AGE_DEFAULT=_DAY,
    )
    # A second spelling of a path would be a second way past a proxy's rules.
    app.url_map.merge_slashes = False
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.extensions["drawbridge"] = services
    app.extensions[FORCED_PLACES] = BoundedSemaphore(max(1, services.settings.web_threads // 8))
    app.extensions[READINESS] = Readiness(services)
    tokens = TokenViews(services)
    _route(app, tokens)
    problems.register(app)
    counting.register(app, services.clock)
    services.upkeep.add(Chore("requests", 0.5, tokens.count))
    _wrap(app, services, tokens)
    return app


def _route(app: Flask, tokens: TokenViews) -> None:
    api = openapi.begin(app)
    tokens.register(app)
    api.register_blueprint(connections.blueprint)
    api.register_blueprint(health.blueprint)
    for pages in (oauth.blueprint, connect.blueprint, admin.blueprint, openapi.blueprint):
        app.register_blueprint(pages)
    openapi.finish(app, api)


def _wrap(app: Flask, services: Services, tokens: TokenViews) -> None:
    settings = services.settings
    inner: WSGIApplication = Shortcut(app.wsgi_app, tokens)
    metrics: MetricsListener | None = None
    if settings.metrics_bind is not None:
        inner = metrics = MetricsListener(inner, settings.metrics_bind, beside=settings.bind)
    envelope = Envelope(inner, https=settings.public_url.startswith("https://"))
    app.wsgi_app = envelope  # type: ignore[method-assign]
    app.extensions[EXPRESS] = Express(services, tokens, envelope, metrics)
