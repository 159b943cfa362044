"""Lock files name the public registries and nothing else, so that they work on every machine."""

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC_HOSTS = {"pypi.org", "files.pythonhosted.org", "registry.npmjs.org"}
LOCK_FILES = ("uv.lock", "package-lock.json", "npm-shrinkwrap.json")
# uv and npm name the source of a package under these keys; a path there is a file of one machine.
LOCAL_KEYS = {"path", "editable", "directory", "link"}
UNPUBLISHED = re.compile(r"^(file:|git\+|git:|ssh:|link:|\.{0,2}/)")


def faults(document: dict[str, Any]) -> list[str]:
    """Return every place in a parsed lock file that a stranger's machine could not install from."""
    return [f"{key}: {value}" for key, value in leaves(document) if is_fault(key, value)]


def is_fault(key: str, value: object) -> bool:
    """Tell whether a value of a lock file names a foreign host or a local file."""
    if key in LOCAL_KEYS:
        return bool(value)
    if not isinstance(value, str) or key == "funding":
        return False
    if key in {"url", "resolved", "registry", "git"}:
        address = urlsplit(value)
        return address.scheme != "https" or address.hostname not in PUBLIC_HOSTS
    return bool(UNPUBLISHED.match(value))


def leaves(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value below a node with the key it stands under; people's funding pages are not sources."""
    if isinstance(node, dict):
        for name, below in node.items():
            if name not in {"funding", "bin", "engines"}:
                yield from leaves(below, name)
    elif isinstance(node, list):
        for below in node:
            yield from leaves(below, key)
    else:
        yield key, node


def parsed(path: Path) -> dict[str, Any]:
    """Parse a lock file by its kind."""
    text = path.read_text()
    document: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    return document


def lock_files() -> list[Path]:
    """Return the lock files of the checkout that are not some installation's."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [ROOT / name for name in listed.stdout.split("\0") if name]
        return [path for path in names if path.name in LOCK_FILES and path.exists()]
    # A release archive has no history; everything in it was tracked.
    found = (path for name in LOCK_FILES for path in ROOT.rglob(name))
    return [path for path in found if not {".venv", ".uv", "node_modules"} & set(path.parts)]


def test_every_lock_file_names_public_registries_only() -> None:
    """No lock file names another host, a local path or a file, so that every machine can install from it."""
    found = lock_files()
    assert ROOT / "uv.lock" in found
    assert {str(path): faults(parsed(path)) for path in found} == {str(path): [] for path in found}


@pytest.mark.parametrize(
    "source",
    [
        '{ registry = "https://mirror.example/simple" }',
        '{ registry = "file:///opt/simple" }',
        '{ registry = "/opt/simple" }',
        '{ path = "wheels/x.whl" }',
        '{ editable = "../x" }',
        '{ git = "https://github.com/x/x" }',
        '{ url = "http://files.pythonhosted.org/x.whl" }',
    ],
)
def test_foreign_source_in_a_python_lock_file_is_found(source: str) -> None:
    """Each way uv can name a source that is not the public registry is noticed."""
    assert faults(tomllib.loads(f'[[package]]\nname = "x"\nsource = {source}\n'))


@pytest.mark.parametrize(
    "resolved", ["https://npm.example/x.tgz", "file:../x.tgz", "git+ssh://git@host/x.git"]
)
def test_foreign_source_in_a_node_lock_file_is_found(resolved: str) -> None:
    """Each way npm can name a source that is not the public registry is noticed."""
    assert faults({"packages": {"node_modules/x": {"version": "1.0.0", "resolved": resolved}}})


def test_public_sources_and_funding_pages_are_accepted() -> None:
    """What npm writes beside the source, such as where to send money, is no source."""
    package = {
        "resolved": "https://registry.npmjs.org/x/-/x-1.0.0.tgz",
        "funding": {"url": "https://opencollective.com/x"},
        "bin": {"x": "./bin/x.js"},
    }
    assert faults({"packages": {"node_modules/x": package}}) == []
