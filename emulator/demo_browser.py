"""A browser for the demo: cookies, redirects and forms over real HTTP, and no eyes."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Final
from urllib.parse import urljoin

import requests

__all__ = ["Browser", "BrowserError"]

_TIMEOUT: Final = 20.0


class BrowserError(RuntimeError):
    """A page did not come, or has not the form that was expected; the message says which."""


@dataclass(slots=True)
class _Form:
    """One form of a page: where it goes and what it carries by itself."""

    action: str
    fields: dict[str, str] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)


class Browser:
    """Goes to pages and presses buttons; `page` is the text of the present one, `url` its address."""

    def __init__(self) -> None:
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the machine's owner knows nothing of this loopback
        self.url = ""
        self.page = ""
        self.visited: list[str] = []

    def go(self, url: str) -> None:
        """Open a page and follow its redirects; raises BrowserError unless it comes with 200."""
        self._arrive(self._session.get(url, timeout=_TIMEOUT))

    def submit(self, action: str, **given: str) -> None:
        """Post the form that goes to `action`, with its hidden fields, the first choice of each list, and what is given."""
        form = _form_to(action, self.page)
        if form is None:
            raise BrowserError(f"{_bare(self.url)} shows no form that goes to {action or 'itself'}")
        chosen = {name: values[0] for name, values in form.choices.items() if values}
        data = form.fields | chosen | given
        self._arrive(self._session.post(urljoin(self.url, form.action), data=data, timeout=_TIMEOUT))

    def _arrive(self, answer: requests.Response) -> None:
        steps = [*answer.history, answer]
        self.visited = [f"{step.status_code} {_bare(step.url)}" for step in steps]
        self.url, self.page = answer.url, answer.text
        if answer.status_code != 200:
            raise BrowserError(f"{_bare(answer.url)} answered {answer.status_code}")


def _bare(url: str) -> str:
    """An address without its query, which may hold a code."""
    return url.partition("?")[0]


def _form_to(action: str, page: str) -> _Form | None:
    reader = _Forms()
    reader.feed(page)
    return next((form for form in reader.forms if form.action == action), None)


class _Forms(HTMLParser):
    """Collects the forms that are posted, with their hidden fields and the options of their lists."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[_Form] = []
        self._form: _Form | None = None
        self._list = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form" and given.get("method", "get").lower() == "post":
            self._form = _Form(given.get("action", ""))
            self.forms.append(self._form)
        elif self._form is None:
            return
        elif tag == "input" and given.get("name") and given.get("type") == "hidden":
            self._form.fields[given["name"]] = given.get("value", "")
        elif tag == "select":
            self._list = given.get("name", "")
        elif tag == "option" and self._list:
            self._form.choices.setdefault(self._list, []).append(given.get("value", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = None
        elif tag == "select":
            self._list = ""
