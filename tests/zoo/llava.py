"""Families of later LLaVA-like and document models."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from zoo.first import MISTRAL, QWEN2, _anyres, _anyres_tokens, _rectangles
from zoo.parts import (
    BREAK,
    CLIP,
    CLOSE,
    FAKE,
    IMG,
    MERGING,
    OPEN,
    PIXTRAL,
    ROPE,
    ROW,
    SIGLIP,
    TEXT,
    TOWER,
    VID,
    Tiny,
    grids,
    merged,
    size_in_patches,
    squares,
    tokens,
    typed,
)
from zoo.qwen import DELTA

QWEN3 = dict(model_type="qwen3")
SAM = dict(
    hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=4, window_size=4,
    global_attn_indexes=[1], mlp_dim=64,
)  # fmt: skip


def _merged_sizes(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    found = grids([48])(images, generator)
    return {**found, "image_merge_sizes": torch.full((images,), 2)}


def _sliced(number: int) -> list[int]:
    """MiniCPM-V: the whole in small (4 x 8 patches), then for an even image two slices side by side."""
    slices = [FAKE, *[IMG] * 1, ROW] * 2 if number % 2 == 0 else []
    return [OPEN, *[IMG] * 2, CLOSE, *slices]


def _packed(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    sizes = torch.tensor([size for n in range(images) for size in ([4, 8], *([[4, 4]] * 2 if n % 2 == 0 else []))])
    pixels = torch.randn(1, 3, 4, 4 * int(sizes.prod(1).sum()), generator=generator)
    return {"pixel_values": pixels, "target_sizes": sizes.int()}


def _molmo(number: int) -> list[int]:
    """The picture in small (2 x 2 tokens), then in full: 2 x 4 for an even image, else 2 x 2; a token ends each row."""
    rows = [*[IMG] * (2 if number % 2 else 4), BREAK] * 2
    return [FAKE, *[IMG, IMG, BREAK] * 2, CLOSE, OPEN, *rows, CLOSE]


def _crops(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Crops of 4 x 4 patches, four of which become a token: one in small, then one or two side by side."""
    square = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    wide = [0 if number % 2 else 1 for number in range(images)]
    counts = [2 + more for more in wide]
    pooling, first = [], 0
    for more, count in zip(wide, counts, strict=True):
        pooling.append(square + 16 * first)
        tokens = [square.view(2, 2, 4) + 16 * (first + 1 + n) for n in range(1 + more)]
        pooling.append(torch.cat(tokens, 1).view(-1, 4))
        first += count
    return {
        "pixel_values": torch.randn(sum(counts), 16, 48, generator=generator), "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor([[2, 2, 2, 4 if more else 2] for more in wide]), "image_num_crops": torch.tensor(counts),
    }  # fmt: skip


def minicpm(cls: str, config: str, **ids: int) -> Tiny:
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
        insert_layer_id=0,
    )  # fmt: skip
    return Tiny(
        lambda: (
            getattr(hf, cls),
            getattr(hf, config)(
                text_config={**TEXT, **DELTA, "model_type": "qwen3_5_text"}, vision_config=vision, image_token_id=IMG,
                video_token_id=VID, insert_layer_id=0, downsample_mode="16x", **ids,
            ),
        ),
        _sliced, _packed, typed() if ids else lambda ids: {}, vocabulary={"<image>": OPEN}, pixel_axis=3,
    )  # fmt: skip


