"""Prompts with images, and greedy answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlmattn.errors import InputError


def encode(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Any]) -> Any:
    """What the model's processor makes of prompts that are each about a list of images, on the model's device.

    Raises:
        InputError: the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError("the model's processor has no chat template; use a checkpoint that comes with one")
    texts = []
    for prompt, pictures in zip(prompts, images, strict=True):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    bos = processor.tokenizer.bos_token
    return processor(
        text=texts,
        images=[picture for pictures in images for picture in pictures],
        padding=True,
        return_tensors="pt",
        add_special_tokens=not (bos and texts[0].startswith(bos)),  # many templates write the first token themselves
    ).to(model.device, dtype=model.dtype)


def answer(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Any], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts, each about its own list of images."""
    inputs = encode(model, processor, prompts, images)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    fresh = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(fresh, skip_special_tokens=True)]
