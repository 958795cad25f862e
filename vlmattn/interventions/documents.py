"""Documents of a prompt: parts that belong together, for methods that keep them apart or treat them alike."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmattn.errors import InputError
from vlmattn.request import LayerContext


def documents(context: LayerContext, separators: tuple[int, ...]) -> Tensor:
    """Number of the document of every key, int64 ``[batch, keys]``, -1 for what belongs to none.

    With ``separators`` (token ids) a document ends with each of them; without, every image begins one, which goes on to
    the next image, and the last one ends with its image. What follows the last document (the question) belongs to none,
    nor do padding, text before the first image and generated tokens. Answers of earlier turns are part of the prompt.
    """
    real = context.real
    if separators and not context.request.ids_known:
        raise InputError("documents that end with separators need input_ids; the model got inputs_embeds")
    if separators:
        ends = torch.isin(context.ids, torch.tensor(separators, device=context.device))
        ends = ends if real is None else ends & real
        number = ends.cumsum(1) - ends.long()  # a separator belongs to the document it ends
        inside = number < ends.sum(1, keepdim=True)
    else:
        image = context.images.long()
        number = image.cummax(1).values
        last = (image >= 0).flip(1).cumsum(1).flip(1) > 0  # an image token is still to come, or this is one
        inside = (number >= 0) & last
    if real is not None:
        inside = inside & real
    return torch.where(inside, number, -1)
