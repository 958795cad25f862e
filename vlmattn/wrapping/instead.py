"""What one object has in place of a method of its class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any


class Instead:
    """``function(owner, original, *args, **kwargs)`` in place of a method of one object.

    It can be copied and pickled with the object, which a function bound by hand cannot, and has the method's signature,
    where generate() reads what it may be given.

    Attributes:
        before: what the object itself had under this name; None = the class's method.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.name, self.function = owner, name, function
        self.before = owner.__dict__.get(name)
        self.__doc__ = function.__doc__
        owner.__dict__[name] = self

    @property
    def original(self) -> Callable[..., Any]:
        return self.before or MethodType(getattr(type(self.owner), self.name), self.owner)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.owner, self.original, *args, **kwargs)

    def remove(self) -> None:
        """Leave the object as it was."""
        if self.owner.__dict__.get(self.name) is self:
            del self.owner.__dict__[self.name]
            if self.before is not None:
                self.owner.__dict__[self.name] = self.before
