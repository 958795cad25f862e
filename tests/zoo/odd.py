"""Families that read images in other ways: discrete codes, patches without a tower, mixed views."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from zoo.parts import CLOSE, FAKE, IMG, OPEN, ROPE, ROW, TEXT, TOWER, Tiny, squares, tokens

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
