"""What methods see of the images as the vision tower saw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import InputError
from vlmattn.request.numbering import IMAGE, VIDEO
from vlmattn.request.request import Request


@dataclass(frozen=True, eq=False)
class Image:
    """One image as the vision tower saw it.

    Attributes:
        attention: tower layer -> how much its summary token attends to each of its tokens, float32 ``[heads, tokens]``.
        keys: tower layer -> mean key over heads of each token, before any rotation, float32 ``[tokens, dim]``.
        features: what the tower says of each token, ``[tokens, width]``. ``summary``: and of the CLS token,
            ``[width]``, if it has one.
        project: makes features ``[n, width]`` what the language model gets.
        tiles: of pictures that are cut, the number of the tile of each token ``[tokens]``: 0 = the whole picture in
            small, -1 = no patch (a newline). None: not cut.
    """

    attention: dict[int, Tensor]
    keys: dict[int, Tensor]
    features: Tensor
    summary: Tensor | None
    project: Callable[[Tensor], Tensor]
    tiles: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """The images that new prompt tokens stand for, as the vision tower saw them.

    Attributes:
        start: cache slot of the first new token.
        types: uint8 ``[batch, new]``.
        patches: tower layer -> for each image (then each video) how much its summary token attends to each of its
            tokens, float32 ``[heads, tokens]``.
        images: the same images with more about them, for methods that drop tokens.
    """

    request: Request
    start: int
    types: Tensor
    patches: dict[int, list[Tensor]]
    images: tuple[Image, ...] = ()

    def place(self, values: list[Tensor]) -> Tensor:
        """Values ``[tokens, ...]`` of each image at the slots of the new tokens: ``[batch, new, ...]``, 0 for text.

        Raises:
            InputError: not as many values as image tokens.
        """
        flat = torch.cat(values).to(self.types.device)
        images, videos = self.types == IMAGE, self.types == VIDEO
        split = int(images.sum())
        if split + int(videos.sum()) != len(flat):
            raise InputError(
                f"the vision tower saw {len(flat)} image tokens and the prompt has {split + int(videos.sum())}; give"
                " the images with the prompt, not features that were computed before"
            )
        out = torch.zeros(*self.types.shape, *flat.shape[1:], dtype=flat.dtype, device=flat.device)
        out[images], out[videos] = flat[:split], flat[split:]
        return out
