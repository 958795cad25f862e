"""What a family says of its vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class SeenTower:
    """By default methods do not look at the tower."""

    def tower(self, model: PreTrainedModel) -> nn.Module | None:
        """The vision tower, if each image token is one of its tokens (or a few); None = it is not looked at."""
        return None

    def tower_attention(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Attention modules of the vision tower, in order."""
        return ()

    def summary_attention(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """How much each image's summary query attends to its tokens in one attention module of the tower.

        The summary query is the CLS token's where the tower has one, else the mean query (ours).

        Args:
            hidden: what the attention module gets.
            inputs: what the whole tower got, and what the call said of the images' sizes.

        Returns:
            For each image float32 ``[heads, tokens]``, in the order of its tokens in the prompt.
        """
        raise NotImplementedError

    def patch_keys(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Mean key over heads of each image's tokens, before any rotation, in one attention module of the tower.

        Args, order: as for ``summary_attention``. Returns float32 ``[tokens, dim]`` for each image.
        """
        raise NotImplementedError

    def tile_numbers(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Of each image the number of the tile of each of its tokens, see ``request.Image``; empty: none is cut.

        Args:
            inputs: what the whole tower got, and what the call said of the images' sizes.
        """
        return []

    def patch_features(self, model: PreTrainedModel, output: Any) -> list[tuple[Tensor, Tensor | None]]:
        """What the tower says of each image before the projection: ``[tokens, width]``, and ``[width]`` of a CLS token.

        Empty where what the language model gets is the first that belongs to single tokens.
        """
        return []

    def project(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        """What the language model gets ``[n, hidden]`` for features ``[n, width]`` of ``patch_features``."""
        return features
