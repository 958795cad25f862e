"""The LLaVA of ``smol``: SmolLM2's weights, a small vision tower, a projector, and LoRA merged into the attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmattn.embedded.tower import IMAGE_TOKENS, tower_config

RANK, ALPHA = 16, 32
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
_LANGUAGE = "model.language_model."


def build_llava(language: Mapping[str, Any], image_token: int) -> LlavaForConditionalGeneration:
    """LLaVA-1.5 with a tower of 56 x 56 pixels; ``language``: the config of the language model."""
    config = LlavaConfig(
        vision_config=tower_config(),
        text_config=LlamaConfig(**language),
        image_token_index=image_token,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2, max_new_tokens=64)
    return model


def load_language_model(llava: LlavaForConditionalGeneration, weights: Mapping[str, Tensor]) -> None:
    """Put SmolLM2's weights in place."""
    llava.model.language_model.load_state_dict(
        {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    )
    llava.tie_weights()


@torch.no_grad()
def load_adapter(llava: LlavaForConditionalGeneration, adapter: Mapping[str, Tensor]) -> None:
    """Put tower and projector in place and add the low-rank updates: ``W + alpha / rank B A``.

    Args:
        adapter: weights of tower and projector by their names in the model, and for each adapted projection
            ``layers.<i>.self_attn.<projection>.lora_A`` ``[rank, in]`` and ``.lora_B`` ``[out, rank]``.

    Raises:
        ValueError: weights are missing, of another shape, or there are more than those.
    """
    state = llava.state_dict()
    seeing = [name for name in state if name.startswith(("model.vision_tower.", "model.multi_modal_projector."))]
    layers = range(llava.config.text_config.num_hidden_layers)
    adapted = [f"layers.{layer}.self_attn.{projection}" for layer in layers for projection in ADAPTED]
    shapes = {name: state[name].shape for name in seeing}
    for stem in adapted:
        size_out, size_in = state[f"{_LANGUAGE}{stem}.weight"].shape
        shapes[f"{stem}.lora_A"] = torch.Size((RANK, size_in))
        shapes[f"{stem}.lora_B"] = torch.Size((size_out, RANK))
    if shapes != {name: value.shape for name, value in adapter.items()}:
        raise ValueError("the adapter does not fit this model")
    for name in seeing:
        state[name].copy_(adapter[name])
    for stem in adapted:
        down, up = (adapter[f"{stem}.lora_{side}"].float() for side in "AB")
        state[f"{_LANGUAGE}{stem}.weight"] += ALPHA / RANK * up @ down
