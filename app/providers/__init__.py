"""The vendors, one file each.

Owns what is peculiar to a vendor's authorization server: addresses, words, how it names an account. A file
that lies in a directory on this package's `__path__` and holds one subclass of `Provider` is found by itself;
nothing else has to be edited.

Must never know the other vendors (import-linter holds that), a table, a lease or a caller.

Decision: files are found by listing the package, not by entry points or a list in the settings. A vendor is
added by laying down a file, which is what a reader would try first; the price is that every file here runs at
start, so that only an operator may write to these directories.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from app.errors import ConfigurationFault
from app.oauth2.provider import Provider

__all__ = ["discover"]


def discover() -> Mapping[str, Provider]:
    """Every provider by its name, in alphabetical order.

    Raises ConfigurationFault naming each file without exactly one provider, with an incomplete one, or with a
    name already taken.
    """
    found: dict[str, Provider] = {}
    faults: list[str] = []
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        try:
            provider = _provider_of(module)
        except ValueError as error:
            faults.append(f"provider file {info.name}: {error}")
            continue
        if provider.name in found:
            faults.append(f"provider file {info.name}: the name {provider.name!r} is taken")
        found.setdefault(provider.name, provider)
    if faults:
        raise ConfigurationFault(faults)
    return MappingProxyType(dict(sorted(found.items())))


def _provider_of(module: ModuleType) -> Provider:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Provider) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ValueError(f"it must hold exactly one subclass of Provider, not {len(classes)}")
    missing = [name for name in ("name", "title") if not getattr(classes[0], name, None)]
    if missing:
        raise ValueError(f"{classes[0].__name__} does not say its {' and '.join(missing)}")
    return classes[0]()
