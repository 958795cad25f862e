"""Which branches a generate() call has, and what it cannot have beside them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.decoding import Branch, ContrastiveDecoding
from vlmattn.errors import InputError, UnsupportedError
from vlmattn.models import OF_IMAGES, find_family
from vlmattn.request import Plan
from vlmattn.wrapping.branches import NOT_PASSED_ON, Branches, images_in


def branches_of(
    model: PreTrainedModel, plan: Plan, kwargs: Mapping[str, Any], given: Mapping[str, Any]
) -> Branches | None:
    """The branches of a generate() call; None without a decoding rule.

    Raises:
        UnsupportedError: a way of generating that cannot have branches.
        InputError: no token ids or images, inputs of branches that are missing or not known.
    """
    contrast: ContrastiveDecoding | None = plan.decoding
    _check_given(model, plan, given)
    if contrast is None:
        return None
    ids = _ids_of(kwargs)
    _refuse_ways(model, kwargs)
    family, inputs = find_family(model), {**kwargs, "input_ids": ids}
    if any(branch.sees for branch in contrast.branches) and not images_in(family.token_types(model, ids)):
        seeing = [f"'{branch.name}'" for branch in contrast.branches if branch.sees]
        about = f"branch {seeing[0]} is" if len(seeing) == 1 else f"branches {' and '.join(seeing)} are"
        raise InputError(
            f"no image tokens in the prompt, and the {about} about the image; put the image placeholder into it"
            " (processor.apply_chat_template does), or call model.vlmattn.disable() for prompts without images"
        )
    _check_needs(contrast, given)
    if plan.pruning and contrast.branches:
        _refuse_with_dropped(model, plan, kwargs)
    return Branches(model, plan, inputs, given)


def _refuse_with_dropped(model: PreTrainedModel, plan: Plan, kwargs: Mapping[str, Any]) -> None:
    """Ways of generating that cannot have branches that hold different tokens in a layer."""
    drafts = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
    if any(compat.setting_of(model, kwargs, name) for name in drafts):
        raise UnsupportedError(f"'{plan.name}' drops tokens of several branches, and cannot take drafts back")
    named = compat.setting_of(model, kwargs, "cache_implementation")
    if named not in (None, "dynamic") or compat.cache_of(kwargs) is not None:
        raise UnsupportedError(
            f"'{plan.name}' drops tokens of several branches, which a cache of your own has no room for; leave"
            " cache_implementation and past_key_values out"
        )


def _ids_of(kwargs: Mapping[str, Any]) -> Tensor:
    """The token ids of a call, int64 ``[batch, tokens]``."""
    ids = kwargs.get("inputs", kwargs.get("input_ids"))
    if kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError(
            "a decoding rule needs input_ids, to make the prompts of its branches; inputs_embeds cannot do"
        )
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        what = f"a {ids.dtype} tensor {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(
            f"a decoding rule needs input_ids, an int64 tensor [batch, tokens], got {what}; use return_tensors='pt'"
        )
    return ids


def _check_needs(contrast: ContrastiveDecoding, given: Mapping[str, Any]) -> None:
    """Raise if a branch needs inputs of its own that the call does not give."""
    for branch in contrast.branches:
        brought = [name for name, value in given.get(branch.name, {}).items() if value is not None]
        # pixels have longer names where images and videos differ: pixel_values_images
        if missing := [name for name in branch.needs if not any(one.startswith(name) for one in brought)]:
            raise InputError(
                f"the branch '{branch.name}' needs {', '.join(missing)} with every call:"
                f" generate(..., branch_inputs={{'{branch.name}': {{'{missing[0]}': ...}}}})"
            )


def _check_given(model: PreTrainedModel, plan: Plan, given: Mapping[str, Any]) -> None:
    """Inputs of branches that nobody would read are an error."""
    names, known = plan.branch_names, set(inspect.signature(type(model).forward).parameters) - NOT_PASSED_ON
    branches = {branch.name: branch for branch in plan.decoding.branches} if plan.decoding else {}
    for name, inputs in given.items() if isinstance(given, Mapping) else (("", given),):
        if not isinstance(inputs, Mapping):
            raise InputError("branch_inputs must look like {'branch': {'pixel_values': ...}}")
        if name not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise InputError(f"branch_inputs names {name}, which is no branch of '{plan.name}'; {has}")
        if any(not isinstance(value, Tensor | None) for value in inputs.values()):
            raise InputError(f"branch_inputs of '{name}' must be tensors, as a processor returns them")
        if useless := set(inputs) - _used(branches.get(name), known):
            raise InputError(
                f"the branch '{name}' has no use for {', '.join(sorted(useless))} in branch_inputs; leave it out"
            )


def _used(branch: Branch | None, known: set[str]) -> set[str]:
    """Inputs of the model that a branch reads, of those that are ``known``; None: one that does nothing."""
    if branch is not None and branch.shares_prompt:
        return set()
    return known - set(OF_IMAGES) if branch is not None and branch.image == "drop" else known


def _refuse_ways(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Ways of generating that a decoding rule cannot have."""
    if compat.setting_of(model, kwargs, "use_cache") is False:
        raise UnsupportedError("a decoding rule needs a cache, where its branches live; leave use_cache at True")
    if compat.setting_of(model, kwargs, "cache_implementation") == "paged":
        raise UnsupportedError(
            "continuous batching (paged) runs every request by itself, without branches; use generate()"
        )
    cache = compat.cache_of(kwargs)
    if cache is not None and not (hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) == 0):
        raise UnsupportedError(
            "a decoding rule cannot go on from past_key_values, which hold no branches; give the whole conversation"
        )
    if kwargs.get("position_ids") is not None:
        raise UnsupportedError(
            "a decoding rule gives every branch positions of its own, and cannot take position_ids; leave them out"
        )
    scale = compat.setting_of(model, kwargs, "guidance_scale")
    if scale not in (None, 1, 1.0):
        raise UnsupportedError(
            "guidance_scale is a decoding rule of its own and conflicts with the recipe's; use one of them"
        )
