"""GLM-4.1V, GLM-4.5V (mixture of experts) and GLM-4.6V: images of any size between markers, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.grids import Spatial
from vlmattn.models.registry import register_family
from vlmattn.request import IMAGE, VIDEO


@register_family
class Glm4v(Spatial):
    """Frames of a video have timestamps between them and count as images; the tower is not looked at (convolution)."""

    model_types: ClassVar[Mapping[str, str]] = {
        "glm4v": "zai-org/GLM-4.1V-9B-Thinking",
        "glm4v_moe": "zai-org/GLM-4.5V",
        "glm46v": "zai-org/GLM-4.6V-Flash",
        "glm_ocr": "zai-org/GLM-OCR",
        "glmga": "",
    }
    markers: ClassVar[tuple[str, ...]] = (
        "image_start_token_id",
        "image_end_token_id",
        "video_start_token_id",
        "video_end_token_id",
    )

    def token_types(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Frames have the placeholders of images, between the markers of their video."""
        types, config = super().token_types(model, ids), model.config
        inside = (ids == config.video_start_token_id).cumsum(-1) > (ids == config.video_end_token_id).cumsum(-1)
        return torch.where((types == IMAGE) & inside, VIDEO, types).to(types.dtype)
