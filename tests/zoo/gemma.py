"""Families of Gemma 4, Mistral Large 4 and hybrid language models."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from zoo.first import _rectangles as rectangles
from zoo.first import _rows
from zoo.parts import CLOSE, IMG, OPEN, PIXTRAL, SIGLIP, TEXT, VID, Tiny, squares, tokens, typed

GEMMA4 = dict(
    sliding_window=200, layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=100, num_kv_shared_layers=1, global_head_dim=8,
)  # fmt: skip


def _gemma4_pixels(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """4 x 4 patches of 4 x 4 pixels, each with its place."""
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
    return {
        "pixel_values": torch.rand(images, 16, 48, generator=generator), "image_position_ids": places.expand(images, -1, -1),
    }  # fmt: skip


MODELS: dict[str, Tiny] = {
    "shieldgemma2": Tiny(
        lambda: (
            hf.Gemma3ForConditionalGeneration,
            hf.ShieldGemma2Config(
                text_config={
                    **TEXT, "sliding_window": 200, "query_pre_attn_scalar": 8,
                    "layer_types": ["sliding_attention", "full_attention"] * 2,
                },
                vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=IMG, boi_token_index=OPEN, eoi_token_index=CLOSE,
            ),
        ),
        tokens(4, [OPEN], [CLOSE]), squares(), typed("token_type_ids"),
    ),
    "gemma4": Tiny(
        lambda: (
            hf.Gemma4ForConditionalGeneration,
            hf.Gemma4Config(
                text_config={**TEXT, **GEMMA4},
                vision_config=dict(
                    model_type="gemma4_vision", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=4, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=16,
                ),
                image_token_id=IMG, video_token_id=VID, boi_token_id=OPEN, eoi_token_id=CLOSE, audio_token_id=95,
            ),
        ),
        tokens(4, [OPEN], [CLOSE]), _gemma4_pixels, typed(),
    ),
    "mistral_large4": Tiny(
        lambda: (
            hf.MistralLarge4ForConditionalGeneration,
            hf.MistralLarge4Config(
                text_config={
                    **TEXT, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                    "n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "index_topk": 64,
                    "index_head_dim": 8, "index_n_heads": 2,
                },
                vision_config=PIXTRAL, image_token_index=IMG, spatial_merge_size=2,
            ),
        ),
        lambda n: _rows(n, 2), rectangles,
    ),
}  # fmt: skip
