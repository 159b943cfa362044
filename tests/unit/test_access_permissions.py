"""Permissions and their patterns."""

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access.permissions import Action, Permission
from app.errors import Unprocessable

NAMES = st.text("ab.-_1", max_size=12)


@given(st.text("ab.-_1*", min_size=1, max_size=12), NAMES)
def test_a_pattern_means_what_a_glob_with_stars_alone_means(pattern: str, name: str) -> None:
    """The linear matcher agrees with the library's regular expressions."""
    permission = Permission.parse(f"token:issue@{pattern}")
    assert permission.covers(Action.TOKEN_ISSUE, name) == fnmatch.fnmatchcase(name, pattern)


def test_many_stars_do_not_take_long() -> None:
    """A hostile pattern is matched in linear time; a backtracking matcher would not end."""
    permission = Permission.parse("token:issue@" + "a*" * 60)
    assert not permission.covers(Action.TOKEN_ISSUE, "a" * 59 + "b" * 10_000)


def test_another_action_is_not_covered() -> None:
    """A permission is for one action."""
    assert not Permission.parse("connection:read@*").covers(Action.TOKEN_ISSUE, "x")


@pytest.mark.parametrize(
    "text",
    ["", "token:issue", "token:issue@", "issue@x", "token:issue@A", "token:issue@a?", "@", "token:issue@a@b"],
)
def test_malformed_permissions_are_refused_with_a_sentence(text: str) -> None:
    """What cannot be a permission is said to be none."""
    with pytest.raises(Unprocessable, match="permission"):
        Permission.parse(text)


def test_a_permission_prints_as_it_is_written() -> None:
    """Parsing and printing are inverse."""
    assert str(Permission.parse("token:issue@hubspot-*")) == "token:issue@hubspot-*"
