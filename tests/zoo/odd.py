"""Families that read images in other ways: discrete codes, patches without a tower, mixed views."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from zoo.first import _idefics3
from zoo.parts import CLOSE, FAKE, IMG, LAST, OPEN, ROPE, ROW, TEXT, TOWER, Tiny, squares, tokens

_CODES = {f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(n))}Z": 100 + n for n in range(16)}


def _chameleon() -> tuple[type[hf.PreTrainedModel], hf.PreTrainedConfig]:
    vq = dict(
        embed_dim=8, num_embeddings=16, latent_channels=8, resolution=16, base_channels=32, channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
    )  # fmt: skip
    text = {**TEXT, "vocab_size": 120, "num_key_value_heads": 2}
    text.pop("head_dim")
    config = hf.ChameleonConfig(**text, vq_config=vq, vocabulary_map={"<image>": IMG, **_CODES}, rope_parameters=ROPE)
    return hf.ChameleonForConditionalGeneration, config


def _instructblipvideo() -> tuple[type[hf.PreTrainedModel], hf.PreTrainedConfig]:
    former = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=32, vocab_size=100,
        cross_attention_frequency=1, max_position_embeddings=64,
    )  # fmt: skip
    text = {**TEXT, "model_type": "llama"}
    return hf.InstructBlipVideoForConditionalGeneration, hf.InstructBlipVideoConfig(
        text_config=text, vision_config=TOWER, qformer_config=former, num_query_tokens=4, video_token_index=IMG
    )


def _frames(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(images, 4, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "qformer_input_ids": torch.tensor([[1, 5, 6]])}


_COUNTED = "positions of generated tokens count the padding, those of the prompt do not"
_KOSMOS = dict(
    vocab_size=100, embed_dim=32, layers=4, ffn_dim=64, attention_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def _kosmos2() -> tuple[type[hf.PreTrainedModel], hf.PreTrainedConfig]:
    config = hf.Kosmos2Config(text_config=_KOSMOS, vision_config=TOWER, latent_query_num=4)
    return hf.Kosmos2ForConditionalGeneration, config


def _kosmos2_5() -> tuple[type[hf.PreTrainedModel], hf.PreTrainedConfig]:
    vision = dict(
        hidden_size=32, patch_embed_hidden_size=48, intermediate_size=64, head_dim=8, num_hidden_layers=2, num_attention_heads=4,
        max_num_patches=16,
    )  # fmt: skip
    config = hf.Kosmos2_5Config(text_config=_KOSMOS, vision_config=vision, latent_query_num=4)
    return hf.Kosmos2_5ForConditionalGeneration, config


def _flattened(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """4 x 4 patches, each behind its row and column."""
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float()
    patches = torch.randn(images, 16, 48, generator=generator)
    return {"flattened_patches": torch.cat([places.expand(images, -1, -1), patches], 2)}


def _places(ids: Tensor) -> dict[str, Tensor]:
    return {"image_embeds_position_mask": (ids == IMG).long()}


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
    "chameleon": Tiny(_chameleon, tokens(16, (OPEN,), (CLOSE,)), squares()),
    "instructblipvideo": Tiny(_instructblipvideo, tokens(16), _frames, leads=True, single_image=True),
    "kosmos2": Tiny(_kosmos2, tokens(4, (OPEN,), (CLOSE,)), squares(), _places, padding=_COUNTED),
    "kosmos2_5": Tiny(_kosmos2_5, tokens(4, (OPEN,), (CLOSE,)), _flattened, _places, padding=_COUNTED),
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
