"""Every difference between versions of transformers, one function each; nothing else knows a version.

From 5.24 on the key-value cache is called ``cache`` where it was ``past_key_values``: as an argument of models, decoders and
layers, and in their outputs. The old name is still taken at the door, and code that is not transformers' own goes on with it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import __version__ as INSTALLED
from transformers.generation.utils import GenerationMixin

TESTED = ("5.17", "5.24")  # the oldest and the newest release that the suite is run on
_NAMES = ("cache", "past_key_values")


@functools.cache
def cache_name() -> str:
    """The name that this version of transformers gives the key-value cache."""
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in _NAMES if name in parameters), _NAMES[0])


def _names() -> tuple[str, ...]:
    """Names that a cache may come under, the version's own first. Before 5.24 ``cache`` was that of continuous batching alone."""
    return _NAMES if cache_name() == _NAMES[0] else _NAMES[1:]


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """The key-value cache among the arguments of a model, a decoder or a layer; None without one, or in continuous batching."""
    found = next((inputs[name] for name in _names() if inputs.get(name) is not None), None)
    return None if _is_paged(found) else found


def with_cache(inputs: Mapping[str, Any], cache: Any, module: nn.Module | None = None) -> dict[str, Any]:
    """The arguments with another cache (None: an empty place for one), under the name they had or that ``module`` takes."""
    given = next((name for name in _names() if name in inputs), None) or _name_of(module)
    return {**{name: value for name, value in inputs.items() if name not in _names()}, given: cache}


def _name_of(module: nn.Module | None) -> str:
    if module is not None:
        parameters = inspect.signature(type(module).forward).parameters
        if found := [name for name in _names() if name in parameters]:
            return found[0]
    return cache_name()


def output_cache(output: Any) -> Any:
    """The key-value cache in the output of a forward; None without one."""
    return getattr(output, cache_name(), None)


def set_output_cache(output: Any, cache: Any) -> None:
    """Another key-value cache in the output of a forward."""
    setattr(output, cache_name(), cache)


def paged(inputs: Mapping[str, Any]) -> bool:
    """Whether these arguments come from continuous batching, whose sequences share one row and one cache."""
    return any(_is_paged(inputs.get(name)) for name in _NAMES)


def _is_paged(cache: Any) -> bool:
    return any(kind.__name__ == "PagedAttentionCache" for kind in type(cache).__mro__)


def untested() -> str | None:
    """One line if the installed transformers is newer than any that the library was tested with, else None."""
    if _numbers(INSTALLED) <= _numbers(TESTED[1]):
        return None
    return (
        f"transformers {INSTALLED} is newer than {TESTED[1]}, the newest that this vlmattn was tested with;"
        " 'vlmattn doctor' tries wrapped answers"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@functools.cache
def warn_if_untested() -> None:
    """Say once in a process that transformers is newer than any that was tested."""
    if (text := untested()) is not None:
        warnings.warn(f"vlmattn: {text}", stacklevel=4)
