"""Families that read images in other ways: discrete codes, patches without a tower, mixed views."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from zoo.first import _idefics3
from zoo.parts import CLOSE, FAKE, IMG, LAST, OPEN, ROPE, ROW, TEXT, Tiny, squares, tokens

STEP_VISION = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
    intermediate_size=64,
    max_position_embeddings=16,
)


SAM = dict(
    hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=4, window_size=4,
    global_attn_indexes=[1], mlp_dim=64, downsample_channels=[16, 32], scale=64,
)  # fmt: skip
ENCODER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)


def _tiles(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(1, 3 * images, 3, 16, 16, generator=generator),
        "pixel_attention_mask": torch.ones(1, 3 * images, dtype=torch.bool),
    }


def _fuyu(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, images * 4, 48, generator=generator)}


MODELS: dict[str, Tiny] = {
    "fuyu": Tiny(
        lambda: (
            hf.FuyuForCausalLM,
            hf.FuyuConfig(text_config={**TEXT, "model_type": "persimmon", "hidden_dropout": 0.0}, patch_size=4, image_size=16, image_token_id=IMG),
        ),
        lambda number: [*[IMG, IMG, ROW] * 2], _fuyu, single_image=True,
    ),
    **{
        name: Tiny(
            lambda cls=cls, config=config, encoder=encoder: (
                getattr(hf, cls),
                getattr(hf, config)(
                    text_config={
                        **TEXT, "n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
                        "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"] * 2,
                        **({"layer_types": ["reference_sliding_attention"] * 4, "sliding_window": 200, "num_key_value_heads": 4} if "Unlimited" in cls else {}),
                    },
                    vision_config=dict(sam_config=SAM, encoder_config={**ENCODER, **encoder}), image_token_id=IMG,
                ),
            ),
            tokens(count), lambda images, generator: {"pixel_values": torch.randn(images, 3, 64, 64, generator=generator)},
        )
        for name, cls, config, encoder, count in (
            ("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", "DeepseekOcr2Config", {}, 145),
            ("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", "UnlimitedOcrConfig", dict(image_size=64, patch_size=16), 21),
        )
    },
    "granite_docling": Tiny(
        lambda: (
            hf.GraniteDoclingForConditionalGeneration,
            hf.GraniteDoclingConfig(
                text_config=dict(**TEXT, embedding_multiplier=1.0, logits_scaling=1.0, residual_multiplier=1.0, attention_multiplier=8**-0.5),
                vision_config=dict(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
                    out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0, 1], use_fine_route=False,
                ),
                image_token_id=IMG,
            ),
        ),
        _idefics3, _tiles, by_sequence=True, vocabulary={"<global-img>": LAST},
    ),
    "step3p7": Tiny(
        lambda: (
            hf.Step3p7ForConditionalGeneration,
            hf.Step3p7Config(
                text_config={
                    **TEXT, "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 200, "n_routed_experts": 4,
                    "num_experts_per_tok": 4, "moe_intermediate_size": 16, "share_expert_dim": 16, "num_sliding_attention_heads": 4,
                    "mlp_layer_types": ["dense", "sparse"] * 2, "rope_parameters": ROPE,
                },
                vision_config=STEP_VISION, image_token_id=IMG,
            ),
        ),
        lambda number: [FAKE, *[IMG] * 1, ROW, OPEN, *[IMG] * 1, CLOSE],
        lambda images, generator: {
            **squares()(images, generator), "pixel_values_local": torch.randn(images, 3, 16, 16, generator=generator),
            "num_local_patches": torch.ones(images, dtype=torch.long),
        },
        vocabulary={"<im_start>": OPEN},
    ),
}  # fmt: skip
