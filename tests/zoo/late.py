"""Families of other models of 2026."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from zoo.first import _rectangles
from zoo.parts import (
    CLOSE,
    DEEP,
    FAKE,
    GLM_IDS,
    IMG,
    OPEN,
    ROPE,
    ROW,
    TEXT,
    VID,
    Tiny,
    grids,
    merged,
    merging,
    size_in_patches,
    typed,
)
from zoo.qwen import DELTA_EXPERTS

TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=4)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=200)


def by_experts(ids: Tensor) -> dict[str, Tensor]:
    """Kinds of tokens, and whose experts they go to: markers have no kind, and go where their images go."""
    experts = torch.isin(ids, torch.tensor([OPEN, IMG, CLOSE])).int()
    experts[torch.isin(ids, torch.tensor([FAKE, VID, ROW]))] = 2
    return {**typed()(ids), "moe_mm_token_type_ids": experts}


def gridded(
    config: str,
    model: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    layout: Callable[[int], list[int]] = merged,
    width: Sequence[int] = (96,),
    types: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {},
    padding: str = "",
    **options: Any,
) -> Tiny:
    """A model whose images come in grids of patches."""
    return Tiny(
        lambda: (getattr(hf, model), getattr(hf, config)(text_config={**TEXT, **text}, vision_config=vision, **options)),
        layout, grids(width), types, padding=padding,
    )  # fmt: skip


def _hunyuan(number: int) -> list[int]:
    """A token ends each row, and one stands before and behind all."""
    high, wide = size_in_patches(number)
    return [OPEN, *[IMG] * (high // 2 * (wide // 2 + 1) + 2), CLOSE]


def _in_rows(number: int) -> list[int]:
    """A token ends each row."""
    high, wide = size_in_patches(number)
    return [OPEN, *[IMG] * (high // 2 * (wide // 2 + 1)), CLOSE]


def _apertus() -> tuple[Any, Any]:
    vision = dict(
        codebook_size=16, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1,
        attn_resolutions=[4], resolution=16,
    )  # fmt: skip
    audio = dict(
        model_type="wavtokenizer_encoder",
        num_filters=2,
        num_lstm_layers=1,
        hidden_size=8,
        codebook_dim=8,
        codebook_size=8,
    )
    config = hf.Apertus1p5Config(
        text_config={**TEXT, "vocab_size": 124}, vision_config=vision, audio_config=audio, image_token_id=IMG, audio_token_id=VID,
        image_token_offset=100, audio_token_offset=116,
    )  # fmt: skip
    return hf.Apertus1p5ForConditionalGeneration, config


def _coded(number: int) -> list[int]:
    """The size as text, then a code for each 4 x 4 pixels; a token stands between rows."""
    wide = 4 + 2 * (number % 2)
    row = [IMG] * wide
    return [OPEN, 61, 62, FAKE, *[*row, ROW] * 3, *row, CLOSE]


MODELS: dict[str, Tiny] = {
    "hunyuan_vl": gridded(
        "HunYuanVLConfig", "HunYuanVLForConditionalGeneration", dict(rope_parameters={**ROPE, "mrope_section": [1, 1, 1, 1]}),
        dict(**TOWER, num_key_value_heads=4, out_hidden_size=32, text_hidden_size=32, img_max_token_num=64, max_image_size=32, min_image_size=16, max_vit_seq_len=64), width=[48],
        image_token_id=IMG, im_start_id=OPEN, im_end_id=CLOSE, im_newline_id=91, layout=_hunyuan, types=typed(), padding="its positions count padding",
    ),
    "muse_glimmer": gridded(
        "MuseGlimmerConfig", "MuseGlimmerForConditionalGeneration", dict(**WINDOWS, layer_rope_theta=[1e4] * 4),
        dict(**TOWER, pos_emb_height=8, pos_emb_width=8), image_token_id=IMG, video_token_id=VID, out_hidden_size=128, projector_hidden_size=32,
    ),
    "muse_spark": gridded(
        "MuseSparkConfig", "MuseSparkForConditionalGeneration",
        dict(**WINDOWS, layer_rope_theta=[1e4, 0] * 2, moe_intermediate_size=16, num_local_experts=4, num_experts_per_tok=4, moe_hidden_size=32),
        dict(**TOWER, pos_emb_height=8, pos_emb_width=8), image_token_id=IMG, video_token_id=VID, out_hidden_size=128, projector_hidden_size=32,
        audio_config=dict(out_hidden_size=32, hidden_sizes=[8] * 4, depths=[1] * 4),
    ),
    "minimax_m3_vl": gridded(
        "MiniMaxM3VLConfig", "MiniMaxM3SparseForConditionalGeneration",
        dict(num_local_experts=4, num_experts_per_tok=4, dense_intermediate_size=64, shared_intermediate_size=32, rotary_dim=8, index_n_heads=2, index_head_dim=8),
        dict(**TOWER, image_size=16), image_token_index=IMG, video_token_index=VID, projector_hidden_size=32,
    ),
    "lfm3_vl": gridded(
        "Lfm3VlConfig", "Lfm3VlForConditionalGeneration", dict(layer_types=["conv", "full_attention"] * 2),
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, patch_size=4, layer_types=["conv", "full_attention"]),
        image_token_id=IMG, video_token_id=VID, vision_start_token_id=OPEN, vision_end_token_id=CLOSE, projector_hidden_size=32,
    ),
    "ernie4_5_vl_moe": replace(merging(
        "Ernie4_5_VLMoeConfig", "Ernie4_5_VLMoeForConditionalGeneration",
        dict(moe_intermediate_size=[32, 32], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1, rope_parameters={**ROPE, "mrope_section": [1, 1, 2]}), {}, [48],
        **GLM_IDS,
    ), types=by_experts, uncached="it does not lengthen what says whose experts tokens go to"),
    "apertus1p5": Tiny(_apertus, _coded, _rectangles),
    "hy_v4_vl": gridded(
        "HYV4VLConfig", "HYV4VLForConditionalGeneration",
        dict(
            num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_topk=64,
            index_head_dim=8, index_n_heads=2, n_routed_experts=4, num_experts_per_tok=4, moe_intermediate_size=16, learnable_sink_init=0.5,
            hc_mult=2, rope_parameters={**ROPE, "mrope_section": [2, 1, 1]},
        ),
        dict(**TOWER, out_hidden_size=32, max_image_size=32), image_token_id=IMG, video_token_id=VID, layout=_in_rows, width=[48], types=typed(),
    ),
    "qwen4_exp": merging("Qwen4ExpConfig", "Qwen4ExpForConditionalGeneration", dict(**DELTA_EXPERTS, hc_count=2, hc_lowrank=4, indexer_budget=64, indexer_compress_ratio=4, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8), DEEP | dict(deepstack_visual_indexes=[])),
}  # fmt: skip
