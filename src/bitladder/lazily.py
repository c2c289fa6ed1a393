"""Names that a package gives without importing what makes them: a command starts with what it uses, and no more.

Imports nothing of ours.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def given_by(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package, which imports a name when it is first asked for.

    A package says the same names under `TYPE_CHECKING` as well, for type checkers, and in `__all__`. No name may be
    that of a module of the package: importing the module would set it.

    Args:
        package: its `__name__`.
        names: module of the package -> what it gives.

    Source: PEP 562.
    """
    homes = {name: module for module, given in names.items() for name in given}

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, found)  # the next time is none of ours
        return found

    return __getattr__
