"""The one way to put a function in the place of another one, such as Megatron's."""

from collections.abc import Callable
from functools import wraps
from typing import Any


def replaces[Function: Callable[..., Any]](owner: Any, name: str) -> Callable[[Function], Function]:
    """Put the decorated function in the place of `owner.name`; it gets the original as its first argument."""
    original = getattr(owner, name)

    def replace(function: Function) -> Function:
        @wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(owner, name, replaced)
        return function

    return replace
