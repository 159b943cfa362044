"""flask-smorest, made as strict as the rest: queries read our way, errors left to `problems`, every error documented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from flask_smorest import Api as SmorestApi  # type: ignore[import-untyped]
from flask_smorest import Blueprint as SmorestBlueprint
from webargs.flaskparser import FlaskParser

from app.errors import InvalidRequest
from app.web.arguments import read_query

__all__ = ["Api", "ApiBlueprint", "View", "error_response"]

View = Callable[..., Any]


def error_response(status: int) -> str:
    """The name under which the description keeps an error's answer."""
    return f"Problem{status}"


class Api(SmorestApi):  # type: ignore[misc]
    """Writes the description, and answers no error itself."""

    DEFAULT_ERROR_RESPONSE_NAME: ClassVar[str | None] = None

    def _register_error_handlers(self) -> None:
        """`problems` answers them all."""


class _StrictQuery(FlaskParser):
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
    """A blueprint of API routes; each decorator is the library's with a type to it."""

    ARGUMENTS_PARSER: Final = _StrictQuery()

    def on(self, method: str, rule: str) -> Callable[[View], View]:
        """Put the view on a path."""
        decorate: Callable[[View], View] = self.route(rule, methods=[method])
        return decorate

    def first(self, check: Callable[[], None]) -> Callable[[], None]:
        """Run this before any view."""
        self.before_request(check)
        return check

    def query(self, schema: type) -> Callable[[View], View]:
        """Take the query by this schema; a wrong one is 400."""
        decorate: Callable[[View], View] = self.arguments(schema, location="query", error_status_code=400)
        return decorate

    def answers(self, status: int, schema: type | None = None, **more: Any) -> Callable[[View], View]:
        """The usual answer."""
        decorate: Callable[[View], View] = self.response(status, schema, **more)
        return decorate

    def may_answer(self, status: int, **more: Any) -> Callable[[View], View]:
        """Document another answer."""
        decorate: Callable[[View], View] = self.alt_response(status, **more)
        return decorate

    def errors(self, *statuses: int) -> Callable[[View], View]:
        """Document that the view may answer with these errors."""

        def decorate(view: View) -> View:
            for status in statuses:
                view = self.may_answer(status, response=error_response(status))(view)
            return view

        return decorate

    def open_to_all(self, view: View) -> View:
        """Document that no credential is needed."""
        decorate: Callable[[View], View] = self.doc(security=[])
        return decorate(view)
