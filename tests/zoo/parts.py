"""What tiny models of the zoo are made of: their class, prompts whose images are known, sizes, kinds of pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMG, VID = 99, 98
OPEN, CLOSE, FAKE, ROW, COLUMN, LAST, BREAK = 97, 96, 95, 94, 93, 92, 91  # markers around and between image tokens
TEXT = dict(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
ROPE = dict(rope_type="default", rope_theta=1e4)
MROPE = dict(rope_parameters={**ROPE, "mrope_section": [1, 1, 2]})
TOWER = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)
CLIP = dict(model_type="clip_vision_model", projection_dim=32, **TOWER)
SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False, **TOWER)
PIXTRAL = dict(model_type="pixtral", head_dim=8, **TOWER)
MERGING = dict(
    depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2,
)  # fmt: skip
QWEN_IDS = dict(image_token_id=IMG, video_token_id=VID, vision_start_token_id=OPEN, vision_end_token_id=CLOSE)
_OF_TOKENS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "token_type_ids",
    "image_embeds_position_mask",
)

Pixels = Callable[[int, torch.Generator], dict[str, Tensor]]
"""Image inputs of so many images."""


@dataclass(frozen=True)
class Prompt:
    """What a processor returns for one sequence, and the number of the image of each token ``[1, tokens]``, -1 for others."""

    inputs: dict[str, Tensor]
    images: Tensor


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model.

    Attributes:
        make: class and config; layout: ids of an image's tokens, by its number; pixels: image inputs.
        types: inputs that say what kind each token is, from ids.
        leads: images stand before all text. single_image: there is one. by_sequence: pixels are ``[batch, images, ...]``; pixel_axis: else the axis of images.
        vocabulary: texts of markers, for tokenizers.
        padding, uncached: why the bare model is not the same in a padded batch, or without a cache; "" = it is.
        calm: part of the names of weights that stay small, as a state that runs over all tokens would amplify rounding.
        unbuildable: why there is no such model here.
    """

    make: Callable[[], tuple[type[PreTrainedModel], Any]]
    layout: Callable[[int], list[int]]
    pixels: Pixels
    types: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    leads: bool = False
    single_image: bool = False
    by_sequence: bool = False
    pixel_axis: int = 0
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    image_token: int = IMG
    padding: str = ""
    uncached: str = ""
    unbuildable: str = ""
    calm: str = ""
    seed: int = 0

    def build(self, attn: str = "", seed: int = 0) -> PreTrainedModel:
        """The model in eval mode, with its own choice of attention or another. Weights are large enough for attention to be far from uniform and for images to matter."""
        torch.manual_seed(seed + self.seed)
        cls, config = self.make()
        model = cls(config)
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:  # cross-attention begins shut
                parameter.data.fill_(0.7)
            elif parameter.ndim > 1:
                text = "language_model" in name or "text_model" in name or name.startswith("lm_head")
                calm = bool(self.calm) and self.calm in name
                parameter.data.normal_(0, 0.05 if calm else 0.3 if text else 0.15)
        if attn:
            set_attention(model, attn)
        return model.eval()

    def prompt(self, images: int = 1, words: int = 5, seed: int = 1) -> Prompt:
        """A few words, images, ``words`` more words."""
        generator = torch.Generator().manual_seed(seed)
        text = lambda n: torch.randint(5, 80, (n,), generator=generator).tolist()  # noqa: E731
        runs = [self.layout(number) for number in range(images)]
        before = [] if self.leads else [1, *text(2)]
        ids = torch.tensor([[*before, *(token for run in runs for token in run), *text(words)]])
        numbers = [-1] * len(before)
        for number, run in enumerate(runs):
            numbers += [number if token == self.image_token else -1 for token in run]
        found = torch.full_like(ids, -1)
        found[0, : len(numbers)] = torch.tensor(numbers)
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), **self.types(ids))
        return Prompt({**inputs, **self.pixels(images, generator)}, found)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Give the text decoder an attention function, also where the config is not nested."""
    nested = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config" if nested else "": name})


def padded(tiny: Tiny, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The prompts as one batch, padded on the left."""
    length = max(prompt.images.shape[1] for prompt in prompts)
    batch = {}
    for name in prompts[0].inputs:
        parts = [prompt.inputs[name] for prompt in prompts]
        if name in _OF_TOKENS:
            parts = [pad(part, (length - part.shape[1], 0)) for part in parts]
        elif name == "cross_attention_mask":
            parts = [pad(part, (0, 0, 0, 0, length - part.shape[1], 0)) for part in parts]
        if name == "image_token_pooling":  # numbers of patches among those of all prompts
            before = torch.tensor([0, *(prompt.inputs["pixel_values"][..., 0].numel() for prompt in prompts)]).cumsum(0)
            parts = [part + first for part, first in zip(parts, before, strict=False)]
        if tiny.by_sequence and name not in _OF_TOKENS:
            axis = 2 if name == "cross_attention_mask" else 1
            most = max(part.shape[axis] for part in parts)
            parts = [_padded_to(part, axis, most) for part in parts]
        if name == "aspect_ratio_mask":
            parts = [part.index_fill(2, torch.tensor([0]), 1) for part in parts]  # a missing image has one tile too
        if (
            name in ("pixel_values", "pixel_values_images")
            and not tiny.pixel_axis
            and len({part.shape[1:] for part in parts}) > 1
        ):
            sides = [max(part.shape[axis] for part in parts) for axis in (-2, -1)]
            parts = [pad(part, (0, sides[1] - part.shape[-1], 0, sides[0] - part.shape[-2])) for part in parts]
        batch[name] = torch.cat(parts, tiny.pixel_axis if name == "pixel_values" else 0)
    return batch


