"""The names under which transformers finds our attention.

They are registered once per process and stay: what they do for a given call is decided by the ``Forward`` in it.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from vlmattn import attention, compat
from vlmattn.errors import InputError, StateError, UnsupportedError

#: Implementation a model may have when it is wrapped, and the name it has while wrapped; others come as they are met.
#: The names must not contain "flash", "sdpa" or "flex": transformers tests for those words.
NAMES = {"sdpa": "vlmattn", "eager": "vlmattn_eager"}
_MASKS = ("sdpa", "flash", "flex")  # of implementations that are neither


def register(base: str) -> None:
    """Make the names known to transformers, and that of models with the implementation ``base`` (idempotent)."""
    NAMES.setdefault(base, "vlmattn_" + re.sub("(fl|sd)(ash|ex|pa)", r"\1.\2", base).replace("/", "."))
    for known, name in NAMES.items():
        compat.register_attention(name, known, attention.function_in_place_of(known))


def is_plain(base: str) -> bool:
    """Whether an implementation comes with torch, so that transformers may check it whenever it is named."""
    return base in ("sdpa", "eager")


def base_name(implementation: str | None) -> str:
    """The attention implementation to fall back on, also when another model that shares the config is wrapped."""
    for base, name in NAMES.items():
        if implementation in (base, name):
            return base
    if implementation is not None and compat.mask_kind(implementation) in _MASKS:
        return implementation
    raise UnsupportedError(
        f"attention implementation '{implementation}' is not known to transformers with masks of sdpa, flash or flex"
        " attention; load the model with attn_implementation='sdpa' (which runs flash kernels on a GPU) or 'eager'"
    )


def refuse_base(base: str, family: str, crossing: bool) -> None:
    """Raise if layers of cross-attention have an implementation that does not take their masks."""
    if crossing and not is_plain(base):
        raise UnsupportedError(
            f"layers of cross-attention in {family} have masks that '{base}' cannot take; load the model with"
            " attn_implementation='sdpa'"
        )


def refuse_mask(base: str, mask: Any) -> None:
    """Raise for a mask of the caller's that says more than which tokens are padding, if the base cannot take it."""
    if isinstance(mask, Tensor) and mask.ndim > 2 and compat.mask_kind(base) == "flash":
        raise InputError(
            f"'{base}' takes attention masks of two dimensions, for padding, and this one has {mask.ndim}; load the"
            " model with attn_implementation='sdpa'"
        )


def check_registration(text: Any, base: str) -> None:
    """Raise unless the decoder of a text config still calls us."""
    found = compat.attention_name(text)
    if found != NAMES[base]:
        raise StateError(
            f"the attention implementation was set to '{found}' while the model was wrapped, by you or"
            " by unwrapping a copy that shares its config; unwrap the model and wrap it again"
        )
