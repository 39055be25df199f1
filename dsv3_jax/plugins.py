"""Names to functions: the built-in choices, or `package.module:function` from outside the package."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def resolve(kind: str, name: str, builtin: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that `name` stands for.

    Raises ValueError, naming `kind`, if it is neither built in nor an importable `package.module:function`.
    """
    if name in builtin:
        return builtin[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{kind}: expected one of {', '.join(builtin)} or package.module:function, got {name!r}")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind}: cannot load {name!r}: {error}") from None
    if not callable(function):
        raise ValueError(f"{kind}: {name!r} is {type(function).__name__}, expected a function")
    return function
