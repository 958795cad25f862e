"""Tiny random models of every supported family, built from config: no hub, no files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

IMAGE_TOKEN = 99
TEXT = dict(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")
TOKENS_PER_IMAGE = {"llava": 16, "qwen2_5_vl": 4, "qwen3_vl": 4}
SEEDS = {"qwen3_vl": 14}  # a model that writes neither placeholders nor the end where tests need other tokens
QWEN_TOKENS = dict(image_token_id=IMAGE_TOKEN, video_token_id=98, vision_start_token_id=97, vision_end_token_id=96)


def build(family: str, attn: str = "sdpa", seed: int = 0, config: Any = None) -> PreTrainedModel:
    """A random model in eval mode. Weights are large enough for attention to be far from uniform."""
    torch.manual_seed(seed + SEEDS.get(family, 0))
    if family == "llava":
        vision = dict(
            model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4, projection_dim=32,
        )  # fmt: skip
        config = config or LlavaConfig(
            text_config=dict(model_type="llama", **TEXT),
            vision_config=vision,
            image_token_index=IMAGE_TOKEN,
            image_seq_length=16,
        )
        model = LlavaForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        vision = dict(
            depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
        )  # fmt: skip
        config = config or Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        vision = dict(
            depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
        )  # fmt: skip
        text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
        config = config or Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
        model = Qwen3VLForConditionalGeneration(config)
        for parameter in model.model.visual.deepstack_merger_list.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.1)  # as large as the residual stream
    for parameter in model.model.language_model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    model.set_attn_implementation(attn)
    return model.eval()


def windowed(window: int, kind: str = "mistral", attn: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A LLaVA whose language model has a window in all layers (mistral), or in every second one (qwen2)."""
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4, projection_dim=32,
    )  # fmt: skip
    text = dict(model_type=kind, head_dim=8, sliding_window=window, **TEXT)
    if kind == "qwen2":
        text |= dict(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"] * 2)
    return build("llava", attn, seed, config=LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, image_seq_length=16))  # fmt: skip


def prompt(family: str, images: int = 1, words: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """One prompt: a few words, images, ``words`` more words."""
    generator = torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(5, 90, (n,), generator=generator).tolist()  # noqa: E731
    ids = [1, *text(2)]
    for _ in range(images):
        tokens = [IMAGE_TOKEN] * TOKENS_PER_IMAGE[family]
        ids += tokens if family == "llava" else [97, *tokens, 96]
    ids = torch.tensor([ids + text(words)])
    if family == "llava":
        return dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.randn(images, 3, 16, 16, generator=generator),
        )
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
        pixel_values=torch.randn(16 * images, 3 * 2 * 4 * 4, generator=generator), image_grid_thw=torch.tensor([[1, 4, 4]] * images),
    )  # fmt: skip


def left_padded(prompts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The prompts as one batch."""
    length = max(p["input_ids"].shape[1] for p in prompts)

    def pad(name: str) -> Tensor:
        return torch.cat([torch.nn.functional.pad(p[name], (length - p[name].shape[1], 0)) for p in prompts])

    return {
        name: pad(name)
        if name in ("input_ids", "attention_mask", "mm_token_type_ids")
        else torch.cat([p[name] for p in prompts])
        for name in prompts[0]
    }


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], new: int = 4, **options: Any) -> Tensor:
    """Logits ``[batch, new, vocabulary]`` of greedy generation; every step is forced to happen."""
    settings = dict(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    out = model.generate(**inputs, **{**settings, **options})
    return torch.stack(out.logits, 1)


class Largest(TorchDispatchMode):
    """Elements of the largest storage that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1))
        return out


@contextmanager
def shifted_queries(model: PreTrainedModel, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """A bare model with vectors ``[heads, dim]`` added to the queries of some layers where they come to attention."""
    text = model.config.get_text_config()
    name = text._attn_implementation
    eager = name == "eager"

    def attend(module, query, *args, **kwargs):
        own = sys.modules[type(module).__module__].eager_attention_forward if eager else AttentionInterface()[name]
        if module.layer_idx in vectors:
            query = query + vectors[module.layer_idx][:, None].to(query)
        return own(module, query, *args, **kwargs)

    AttentionInterface.register("shifted", attend)
    AttentionMaskInterface.register("shifted", eager_mask if eager else AttentionMaskInterface()[name])
    text._attn_implementation = "shifted"
    try:
        yield
    finally:
        text._attn_implementation = name
