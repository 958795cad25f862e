"""Families of later Qwen and GLM models and their kin."""

from __future__ import annotations

from typing import Any

import transformers as hf

from zoo.parts import (
    CLOSE,
    DEEP,
    EXPERTS,
    GLM_IDS,
    GLM_TEXT,
    GLM_VISION,
    IMG,
    OPEN,
    QWEN_IDS,
    ROPE,
    TEXT,
    TOWER,
    VID,
    Tiny,
    grids,
    merged,
    merging,
)

# Two of four layers have a gated delta rule instead of attention.
DELTA = dict(
    layer_types=["linear_attention", "full_attention"] * 2, linear_conv_kernel_dim=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    rope_parameters={**ROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 1.0},
)  # fmt: skip
DELTA_EXPERTS = {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32}
FLAT = dict(num_position_embeddings=16)
AUDIO = dict(
    d_model=32, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64, output_dim=32, num_mel_bins=16
)


def omni(cls: str, text: dict[str, Any], vision: dict[str, Any], **ids: Any) -> Tiny:
    """The part of an omni model that reads and writes text."""
    config = cls.replace("ForConditionalGeneration", "Config")
    return Tiny(
        lambda: (
            getattr(hf, cls),
            getattr(hf, config)(
                text_config={**TEXT, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}, **text},
                vision_config=dict(
                    depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4,
                    spatial_merge_size=2, temporal_patch_size=2, **vision,
                ),
                audio_config=AUDIO, **ids,
            ),
        ),
        merged, grids([3 * 2 * 4 * 4]),
    )  # fmt: skip


MODELS: dict[str, Tiny] = {
    "qwen3_5": merging("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", DELTA, FLAT),
    "qwen3_5_moe": merging("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration", DELTA_EXPERTS, FLAT),
    "qwen2_5_omni_thinker": omni(
        "Qwen2_5OmniThinkerForConditionalGeneration", {}, dict(window_size=16, fullatt_block_indexes=[1]),
        image_token_index=IMG, video_token_index=VID, audio_token_index=95, audio_start_token_id=94, audio_end_token_id=93, vision_start_token_id=OPEN, vision_end_token_id=CLOSE,
    ),
    "qwen3_omni_moe_thinker": omni(
        "Qwen3OmniMoeThinkerForConditionalGeneration", EXPERTS, DEEP,
        image_token_id=IMG, video_token_id=VID, audio_token_id=95, audio_start_token_id=94, vision_start_token_id=OPEN, vision_end_token_id=CLOSE,
    ),
    "glm_ocr": merging("GlmOcrConfig", "GlmOcrForConditionalGeneration", GLM_TEXT, GLM_VISION, **GLM_IDS),
    "glmga": merging(
        "GlmgaConfig", "Glm46VForConditionalGeneration", {**GLM_TEXT, "model_type": "glm4v_text"},
        {**GLM_VISION, "model_type": "glm4v_vision"}, **GLM_IDS,
    ),
    "exaone4_5": merging(
        "Exaone4_5_Config", "Exaone4_5_ForConditionalGeneration",
        {"model_type": "exaone4", "rope_parameters": ROPE, "layer_types": ["full_attention"] * 4},
        dict(window_size=16, fullatt_block_indexes=[1], num_key_value_heads=2), said=False, image_token_id=IMG, video_token_id=VID,
    ),
    "cohere_compass": merging("CohereCompassConfig", "CohereCompassForConditionalGeneration",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 200,
            "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
        },
        DEEP,
    ),
    "cosmos3_omni": merging("Cosmos3OmniConfig", "Cosmos3OmniForConditionalGeneration", {}, DEEP),
    "cosmos3_edge": merging(
        "Cosmos3EdgeConfig", "Cosmos3EdgeForConditionalGeneration", {}, dict(num_hidden_layers=2, num_attention_heads=4, num_patches=16),
        width=[48], projector_hidden_size=32, **QWEN_IDS,
    ),
    "paddleocr_vl": merging(
        "PaddleOCRVLConfig", "PaddleOCRVLForConditionalGeneration", {}, TOWER, width=[3, 4, 4], **QWEN_IDS
    ),
}  # fmt: skip
