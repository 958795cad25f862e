"""Looks at the vision tower at work, and shows methods the images that new prompt tokens stand for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.errors import InputError
from vlmattn.models import Family
from vlmattn.request import IMAGE, TEXT, VIDEO, Image, ImageFeatures, Plan, Request, Step, video_runs
from vlmattn.wrapping.call import CALL


def hook_tower(family: Family, model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on the vision tower and its attention, where the family lets it be looked at."""
    hooks = []
    if (tower := family.tower(model)) is not None:
        hooks.append(tower.register_forward_pre_hook(_before_tower, with_kwargs=True))
        hooks.append(tower.register_forward_hook(_after_tower))
    for number, module in enumerate(family.tower_attention(model)):
        hooks.append(module.register_forward_pre_hook(partial(_before_tower_attention, number), with_kwargs=True))
    return hooks


def _before_tower(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = CALL.get()
    if call is not None and call.plan.tower_layers and call.record.family.tower(call.model) is tower:
        names = list(inspect.signature(type(tower).forward).parameters)[1:] if args else []
        if call.tower.shown:
            for seen in (call.tower.patches, call.tower.keys, call.tower.features):
                seen.clear()
            call.tower.shown = False
        call.tower.inputs = {**call.sizes, **call.tower.sizes, **dict(zip(names, args, strict=False)), **kwargs}


def _after_tower(tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    call = CALL.get()
    if call is None or not call.plan.tower_layers or not call.plan.pruning:
        return
    if call.record.family.tower(call.model) is tower:
        call.tower.features += call.record.family.patch_features(call.model, output)


def _before_tower_attention(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = CALL.get()
    if call is None or number not in call.plan.tower_layers:
        return
    if call.record.family.tower_attention(call.model)[number] is not module:  # another model, in or after this call
        return
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    with torch.no_grad():
        inputs = (call.model, module, hidden, call.tower.inputs)
        call.tower.patches.setdefault(number, []).extend(call.record.family.summary_attention(*inputs))
        if call.plan.pruning:
            call.tower.keys.setdefault(number, []).extend(call.record.family.patch_keys(*inputs))


def show_images(step: Step, plan: Plan, embeds: Tensor) -> None:
    """Tell methods what the vision tower saw of the images of a prompt.

    Raises:
        InputError: the tower did not run.
    """
    request, start = step.request, step.start or 0
    stop = min(start + embeds.shape[1], request.prompt_length)
    types = request.types(stop, embeds.device)[:, start:]
    if not bool((types != TEXT).any()):
        return
    if not step.tower.patches:
        raise InputError(
            f"{', '.join(m.info.name for m in plan.on_image_features)} must see the vision tower at work; give"
            " pixel_values, not features that were computed before"
        )
    order = step.order or _order_of_rows(request, start, types, len(next(iter(step.tower.patches.values()))))
    patches = {layer: _ordered(order, seen) for layer, seen in step.tower.patches.items()}
    images = _images(step, order, patches, types, embeds[:, : stop - start]) if plan.pruning else ()
    features = ImageFeatures(request, start, types, patches, images)
    for method in plan.on_image_features:
        method.on_image_features(features)
    if (call := CALL.get()) is not None:
        call.tower.shown = True


def _ordered(order: Sequence[int], seen: Sequence[Any]) -> list[Any]:
    """What was seen of the encoded images, for the images of the prompt."""
    return [seen[i] for i in order]


def _order_of_rows(request: Request, start: int, types: Tensor, encoded: int) -> list[int]:
    """Which encoded image each of the prompt is, where rows may be repeated, one after another."""
    numbers = request.images(start + types.shape[1], types.device)[:, start:]
    counts = [  # as they are encoded
        [torch.unique(row[own]).numel() for row, own in zip(numbers, types == IMAGE, strict=True)],
        [len(video_runs(row[None])) for row in types],
    ]
    times = sum(map(sum, counts)) // encoded
    order: list[int] = []
    for of_kind in counts:
        for count in of_kind[:: max(times, 1)]:
            first = len(order) // max(times, 1)
            order += [*range(first, first + count)] * times
    return order if len(order) == times * encoded else list(range(encoded))


def _images(
    step: Step, order: Sequence[int], patches: dict[int, list[Tensor]], types: Tensor, embeds: Tensor
) -> tuple[Image, ...]:
    """All that is known of each image of the prompt."""
    call = CALL.get()
    assert call is not None
    keys = {layer: _ordered(order, seen) for layer, seen in step.tower.keys.items()}
    features = _ordered(order, step.tower.features) if step.tower.features else []
    project = partial(call.record.family.project, call.model)
    if not features:
        lengths = [seen.shape[-1] for seen in next(iter(patches.values()))]
        tokens = torch.cat([embeds[types == kind] for kind in (IMAGE, VIDEO)])
        features = [(image, None) for image in torch.split(tokens, lengths)]
    every = call.record.family.tile_numbers(call.model, step.tower.inputs)
    tiles = _ordered(order, every) if every else [None] * len(features)
    found = []
    for number, (vectors, summary) in enumerate(features):
        attention_of, keys_of = ({layer: seen[number] for layer, seen in of.items()} for of in (patches, keys))
        found.append(Image(attention_of, keys_of, vectors, summary, project, tiles[number]))
    return tuple(found)
