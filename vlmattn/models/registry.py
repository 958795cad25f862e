"""The registry of families."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.errors import UnsupportedError
from vlmattn.models.base import Family
from vlmattn.models.generic import generic_family
from vlmattn.registry import load_plugins

_FAMILIES: dict[str, Family] = {}
_KNOWN_BY_NAME = ("gemma3", "internvl", "llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm")
_F = TypeVar("_F", bound="Family | type[Family]")


def register_family(given: _F) -> _F:
    """Class decorator, also for an instance: make a family known, so that ``wrap`` serves its model types.

    Raises:
        UnsupportedError: a model type that is served already, or none at all.
    """
    family = given() if isinstance(given, type) else given
    if not family.model_types:
        raise UnsupportedError(
            f"{type(family).__name__} names no model types; give it model_types = {{'type': 'checkpoint'}}"
        )
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise UnsupportedError(
                f"model type '{model_type}' is already served by {type(_FAMILIES[model_type]).__name__}"
            )
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return given


def registered() -> dict[str, Family]:
    """Model types and the families that serve them, plugins' included."""
    load_plugins()
    return dict(sorted(_FAMILIES.items()))


def supported_families() -> dict[str, str]:
    """Model types and the checkpoints they stand for."""
    return {name: family.model_types[name] for name, family in registered().items() if not family.unsupported}


def find_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: a model that is no vision-language model, or one whose attention cannot be reached.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is not a transformers PreTrainedModel; {_known()}")
    if model.config.model_type not in _FAMILIES:
        load_plugins()
    family = _FAMILIES.get(model.config.model_type)
    if family is not None and family.unsupported:
        raise UnsupportedError(f"{type(model).__name__} is not supported: {family.unsupported}; {_known()}")
    if family is None or not model.can_generate():
        family = generic_family(model, _known())
    family.check(model)
    return family


def _known() -> str:
    """What is supported, for messages."""
    some = [name for name in _KNOWN_BY_NAME if name in _FAMILIES]
    more = len(supported_families()) - len(some)
    return f"supported: {', '.join(some)} and {more} more; see vlmattn.supported_families()"
