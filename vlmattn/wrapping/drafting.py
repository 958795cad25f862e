"""Assisted decoding: a wrapped model that drafts for another one, and recipes that cannot take drafts back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.errors import UnsupportedError
from vlmattn.request import NO_PLAN, Plan


def drafting_plan(plan: Plan) -> Plan:
    """What an assistant drafts with: the bare model where the recipe needs a prompt or a cache of its own.

    Drafts are checked, so they decide how fast the answer comes and not what it is.
    """
    own = plan.decoding is not None or plan.search is not None or plan.policies or plan.drops
    return NO_PLAN if own else plan


def refuse_drafts(model: PreTrainedModel, plan: Plan, kwargs: Mapping[str, Any], states: bool) -> None:
    """Raise ``UnsupportedError`` for policies: they choose slots token by token, and never take a token back; and for
    branches of a model whose layers keep a state."""
    if not plan.policies and (plan.decoding is None or not states):
        return
    if (asked := compat.drafts_asked(model, kwargs)) and not plan.policies:
        raise UnsupportedError(
            f"some layers of {type(model).__name__} keep a state of all tokens, from which branches cannot take drafts"
            f" back; leave {asked[0]} out"
        )
    if asked:
        names = ", ".join(dict.fromkeys(policy.info.name for policy in plan.policies))
        raise UnsupportedError(
            f"{names} chooses cache slots token by token, and drafts of assisted decoding come several at once and are"
            f" taken back; leave {asked[0]} out"
        )
