"""Families that read images in other ways: discrete codes, patches without a tower, mixed views."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from zoo.parts import CLOSE, FAKE, IMG, OPEN, ROPE, ROW, TEXT, Tiny, squares, tokens

STEP_VISION = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
    intermediate_size=64,
    max_position_embeddings=16,
)


def _fuyu(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, images * 4, 48, generator=generator)}


MODELS: dict[str, Tiny] = {
    "chameleon": Tiny(
        lambda: (
            hf.ChameleonForConditionalGeneration,
            hf.ChameleonConfig(
                **{**TEXT, "vocab_size": 200},
                vq_config=dict(
                    embed_dim=8, num_embeddings=16, latent_channels=8, resolution=16, base_channels=32, channel_multiplier=[1, 1, 2],
                    num_res_blocks=1,
                ),
                vocabulary_map={"<image>": IMG, **{"IMGIMG" + "".join(chr(65 + int(digit)) for digit in str(n)) + "Z": 100 + n for n in range(16)}}, image_token_id=IMG,
            ),
        ),
        tokens(16, [OPEN], [CLOSE]), squares(),
    ),
    "fuyu": Tiny(
        lambda: (
            hf.FuyuForCausalLM,
            hf.FuyuConfig(text_config={**TEXT, "model_type": "persimmon", "hidden_dropout": 0.0}, patch_size=4, image_size=16, image_token_id=IMG),
        ),
        lambda number: [*[IMG, IMG, ROW] * 2], _fuyu, single_image=True,
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
