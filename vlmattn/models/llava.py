"""LLaVA-1.5 in its Hugging Face form, with a CLIP or SigLIP tower and any language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.errors import UnsupportedError
from vlmattn.models.base import Family, register_family, share_out
from vlmattn.request import TEXT

_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Family):
    """Every image has the same number of tokens and no separators: adjacent images are told apart by that number."""

    model_types: ClassVar[Mapping[str, str]] = {"llava": "llava-hf/llava-1.5-7b-hf"}

    def check(self, model: PreTrainedModel) -> None:
        tower = model.config.vision_config.model_type
        if tower not in _TOWERS:
            raise UnsupportedError(
                f"LLaVA with a '{tower}' tower is not supported yet; supported towers: {', '.join(_TOWERS)}"
            )

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        encoded = inputs.get("mm_encoder_outputs") or {}
        if (images := encoded.get("image")) is not None:  # generate() encodes the images before the first forward
            return [len(features) for features in images.pooler_output]
        pixels = inputs.get("pixel_values")
        return None if pixels is None else [model.config.image_seq_length] * len(pixels)

    def pixels(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return {}
        tokens = (self.token_types(model, inputs["input_ids"]) != TEXT).sum(1).tolist()
        return {"pixel_values": share_out(tokens, [(sum(tokens) // max(len(pixels), 1), 1)] * len(pixels))}

    def tower(self, model: PreTrainedModel) -> nn.Module:
        return model.model.vision_tower  # type: ignore[no-any-return, union-attr]

    def tower_attention(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        found: list[Any] = [module.self_attn for module in self.tower(model).modules() if hasattr(module, "self_attn")]
        return found

    def summary_attention(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        images, tokens, _ = hidden.shape
        attn: Any = module
        has_cls = model.config.vision_config.model_type == "clip_vision_model"
        query = attn.q_proj(hidden[:, :1] if has_cls else hidden).mean(1)
        query = query.view(images, attn.num_heads, 1, -1).float()
        key = attn.k_proj(hidden).view(images, tokens, attn.num_heads, -1).transpose(1, 2).float()
        attention = torch.softmax(query @ key.transpose(-1, -2) * attn.scale, -1)[:, :, 0]
        return list(attention[..., 1:] if model.config.vision_feature_select_strategy == "default" else attention)

    def patch_keys(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        attn: Any = module
        keys = attn.k_proj(hidden).unflatten(-1, (attn.num_heads, -1)).mean(2).float()
        return list(keys[:, 1:] if model.config.vision_feature_select_strategy == "default" else keys)

    def patch_features(self, model: PreTrainedModel, output: Any) -> list[tuple[Tensor, Tensor | None]]:
        layer = model.config.vision_feature_layer
        if not isinstance(layer, int):  # features of several layers side by side
            return []
        hidden = output.hidden_states[layer]
        if model.config.vision_feature_select_strategy == "default":
            return [(image[1:], image[0]) for image in hidden]
        return [(image, None) for image in hidden]

    def project(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        return model.model.multi_modal_projector(features)  # type: ignore[no-any-return, union-attr, operator]


register_family(Llava())
