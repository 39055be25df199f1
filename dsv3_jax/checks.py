"""What a configuration's fields must satisfy: one line where they do not."""

import typing
from typing import Any, Literal


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}: expected a positive number, got {value}")


def require_choice(config: Any) -> None:
    """Every field annotated `Literal[...]` holds one of its values."""
    hints = typing.get_type_hints(type(config))
    for name, hint in hints.items():
        if typing.get_origin(hint) is Literal:
            value, choices = getattr(config, name), typing.get_args(hint)
            require(value in choices, f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


def require_known(name: str, value: str, builtin: tuple[str, ...]) -> None:
    """A built-in's name, or `module:function` for somebody else's idea (resolved by `dsv3_jax.plugins`)."""
    module, colon, function = value.partition(":")
    require(
        value in builtin or bool(module and colon and function),
        f"{name}: expected one of {', '.join(builtin)} or package.module:function, got {value!r}",
    )
