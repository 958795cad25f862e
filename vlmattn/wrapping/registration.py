"""The names under which transformers finds our attention.

They are registered once per process and stay: what they do for a given call is decided by the ``Forward`` in it.
"""

from __future__ import annotations

from typing import Any

from vlmattn import attention, compat
from vlmattn.errors import StateError, UnsupportedError

#: Implementation a model may have when it is wrapped, and the name it has while wrapped. The names must not contain
#: "flash", "sdpa" or "flex": transformers tests for those words.
NAMES = {"sdpa": "vlmattn", "eager": "vlmattn_eager"}


def register() -> None:
    """Make the names known to transformers (idempotent)."""
    for base, name in NAMES.items():
        compat.register_attention(name, base, attention.function_in_place_of(base))


def base_name(implementation: str | None) -> str:
    """The attention implementation to fall back on, also when another model that shares the config is wrapped."""
    for base, name in NAMES.items():
        if implementation in (base, name):
            return base
    raise UnsupportedError(
        f"attention implementation '{implementation}' cannot be edited; load the model with attn_implementation='sdpa'"
        " (which runs flash kernels on a GPU) or 'eager'"
    )


def check_registration(text: Any, base: str) -> None:
    """Raise unless the decoder of a text config still calls us."""
    found = compat.attention_name(text)
    if found != NAMES[base]:
        raise StateError(
            f"the attention implementation was set to '{found}' while the model was wrapped, by you or"
            " by unwrapping a copy that shares its config; unwrap the model and wrap it again"
        )
