"""The console: one page that shows every connection and lets an admin act on it.

Owns signing in and out and the forms. Must never know a token, nor decide anything the API decides otherwise: both call the
same functions of `broker`.

Decision: there is no script. Each action is a form with a CSRF token and answers with a redirect, so the page works in every
browser and its policy can forbid all code; the price is that nothing on it moves by itself.
"""

from typing import Final

from flask import Blueprint

from app.web.admin import console, session

__all__ = ["blueprint"]

blueprint: Final = Blueprint("admin", __name__)
session.register(blueprint)
console.register(blueprint)
