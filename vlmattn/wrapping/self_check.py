"""Whether a model of remote code or of no family lets its attention be edited: tried when it is wrapped."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.attention import FORWARD
from vlmattn.errors import UnsupportedError
from vlmattn.kernels import AttentionEdit, LogitPart
from vlmattn.models import Family, Generic
from vlmattn.request import BARE, Forward, LayerContext, Part, Plan, Request, Step

_TOKENS = 6
_CLOSE = 1e-2  # relative to the largest output: half precision has 3 digits


@dataclass(eq=False)
class _Nothing:
    """A method whose edit changes no score, so that our kernels must find what the model's own attention does."""

    reached: set[int]

    @property
    def follows_attention(self) -> bool:
        return False

    def edit(self, context: LayerContext) -> AttentionEdit:
        self.reached.add(context.layer)
        return AttentionEdit(logit=(LogitPart(bias=torch.zeros(1, context.keys, device=context.device)),))


def check_reached(family: Family, model: PreTrainedModel, base: str) -> None:
    """Run the decoder of a wrapped model on random embeddings, bare and with an edit that changes nothing.

    Raises:
        UnsupportedError: some layer's attention does not come to us, or ours finds something else.
    """
    anatomy, decoder = family.anatomy(model), family.decoder(model)
    name = f"{type(model).__name__} (model type '{model.config.model_type}')"
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, _TOKENS, anatomy.hidden_size, generator=generator).to(table) * table.float().std().to(table)
    wanted = set(range(anatomy.layers) if anatomy.attending is None else anatomy.attending)
    nothing: Any = _Nothing(set())
    each = tuple((nothing,) if layer in wanted else () for layer in range(anatomy.layers))
    none = ((),) * anatomy.layers
    plan, request = Plan("check", by_layer=each, on_hidden_states=none, on_attention=none), Request(anatomy.layers)
    types = torch.zeros(1, _TOKENS, dtype=torch.uint8)
    request.extend(0, types, torch.full((1, _TOKENS), -1), None, None)
    try:
        with torch.no_grad():
            bare = _run(decoder, embeds, BARE)
            edited = _run(decoder, embeds, Forward((Part(step=Step(request, base, 0), plan=plan),)))
    except Exception as error:
        raise UnsupportedError(
            f"{name}: its decoder does not run by itself ({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    if nothing.reached != wanted:
        lost = sorted(wanted - nothing.reached)
        raise UnsupportedError(
            f"{name}: the attention of its layers {lost} does not go through transformers' attention interface (code"
            f" of its own, as remote code often has); {_REMEDY}"
        )
    if not bool((edited - bare).abs().max() <= _CLOSE * bare.abs().max()):
        raise UnsupportedError(
            f"{name}: its attention is not a plain softmax over keys, so edits would be wrong; {_REMEDY}"
        )
    if not isinstance(family, Generic):
        return
    warnings.warn(
        f"vlmattn: no family knows {name}; a generic patcher serves it, for attention edits only, and counts unbroken"
        " runs of image tokens as images",
        stacklevel=4,
    )


_REMEDY = "use a model that transformers itself implements, or register a family for it (vlmattn.register_family)"


def _run(decoder: Any, embeds: Tensor, passing: Forward) -> Tensor:
    out = decoder(inputs_embeds=embeds, use_cache=False, **{FORWARD: passing})
    found: Tensor = out.last_hidden_state.float()
    return found
