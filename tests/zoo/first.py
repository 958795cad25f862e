"""Families of LLaVA, Qwen-VL, GLM-V, InternVL, Idefics, Gemma 3, Mllama, Cohere, DeepSeek-VL, LFM2-VL, Llama 4, BLIP-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from zoo.parts import (
    BREAK,
    CLIP,
    CLOSE,
    COLUMN,
    DEEP,
    EXPERTS,
    FAKE,
    GLM_EXPERTS,
    GLM_IDS,
    GLM_TEXT,
    GLM_VISION,
    IMG,
    LAST,
    LATENT,
    MISTRAL,
    OPEN,
    OPT,
    PIXTRAL,
    QWEN2,
    ROPE,
    ROW,
    SIGLIP,
    TEXT,
    TOWER,
    VID,
    Pixels,
    Tiny,
    grids,
    llava,
    merged,
    merging,
    per_sequence,
    squares,
    standing_in,
    timm,
    tokens,
    typed,
)

# Images of several sizes


def _rows(number: int, merge: int) -> list[int]:
    """Pixtral: an even image of 16 x 16 pixels, an odd one of 16 x 24; every row has a token behind it."""
    high, wide = 16 // (4 * merge), (16 + 8 * (number % 2)) // (4 * merge)
    return [*([*[IMG] * wide, BREAK] * (high - 1)), *[IMG] * wide, CLOSE]


def _rectangles(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    sizes = torch.tensor([[16, 16 + 8 * (number % 2)] for number in range(images)])
    pixels = torch.randn(images, 3, 16, int(sizes[:, 1].max()), generator=generator)
    return {"pixel_values": pixels, "image_sizes": sizes}


def _anyres(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    sizes = torch.tensor([[8 + 8 * (number % 2), 32] for number in range(images)])
    return {"pixel_values": torch.randn(images, 3, 3, 16, 16, generator=generator), "image_sizes": sizes}


def _anyres_tokens(number: int) -> list[int]:
    """16 of the small image; 4 x 8 of two tiles, of which 2 rows are padding for the flat image; a newline for each row."""
    rows = 4 if number % 2 else 2
    return [IMG] * (16 + rows * (8 + 1))


# Tiles


def _idefics3(number: int) -> list[int]:
    some = [IMG] * 4
    return [FAKE, ROW, *some, FAKE, COLUMN, *some, 13, FAKE, LAST, *some, FAKE]


def _idefics2(number: int) -> list[int]:
    """The first image is split into five parts, the others are whole."""
    parts = 1 if number else 5
    return [*([FAKE, *[IMG] * 4] * parts), FAKE]


def _spatial(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """LFM2: two tiles of 4 x 4 patches and a thumbnail of 2 x 4."""
    shapes = torch.tensor([[4, 4], [4, 4], [2, 4]] * images)
    mask = torch.arange(16) < shapes.prod(1)[:, None]
    pixels = torch.randn(3 * images, 16, 48, generator=generator) * mask[..., None]
    return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask.long()}


def _mllama(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(1, images, 1, 3, 16, 16, generator=generator),
        "aspect_ratio_ids": torch.ones(1, images, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, images, 1, dtype=torch.long),
    }


def _mllama_tiles(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """An even image has two tiles side by side, an odd one has one and an empty place."""
    tiles = torch.tensor([2 - number % 2 for number in range(images)])
    mask = torch.arange(2) < tiles[:, None]
    pixels = torch.randn(1, images, 2, 3, 16, 16, generator=generator) * mask[None, :, :, None, None, None]
    return {"pixel_values": pixels, "aspect_ratio_ids": tiles[None], "aspect_ratio_mask": mask[None].long()}


def _mllama_sees(ids: Tensor) -> dict[str, Tensor]:
    """Tokens see the tiles of images that came before them."""
    starts = (ids[0] == IMG).nonzero()[:, 0]
    tiles = torch.arange(2) < 2 - torch.arange(len(starts))[:, None] % 2
    later = torch.arange(ids.shape[1])[:, None] >= starts
    return {"cross_attention_mask": (later[..., None] & tiles)[None].long()}


def _codes(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**squares()(images, generator), "image_sizes": torch.tensor([[16, 16]] * images)}


def gemma3(window: int) -> Tiny:
    text = dict(
        sliding_window=window, query_pre_attn_scalar=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_hidden_layers=6,
    )  # fmt: skip
    return Tiny(
        lambda: (
            hf.Gemma3ForConditionalGeneration,
            hf.Gemma3Config(
                text_config={**TEXT, **text}, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=IMG,
                boi_token_index=OPEN, eoi_token_index=CLOSE,
            ),
        ),
        tokens(4, [OPEN], [CLOSE]), squares(), typed("token_type_ids"),
    )  # fmt: skip


def paligemma(text: str) -> Tiny:
    return Tiny(
        lambda: (
            hf.PaliGemmaForConditionalGeneration,
            hf.PaliGemmaConfig(
                text_config={**TEXT, "model_type": text, "query_pre_attn_scalar": 8}, vision_config={**SIGLIP, "projection_dim": 32},
                image_token_index=IMG, projection_dim=32, hidden_size=32,
            ),
        ),
        tokens(16), squares(), lambda ids: {"token_type_ids": torch.zeros_like(ids)}, leads=True,
    )  # fmt: skip


def cohere(cls: str, config: str, layout: Callable[[int], list[int]], window: int, **options: Any) -> Tiny:
    text = {**TEXT, "model_type": "cohere2", "sliding_window": window}
    return Tiny(
        lambda: (
            getattr(hf, cls),
            getattr(hf, config)(
                text_config=text, vision_config=SIGLIP, **{_image_field(config): IMG}, downsample_factor=2, **options
            ),
        ),
        layout, squares(tiles=3), vocabulary={"<|START_OF_IMG|>": OPEN},
    )  # fmt: skip


def _image_field(config: str) -> str:
    return "image_token_index" if config == "AyaVisionConfig" else "image_token_id"


def _aya(number: int) -> list[int]:
    some = [IMG] * 4
    return [OPEN, ROW, *some, COLUMN, *some, LAST, *some, CLOSE]


def _lines(number: int) -> list[int]:
    return [OPEN, *([*[IMG] * 4, BREAK] * 3), CLOSE]


def mllama(tiles: int, pixels: Pixels, types: Callable[[Tensor], dict[str, Tensor]], **options: Any) -> Tiny:
    """Images of one tile that all tokens see, or of several that tokens behind them see."""
    return Tiny(
        lambda: (
            hf.MllamaForConditionalGeneration,
            hf.MllamaConfig(
                text_config={**TEXT, "cross_attention_layers": [1, 3], "rope_parameters": ROPE},
                vision_config=dict(
                    hidden_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=4, intermediate_size=64,
                    vision_output_dim=64, image_size=16, patch_size=4, max_num_tiles=tiles, intermediate_layers_indices=[0],
                    supported_aspect_ratios=[[1, wide + 1] for wide in range(tiles)],
                ),
                image_token_index=IMG,
            ),
        ),
        tokens(1), pixels, types, by_sequence=True, **options,
    )  # fmt: skip


def blip(cls: str, config: str, text: dict[str, Any], **extra: Tensor) -> Tiny:
    former = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=32, vocab_size=100,
        cross_attention_frequency=1, max_position_embeddings=64,
    )  # fmt: skip
    return Tiny(
        lambda: (
            getattr(hf, cls),
            getattr(hf, config)(
                text_config=text, vision_config=TOWER, qformer_config=former, num_query_tokens=4, image_token_index=IMG
            ),
        ),
        tokens(4), lambda images, generator: {**squares()(images, generator), **extra}, leads=True, single_image=True,
    )  # fmt: skip


MODELS: dict[str, Tiny] = {
    "llava": Tiny(llava(dict(model_type="llama")), tokens(16), squares()),
    "llava_qwen2": Tiny(llava(QWEN2, SIGLIP, vision_feature_select_strategy="full", vision_feature_layer=-1), tokens(16), squares()),
    "llava_pixtral": Tiny(
        llava(MISTRAL, PIXTRAL, vision_feature_layer=-1, vision_feature_select_strategy="full"), lambda n: _rows(n, 1), _rectangles
    ),
    "llava_next": Tiny(
        lambda: (
            hf.LlavaNextForConditionalGeneration,
            hf.LlavaNextConfig(
                text_config={**TEXT, **MISTRAL}, vision_config=CLIP, image_token_index=IMG, image_grid_pinpoints=[[16, 32]]
            ),
        ),
        _anyres_tokens, _anyres,
    ),
    "llava_onevision": Tiny(
        lambda: (
            hf.LlavaOnevisionForConditionalGeneration,
            hf.LlavaOnevisionConfig(
                text_config={**TEXT, **QWEN2}, vision_config=SIGLIP, image_token_index=IMG, video_token_index=VID,
                image_grid_pinpoints=[[16, 32]], vision_feature_layer=-1,
            ),
        ),
        _anyres_tokens, _anyres,
    ),
    "vipllava": Tiny(
        lambda: (
            hf.VipLlavaForConditionalGeneration,
            hf.VipLlavaConfig(
                text_config={**TEXT, "model_type": "llama"}, vision_config=CLIP, image_token_index=IMG, vision_feature_layers=[-1, -2],
                image_seq_length=16,
            ),
        ),
        tokens(16), squares(),
    ),
    "video_llava": Tiny(
        lambda: (
            hf.VideoLlavaForConditionalGeneration,
            hf.VideoLlavaConfig(
                text_config={**TEXT, "model_type": "llama"}, vision_config=CLIP, image_token_index=IMG, video_token_index=VID
            ),
        ),
        tokens(16), squares("pixel_values_images"),
    ),
    **{
        name: Tiny(
            lambda window=window: (
                hf.Mistral3ForConditionalGeneration,
                hf.Mistral3Config(
                    text_config={**TEXT, "model_type": "mistral", "sliding_window": window}, vision_config=PIXTRAL, image_token_index=IMG,
                    spatial_merge_size=2,
                ),
            ),
            lambda n: _rows(n, 2), _rectangles,
        )
        for name, window in (("mistral3", None), ("mistral3_window", 8))
    },
    "qwen2_vl": merging(
        "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", {}, dict(embed_dim=32, hidden_size=32, mlp_ratio=2)
    ),
    "qwen2_5_vl": merging(
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", {}, dict(window_size=16, fullatt_block_indexes=[1])
    ),
    "qwen3_vl": merging("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", {}, DEEP),
    "qwen3_vl_moe": merging("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", EXPERTS, DEEP),
    "glm4v": merging("Glm4vConfig", "Glm4vForConditionalGeneration", GLM_TEXT, GLM_VISION, **GLM_IDS),
    "glm4v_moe": merging(
        "Glm4vMoeConfig", "Glm4vMoeForConditionalGeneration", {**GLM_TEXT, **GLM_EXPERTS}, GLM_VISION, **GLM_IDS
    ),
    "glm46v": merging(
        "Glm46VConfig", "Glm46VForConditionalGeneration", {**GLM_TEXT, "model_type": "glm4v_text"},
        {**GLM_VISION, "model_type": "glm4v_vision"}, **GLM_IDS,
    ),
    "kimi_k25": Tiny(
        lambda: (
            hf.Kimi_K25ForConditionalGeneration,
            hf.Kimi_K25Config(
                text_config={**TEXT, **LATENT},
                vision_config=dict(
                    patch_size=4, pos_emb_height=8, pos_emb_width=8, num_attention_heads=4, num_hidden_layers=2, hidden_size=32,
                    intermediate_size=64,
                ),
                projection_hidden_size=32, image_token_id=IMG, video_token_id=VID, vision_start_token_id=OPEN,
                vision_end_token_id=CLOSE,
            ),
        ),
        merged, grids([3, 4, 4]),
    ),
    "internvl": Tiny(
        lambda: (
            hf.InternVLForConditionalGeneration,
            hf.InternVLConfig(
                text_config={**TEXT, **QWEN2}, vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
                image_token_id=IMG, image_seq_length=4,
            ),
        ),
        tokens(8, [OPEN], [CLOSE]), squares(tiles=2),
    ),
    "idefics2": Tiny(
        lambda: (
            hf.Idefics2ForConditionalGeneration,
            hf.Idefics2Config(
                text_config={**TEXT, **MISTRAL}, vision_config=TOWER, image_token_id=IMG,
                perceiver_config=dict(
                    hidden_size=32, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8,
                    num_key_value_heads=2,
                ),
            ),
        ),
        _idefics2, per_sequence(lambda number: 1 if number else 5), by_sequence=True,
    ),
    **{
        name: Tiny(
            lambda cls=cls: (
                getattr(hf, f"{cls}ForConditionalGeneration"),
                getattr(hf, f"{cls}Config")(
                    text_config={**TEXT, "model_type": "llama"}, vision_config=TOWER, image_token_id=IMG, scale_factor=2
                ),
            ),
            _idefics3, per_sequence(lambda number: 3), by_sequence=True, vocabulary={"<global-img>": LAST},
        )
        for name, cls in (("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
    },
    "paligemma": paligemma("gemma"),
    "paligemma2": paligemma("gemma2"),
    "gemma3": gemma3(200),
    "gemma3_window": gemma3(8),
    "mllama": mllama(
        1, _mllama, lambda ids: {"cross_attention_mask": torch.ones(1, ids.shape[1], int((ids == IMG).sum()), 1).long()}
    ),
    "mllama_tiles": mllama(2, _mllama_tiles, _mllama_sees, padding="text before an image reads all images of the batch, missing ones too"),
    "aya_vision": cohere("AyaVisionForConditionalGeneration", "AyaVisionConfig", _aya, 200, adapter_layer_norm_eps=1e-6),
    "cohere2_vision": cohere("Cohere2VisionForConditionalGeneration", "Cohere2VisionConfig", _lines, 200, alignment_intermediate_size=64),
    "cohere2_window": cohere("Cohere2VisionForConditionalGeneration", "Cohere2VisionConfig", _lines, 8, alignment_intermediate_size=64),
    "aria": Tiny(
        lambda: (
            hf.AriaForConditionalGeneration,
            hf.AriaConfig(
                text_config={**TEXT, "model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 4, "moe_num_shared_experts": 1},
                vision_config=dict(model_type="idefics3_vision", **TOWER), image_token_index=IMG, projector_patch_to_query_dict={16: 4},
            ),
        ),
        tokens(4, [OPEN], [CLOSE]), squares(),
    ),
    "ovis2": Tiny(
        lambda: (
            hf.Ovis2ForConditionalGeneration,
            hf.Ovis2Config(
                text_config={**TEXT, **QWEN2}, image_token_id=IMG, visual_indicator_token_ids=[OPEN, ROW, COLUMN, LAST, CLOSE],
                vision_config={**TOWER, "vocab_size": 40, "hidden_stride": 2, "num_visual_indicator_tokens": 5}, vocab_size=100,
                hidden_size=32,
            ),
        ),
        lambda number: [OPEN, *[IMG] * 4, ROW, *[IMG] * 4, COLUMN, *[IMG] * 4, LAST, CLOSE], squares(tiles=3),
    ),
    "deepseek_vl": Tiny(
        lambda: (
            hf.DeepseekVLForConditionalGeneration,
            hf.DeepseekVLConfig(text_config={**TEXT, "model_type": "llama"}, vision_config=SIGLIP, image_token_id=IMG),
        ),
        tokens(16), squares(),
    ),
    "janus": Tiny(
        lambda: (
            hf.JanusForConditionalGeneration,
            hf.JanusConfig(
                text_config={**TEXT, "model_type": "llama"}, image_token_id=IMG,
                vision_config=dict(
                    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4, projection_dim=32,
                    num_image_tokens=16,
                ),
                vq_config=dict(
                    embed_dim=8, num_embeddings=32, latent_channels=32, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
                    num_patches=4, projection_dim=32, image_token_embed_dim=32,
                ),
            ),
        ),
        tokens(16, [OPEN], [CLOSE]), squares(),
    ),
    "emu3": Tiny(
        lambda: (
            hf.Emu3ForConditionalGeneration,
            hf.Emu3Config(
                text_config={**TEXT, "vocab_size": 200, "rope_parameters": ROPE},
                vq_config=dict(
                    codebook_size=16, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
                    attn_resolutions=[1], hidden_size=32, temporal_downsample_factor=2,
                ),
                vocabulary_map={
                    "<image>": IMG, **{f"<|visual token {n:06d}|>": 100 + n for n in range(16)}, "<|extra_200|>": 90,
                },
            ),
        ),
        tokens(8 * 9, [OPEN], [CLOSE]), _codes,
    ),
    "lfm2_vl": Tiny(
        lambda: (
            hf.Lfm2VlForConditionalGeneration,
            hf.Lfm2VlConfig(
                text_config={
                    **TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv", "full_attention"],
                    "block_auto_adjust_ff_dim": False,
                },
                vision_config=dict(
                    model_type="siglip2_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    patch_size=4, num_patches=16, vision_use_head=False,
                ),
                image_token_id=IMG, downsample_factor=2, projector_hidden_size=32,
            ),
        ),
        lambda number: [OPEN, ROW, *[IMG] * 4, COLUMN, *[IMG] * 4, LAST, *[IMG] * 2, CLOSE], _spatial,
        vocabulary={"<|image_start|>": OPEN},
    ),
    "llama4": Tiny(
        lambda: (
            hf.Llama4ForConditionalGeneration,
            hf.Llama4Config(
                text_config={
                    **TEXT, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 2, "attention_chunk_size": 16,
                    "interleave_moe_layer_step": 2,
                },
                vision_config=dict(
                    hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
                    pixel_shuffle_ratio=0.5, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32,
                ),
                image_token_index=IMG, boi_token_index=OPEN, eoi_token_index=CLOSE,
            ),
        ),
        lambda number: [OPEN, *[IMG] * 4, ROW, *[IMG] * 4, COLUMN, LAST, *[IMG] * 4, CLOSE], squares(tiles=3),
    ),
    "blip2": blip("Blip2ForConditionalGeneration", "Blip2Config", OPT),
    "instructblip": blip(
        "InstructBlipForConditionalGeneration", "InstructBlipConfig", {**TEXT, "model_type": "llama"},
        qformer_input_ids=torch.tensor([[1, 5, 6]]),
    ),
    "perception_lm": Tiny(
        lambda: standing_in(
            hf.PerceptionLMForConditionalGeneration,
            hf.PerceptionLMConfig(
                text_config={**TEXT, "model_type": "llama"}, vision_config=timm("vit_pe_core_large_patch14_336"), image_token_id=IMG,
                video_token_id=VID, projector_pooling_ratio=1, vision_use_cls_token=True,
            ),
        ),
        tokens(32, [OPEN]), lambda images, generator: {"pixel_values": torch.randn(images, 2, 3, 16, 16, generator=generator)},
    ),
    "fast_vlm": Tiny(
        lambda: standing_in(
            hf.FastVlmForConditionalGeneration,
            hf.FastVlmConfig(text_config={**TEXT, **QWEN2}, vision_config=timm("fastvit_mci3"), image_token_index=IMG),
        ),
        tokens(16), squares(),
    ),
    "gemma3n": Tiny(
        lambda: standing_in(
            hf.Gemma3nForConditionalGeneration,
            hf.Gemma3nConfig(
                text_config={
                    **TEXT, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100, "num_kv_shared_layers": 2,
                    "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 200,
                    "layer_types": ["sliding_attention", "full_attention"] * 2,
                },
                vision_config=dict(hidden_size=32, vocab_size=4, vocab_offset=100, architecture="mobilenetv5_300m_enc"),
                audio_config=dict(hidden_size=32, conf_num_hidden_layers=1, conf_num_attention_heads=4, vocab_size=4, vocab_offset=104),
                image_token_id=IMG, audio_token_id=VID, boi_token_id=OPEN, eoi_token_id=CLOSE, vision_soft_tokens_per_image=16,
            ),
        ),
        tokens(16, [OPEN], [CLOSE]), squares(), typed("token_type_ids"),
    ),
    "deepseek_vl_hybrid": Tiny(
        lambda: (
            hf.DeepseekVLHybridForConditionalGeneration,
            hf.DeepseekVLHybridConfig(
                text_config={**TEXT, "model_type": "llama"}, vision_config=SIGLIP, image_token_id=IMG,
                high_res_vision_config=dict(
                    model_type="sam_vision_model", hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4,
                    image_size=64, patch_size=4, window_size=4, global_attn_indexes=[1], mlp_dim=64,
                ),
            ),
        ),
        tokens(16),
        lambda images, generator: {
            **squares()(images, generator), "high_res_pixel_values": torch.randn(images, 3, 64, 64, generator=generator)
        },
    ),
    "florence2": Tiny(
        lambda: (
            hf.Florence2ForConditionalGeneration,
            hf.Florence2Config(
                text_config=dict(
                    model_type="bart", vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, bos_token_id=1,
                    eos_token_id=2, pad_token_id=0, decoder_start_token_id=2, forced_eos_token_id=None,
                ),
                vision_config=dict(
                    depths=[1], patch_size=[3], patch_stride=[4], patch_padding=[1], patch_prenorm=[False], embed_dim=[32],
                    num_heads=[4], num_groups=[4], window_size=4, projection_dim=32,
                ),
                image_token_id=IMG,
            ),
        ),
        tokens(17), squares(), leads=True, single_image=True, padding="the learned positions of its encoder count padding",
    ),
}  # fmt: skip
