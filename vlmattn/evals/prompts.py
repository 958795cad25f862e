"""Prompts with images, and greedy answers to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vlmattn.errors import InputError, quoted

#: How processors name their own marks for pictures.
_MARKS = re.compile(r"\w*(?:image|img|video|vision|boi|eoi|patch|tile)\w*_token$")


def encode(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Any]) -> Any:
    """What the model's processor makes of prompts that are each about a list of images, on the model's device.

    Raises:
        InputError: the processor has no chat template; a prompt holds a mark for pictures.
    """
    refuse_marks(processor, prompts)
    chats = []
    for prompt, pictures in zip(prompts, images, strict=True):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        chats.append([{"role": "user", "content": content}])
    return encode_chats(model, processor, chats, images)


def refuse_marks(processor: Any, prompts: Iterable[str]) -> None:
    """Raise for a prompt with one of the processor's own marks for pictures: it would be taken for one more picture.

    Raises:
        InputError: there is one.
    """
    named = getattr(processor, "__dict__", {}).items()
    marks = sorted(value for name, value in named if _MARKS.match(name) and isinstance(value, str) and value.strip())
    for prompt in prompts:
        if found := next((mark for mark in marks if mark in prompt), None):
            raise InputError(
                f"the question {quoted(prompt)} holds {found}, which this model takes for a picture; take it"
                " out of the text"
            )


def encode_chats(model: Any, processor: Any, chats: Sequence[Any], images: Sequence[Any]) -> Any:
    """The same for turns as chat templates take them, with the images of each chat in their order.

    Raises:
        InputError: the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError("the model's processor has no chat template; use a checkpoint that comes with one")
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    bos = processor.tokenizer.bos_token
    return processor(
        text=texts,
        images=[picture for pictures in images for picture in pictures] or None,
        padding=True,
        return_tensors="pt",
        add_special_tokens=not (bos and texts[0].startswith(bos)),  # many templates write the first token themselves
    ).to(model.device, dtype=model.dtype)


def generate(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    """The new tokens of each answer; ``options`` are those of ``model.generate``."""
    with torch.inference_mode():
        tokens: torch.Tensor = model.generate(**inputs, **options)
    return tokens[:, inputs["input_ids"].shape[1] :]


def decode(processor: Any, tokens: torch.Tensor) -> list[str]:
    """New tokens as texts."""
    return [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def answer(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Any], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts, each about its own list of images."""
    inputs = encode(model, processor, prompts, images)
    return decode(processor, generate(model, inputs, max_new_tokens=max_new_tokens, do_sample=False))
