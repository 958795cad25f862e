"""Families of Gemma 4, Mistral Large 4 and hybrid language models."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from zoo.first import _rectangles as rectangles
from zoo.first import _rows
from zoo.parts import CLOSE, IMG, OPEN, PIXTRAL, SIGLIP, TEXT, VID, Tiny, grids, merged, squares, tokens, typed

GEMMA4 = dict(
    sliding_window=200, layer_types=["sliding_attention", *["full_attention"] * 3], hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=100, num_kv_shared_layers=1, global_head_dim=8,
)  # fmt: skip


def _patches_hw(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    found = grids([48])(images, generator)
    return {"pixel_values": found["pixel_values"], "image_grid_hw": found["image_grid_thw"][:, 1:]}


def _gemma4_pixels(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """4 x 4 patches of 4 x 4 pixels, each with its place."""
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
    return {
        "pixel_values": torch.rand(images, 16, 48, generator=generator), "image_position_ids": places.expand(images, -1, -1),
    }  # fmt: skip


def _gemma4(**text: Any) -> Tiny:
    return Tiny(
        lambda: (
            hf.Gemma4ForConditionalGeneration,
            hf.Gemma4Config(
                text_config={**TEXT, **GEMMA4, **text},
                vision_config=dict(
                    model_type="gemma4_vision", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=4, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=16,
                ),
                image_token_id=IMG, video_token_id=VID, boi_token_id=OPEN, eoi_token_id=CLOSE, audio_token_id=95,
            ),
        ),
        tokens(4, [OPEN], [CLOSE]), _gemma4_pixels, typed(),
    )  # fmt: skip


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
    "gemma4": _gemma4(),
    # as the small ones: layers of both kinds reuse keys and values, heads are of two sizes; the window is outgrown
    "gemma4_shared": _gemma4(
        num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3, num_kv_shared_layers=2, sliding_window=6,
        global_head_dim=16,
    ),
    # as the large ones: keys are values where there is no window, images are seen both ways
    "gemma4_key_value": _gemma4(
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, sliding_window=6, global_head_dim=16, attention_k_eq_v=True,
        num_global_key_value_heads=1, use_bidirectional_attention="vision",
    ),
    "gemma4_unified": Tiny(
        lambda: (
            hf.Gemma4UnifiedForConditionalGeneration,
            hf.Gemma4UnifiedConfig(
                text_config={**TEXT, "sliding_window": 200, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 8},
                vision_config=dict(patch_size=4, pooling_kernel_size=1, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32),
                image_token_id=IMG, video_token_id=VID, boi_token_id=OPEN, eoi_token_id=CLOSE, audio_token_id=95,
            ),
        ),
        tokens(16, [OPEN], [CLOSE]), _gemma4_pixels, typed(),
    ),
    "nemotron_h_omni": Tiny(
        lambda: (
            hf.NemotronH_Omni_Reasoning_V3,
            hf.NemotronH_Omni_Reasoning_V3_Config(
                text_config={
                    **{key: value for key, value in TEXT.items() if key != "num_hidden_layers"}, "model_type": "nemotron_h",
                    "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"],
                    "time_step_min": 1e-9, "time_step_floor": 0.05,  # a cached step keeps no minimum, a whole prompt does: bare they differ
                    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8,
                },
                vision_config=dict(
                    model_type="radio", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=4, image_size=16,
                    max_img_size=32, num_cls_tokens=1, num_registers=1, patch_dim=48, video_patch_dim=96, video_temporal_patch_size=2,
                ),
                vision_hidden_size=32, projector_hidden_size=32, image_token_id=IMG, video_token_id=VID,
            ),
        ),
        merged, _patches_hw, calm="mixer.in_proj",
    ),
    # Mistral Small 4: the class of Mistral 3 around a language model with latent attention
    "mistral3_small4": Tiny(
        lambda: (
            hf.Mistral3ForConditionalGeneration,
            hf.Mistral3Config(
                text_config={
                    **TEXT, "model_type": "mistral4", "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1,
                    "topk_group": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 16,
                },
                vision_config=PIXTRAL, image_token_index=IMG, spatial_merge_size=2,
            ),
        ),
        lambda n: _rows(n, 2), rectangles,
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
