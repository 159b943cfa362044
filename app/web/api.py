"""flask-smorest, made as strict as the rest: queries read our way, errors left to `problems`, every error documented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from flask_smorest import Api as SmorestApi
from flask_smorest import Blueprint as SmorestBlueprint
from webargs.flaskparser import FlaskParser

from app.errors import InvalidRequest
from app.web.arguments import read_query

__all__ = ["Api", "ApiBlueprint", "error_response"]

_View = Callable[..., Any]


def error_response(status: int) -> str:
    """The name under which the description keeps an error's answer."""
    return f"Problem{status}"


class Api(SmorestApi):  # type: ignore[misc]
    """Writes the description, and answers no error itself."""

    DEFAULT_ERROR_RESPONSE_NAME: ClassVar[str | None] = None

    def _register_error_handlers(self) -> None:
        """`problems` answers them all."""


class _StrictQuery(FlaskParser):  # type: ignore[misc]
    """Reads queries our way and leaves only the checking of values to the schema."""

    def load_querystring(self, req: Any, schema: Any) -> Mapping[str, str]:
        """Each parameter once; names are checked here so that the fault is told as everywhere else."""
        return read_query(req.environ.get("QUERY_STRING", ""), allowed=tuple(schema.fields))

    def handle_error(
        self, error: Any, req: Any, schema: Any, *, error_status_code: Any, error_headers: Any
    ) -> Any:
        """Say which parameter is wrong, without repeating its value."""
        faults = error.messages.get("query", {})
        raise InvalidRequest(" ".join(f"{name}: {' '.join(said)}" for name, said in sorted(faults.items())))


class ApiBlueprint(SmorestBlueprint):  # type: ignore[misc]
    """A blueprint of API routes."""

    ARGUMENTS_PARSER: Final = _StrictQuery()

    def query(self, schema: type) -> Callable[[_View], _View]:
        """Take the query by this schema; a wrong one is 400."""
        decorated: Callable[[_View], _View] = self.arguments(schema, location="query", error_status_code=400)
        return decorated

    def errors(self, *statuses: int) -> Callable[[_View], _View]:
        """Document that the view may answer with these errors."""

        def decorate(view: _View) -> _View:
            for status in statuses:
                view = self.alt_response(status, error_response(status))(view)
            return view

        return decorate
