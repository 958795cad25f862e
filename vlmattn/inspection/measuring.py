"""Running a model as it is, for measurements: nothing in force but what measures, and inputs in one form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.anatomy import Anatomy
from vlmattn.errors import InputError
from vlmattn.interventions import Intervention
from vlmattn.interventions.profiles import HeadProfile
from vlmattn.kernels import AttentionEdit
from vlmattn.options import MethodInfo
from vlmattn.request import LayerContext, Weights
from vlmattn.wrapping import borrowed, record_of

Inputs = Mapping[str, Any]
"""What a processor returns with ``return_tensors="pt"``: one prompt, or a padded batch of prompts."""

INFO = MethodInfo("inspection", paper="", code="", faithful="", parts="none", cost="")


Keep = Callable[[LayerContext, Weights], Any]
"""Makes something of the attention of one layer; None is not kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure(Intervention):
    """Puts what ``keep`` makes of attention into ``kept``: by layer, one item for each forward. Changes nothing."""

    info: ClassVar[MethodInfo] = INFO
    needs_images: ClassVar[bool] = False
    keep: Keep
    kept: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list), repr=False)

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return tuple(range(anatomy.layers))

    def edit(self, context: LayerContext) -> AttentionEdit:
        return AttentionEdit()

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        if (made := self.keep(context, weights)) is not None:
            self.kept[context.layer].append(made)


@contextmanager
def bare(model: PreTrainedModel) -> Iterator[None]:
    """No edit acts within the block and this thread, whether the model is wrapped or not."""
    record = record_of(model)
    with nullcontext() if record is None else record.temporarily("none"):
        yield


@contextmanager
def only(model: PreTrainedModel, *methods: Intervention) -> Iterator[None]:
    """Nothing but ``methods`` acts within the block and this thread; recipe and report of the model stay."""
    with borrowed(model) as record, record.temporarily(methods):
        yield


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageMeasure(Measure):
    """As ``Measure``, in layers of cross-attention to images."""

    acts_on: ClassVar[str] = "image keys"

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return anatomy.cross


def attention_of(
    model: PreTrainedModel, inputs: Mapping[str, Any], keep: Keep, measuring: type[Measure] = Measure
) -> dict[int, Any]:
    """What ``keep`` makes of the bare model's attention in each layer, in one forward of prepared inputs."""
    measure = measuring(keep=keep)
    with only(model, measure):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return {layer: kept for layer, (kept,) in measure.kept.items()}


def prepared(model: PreTrainedModel, inputs: Sequence[Inputs]) -> list[dict[str, Any]]:
    """Each input on the model's device, in its dtype, with padding on the left.

    Raises:
        InputError: no inputs, one processor output instead of a list, token ids are missing.
    """
    if isinstance(inputs, Mapping):
        raise InputError("inputs must be a list of processor outputs, not one of them; put it in a list")
    if not inputs:
        raise InputError("there is nothing to measure; give at least one processor output")
    return [_prepare(model, item) for item in inputs]


def prepared_one(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """As ``prepared``, for the output of a processor that must hold exactly one prompt, without padding."""
    (found,) = prepared(model, [inputs])
    mask = found.get("attention_mask")
    if len(found["input_ids"]) != 1 or (mask is not None and not bool(mask.all())):
        raise InputError("each sample must be one prompt without padding; run the processor on one prompt at a time")
    return found


def _prepare(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    found = {name: _moved(value, model) for name, value in inputs.items()}
    ids = found.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise InputError('inputs need input_ids of shape [batch, tokens]; run the processor with return_tensors="pt"')
    mask = found.get("attention_mask")
    if mask is None or bool(mask.all()):
        return found
    order = (mask != 0).int().argsort(dim=1, stable=True)  # padding first, then the tokens as they are
    return {
        name: value.gather(1, order) if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in found.items()
    }


def _moved(value: Any, model: PreTrainedModel) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, dtype=model.dtype if value.is_floating_point() else value.dtype)


def by_layer(found: Mapping[int, Tensor], anatomy: Anatomy) -> Tensor:
    """What was found in layers with attention ``[...]`` as one tensor ``[layers, ...]``, 0 for the other layers."""
    nothing = torch.zeros_like(next(iter(found.values())))
    return torch.stack([found.get(layer, nothing) for layer in range(anatomy.layers)])


def head_profile(
    anatomy: Anatomy, scores: Mapping[str, Tensor], seed: int, prompts: Sequence[str], means: Tensor | None = None
) -> HeadProfile:
    """A profile of scores ``[layers, heads]`` and mean outputs ``[layers, heads, dim]``."""
    return HeadProfile(
        fingerprint=anatomy.fingerprint,
        source=anatomy.source,
        prompts=tuple(prompts),
        seed=seed,
        scores={name: tuple(map(tuple, table.tolist())) for name, table in scores.items()},
        means=() if means is None else tuple(tuple(map(tuple, layer)) for layer in means.tolist()),
    )