MODELS: dict[str, Tiny] = {
    "llava_next_video": Tiny(
        lambda: (
            hf.LlavaNextVideoForConditionalGeneration,
            hf.LlavaNextVideoConfig(
                text_config={**TEXT, **MISTRAL}, vision_config=CLIP, image_token_index=IMG, video_token_index=VID,
                image_grid_pinpoints=[[16, 32]],
            ),
        ),
        _anyres_tokens, _anyres,
    ),
    "granite4_vision": Tiny(
        lambda: (
            hf.Granite4VisionForConditionalGeneration,
            hf.Granite4VisionConfig(
                text_config=dict(**TEXT, attention_multiplier=8**-0.5), vision_config={**CLIP, "hidden_size": 64, "num_hidden_layers": 3},
                qformer_config=dict(
                    model_type="blip_2_qformer", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
                    encoder_hidden_size=32, cross_attention_frequency=1, vocab_size=100,
                ),
                image_token_index=IMG, image_grid_pinpoints=[[16, 32]], downsample_rate="1/2", deepstack_layer_map=[[-1, 0], [-2, 2]],
                spatial_target_layers=[1, 1, 2, 2],
            ),
        ),
        tokens(4 + 2 * 5), _anyres,
    ),
    "video_llama_3": Tiny(
        lambda: (
            hf.VideoLlama3ForConditionalGeneration,
            hf.VideoLlama3Config(
                text_config={**TEXT, **QWEN2}, image_token_id=IMG, video_token_id=VID,
                vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=4),
            ),
        ),
        lambda number: merged(number)[1:-1], _merged_sizes,
    ),
    "minicpmv4_6": minicpm("MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_6Config"),
    "minicpmv4_7": minicpm(
        "MiniCPMV4_7ForConditionalGeneration", "MiniCPMV4_7Config", image_start_id=OPEN, image_end_id=CLOSE, slice_start_id=FAKE,
        slice_end_id=ROW, newline_id=13,
    ),
    "minicpm_ocr": minicpm("MiniCPMOcrForConditionalGeneration", "MiniCPMOcrConfig"),
    "molmo2": Tiny(
        lambda: (
            hf.Molmo2ForConditionalGeneration,
            hf.Molmo2Config(
                text_config={**TEXT, "additional_vocab_size": 0},
                vision_config=dict(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
                    image_size=[16, 16], patch_size=4, num_position_embeddings=16,
                ),
                adapter_config=dict(
                    vision_feature_layer=[-1, -2], hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
                    intermediate_size=64, text_hidden_size=32,
                ),
                image_patch_id=IMG, image_start_token_id=OPEN, low_res_image_start_token_id=FAKE, image_end_token_id=CLOSE,
                frame_start_token_id=ROW, frame_end_token_id=94,
            ),
        ),
        _molmo, _crops, typed(),
    ),
    "lighton_ocr": Tiny(
        lambda: (
            hf.LightOnOcrForConditionalGeneration,
            hf.LightOnOcrConfig(text_config={**TEXT, **QWEN3}, vision_config=PIXTRAL, image_token_id=IMG),
        ),
        lambda number: [OPEN, *[IMG] * (6 if number % 2 else 4)][1:],
        _rectangles,
    ),
    "qianfan_ocr": Tiny(
        lambda: (
            hf.QianfanOCRForConditionalGeneration,
            hf.QianfanOCRConfig(
                text_config={**TEXT, **QWEN3}, vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
                image_token_id=IMG, image_seq_length=4,
            ),
        ),
        tokens(8, [OPEN], [CLOSE]), squares(tiles=2),
    ),
    **{
        name: Tiny(
            lambda config=config: (
                hf.GotOcr2ForConditionalGeneration,
                getattr(hf, config)(text_config={**TEXT, **QWEN2}, vision_config=SAM, image_token_index=IMG, image_seq_length=16),
            ),
            tokens(16, [OPEN], [CLOSE]),
            lambda images, generator: {"pixel_values": torch.randn(images, 3, 64, 64, generator=generator)},
        )
        for name, config in (("got_ocr2", "GotOcr2Config"), ("pp_chart2table", "PPChart2TableConfig"))
    },
    "hyperclovax_vision_v2": Tiny(
        lambda: (
            hf.HyperCLOVAXVisionV2ForConditionalGeneration,
            hf.HyperCLOVAXVisionV2Config(
                text_config={**TEXT, "model_type": "hyperclovax", "attention_multiplier": 8**-0.5, "rope_parameters": ROPE},
                vision_config={**MERGING, "model_type": "qwen2_5_vl_vision", "window_size": 16, "fullatt_block_indexes": [1]},
                image_token_id=IMG, video_token_id=VID,
            ),
        ),
        merged, grids([96]),
    ),
}  # fmt: skip

__all__ = ["MODELS", "SIGLIP", "size_in_patches"]