def _padded_to(part: Tensor, axis: int, length: int) -> Tensor:
    return torch.cat(
        [part, part.new_zeros(*part.shape[:axis], length - part.shape[axis], *part.shape[axis + 1 :])], axis
    )


def squares(name: str = "pixel_values", tiles: int = 1) -> Pixels:
    """Images of 16 x 16 pixels, ``tiles`` rows of pixels each."""
    return lambda images, generator: {name: torch.randn(images * tiles, 3, 16, 16, generator=generator)}


def tokens(
    count: int, before: Sequence[int] = (), after: Sequence[int] = (), token: int = IMG
) -> Callable[[int], list[int]]:
    """The same for every image: so many image tokens in one run, between markers."""
    return lambda number: [*before, *[token] * count, *after]


def typed(name: str = "mm_token_type_ids") -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda ids: {name: (ids == IMG).int()}


def llava(text: dict[str, Any], vision: dict[str, Any] = CLIP, **options: Any) -> Callable[[], Any]:
    return lambda: (
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig(text_config={**TEXT, **text}, vision_config=vision, image_token_index=IMG, image_seq_length=16, **options),
    )  # fmt: skip


def size_in_patches(number: int) -> tuple[int, int]:
    return 4, 4 + 4 * (number % 2)


def grids(width: Sequence[int]) -> Pixels:
    """Images of 4 x 4 and 4 x 8 patches in turn, patch by patch."""

    def make(images: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = torch.tensor([[1, *size_in_patches(number)] for number in range(images)])
        return {
            "pixel_values": torch.randn(int(grid.prod(1).sum()), *width, generator=generator),
            "image_grid_thw": grid,
        }

    return make


def merged(number: int) -> list[int]:
    high, wide = size_in_patches(number)
    return [OPEN, *[IMG] * (high * wide // 4), CLOSE]


def merging(
    config: str,
    model: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    width: Sequence[int] = (96,),
    said: bool = True,
    **ids: Any,
) -> Tiny:
    """Qwen-VL and its kin; ``width`` of a patch; ``said``: the model is told what kind each token is."""
    return Tiny(
        lambda: (
            getattr(hf, model),
            getattr(hf, config)(text_config={**TEXT, **MROPE, **text}, vision_config={**MERGING, **vision}, **(ids or QWEN_IDS)),
        ),
        merged, grids(width), typed() if said else lambda ids: {},
    )  # fmt: skip


def per_sequence(tiles: Callable[[int], int]) -> Pixels:
    def make(images: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = sum(map(tiles, range(images)))
        return {
            "pixel_values": torch.randn(1, count, 3, 16, 16, generator=generator),
            "pixel_attention_mask": torch.ones(1, count, 16, 16, dtype=torch.bool),
        }

    return make


class StandIn(torch.nn.Module):
    """In the place of a tower of timm, which is not there without torchvision: patches of 4 x 4 pixels, as a map or a sequence."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 32, 4, 4)
        self.as_map = config.architecture != "vit_pe_core_large_patch14_336"
        self.config = config

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        found = self.patches(pixel_values)
        if not self.as_map:
            found = found.flatten(2).transpose(1, 2)
            found = torch.cat([found.mean(1, keepdim=True), found], 1)  # a CLS token
        return BaseModelOutputWithPooling(last_hidden_state=found)


def standing_in(cls: Any, config: Any) -> Any:
    """A class whose models are made with a stand-in for their tower."""

    def make(config: Any) -> PreTrainedModel:
        real = hf.AutoModel.from_config

        def tower(config: Any, *args: Any, **kwargs: Any) -> Any:
            is_timm = hasattr(config, "architecture")
            return StandIn(config) if is_timm else real(config, *args, **kwargs)

        with mock.patch.object(hf.AutoModel, "from_config", tower):
            return cls(config)

    return make, config


def timm(architecture: str, **model: Any) -> dict[str, Any]:
    return dict(
        model_type="timm_wrapper", architecture=architecture, model_args=dict(embed_dim=32, **model), hidden_size=32
    )


EXPERTS = dict(num_experts=4, num_experts_per_tok=4, moe_intermediate_size=32)  # all of them: routing cannot flip
OPT = dict(
    model_type="opt", vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=4,
    word_embed_proj_dim=32, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LATENT = dict(
    model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8, head_dim=8, n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1, moe_intermediate_size=16,
    first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
GLM_IDS = dict(
    image_token_id=IMG, video_token_id=VID, image_start_token_id=OPEN, image_end_token_id=CLOSE, video_start_token_id=FAKE,
    video_end_token_id=ROW,
)  # fmt: skip
GLM_TEXT = dict(rope_parameters={**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0})
GLM_VISION = dict(image_size=16)
GLM_EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
DEEP = dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
QWEN2 = dict(model_type="qwen2")
MISTRAL = dict(model_type="mistral", sliding_window=None)
