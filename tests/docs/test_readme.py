"""README says what the code says."""

import re

from tests.docs.tables import README, with_tables


def test_tables_are_those_of_the_code() -> None:
    """The settings and the error codes in README are the code's; `python -m tests.docs.tables` brings them up to date."""
    text = README.read_text()
    assert with_tables(text) == text


def test_promised_folders_exist() -> None:
    """Every package in README's map is there."""
    packages = set(re.findall(r"app\.([a-z_0-9]+)", README.read_text().split("```")[5]))
    root = README.parent / "app"
    missing = [
        name for name in packages if not (root / name).is_dir() and not (root / f"{name}.py").is_file()
    ]
    assert packages
    assert not missing
