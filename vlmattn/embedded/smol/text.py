"""How scenes are talked about with SmolLM2: its chat markers, sentences with capitals, and the processor that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlavaProcessor

from vlmattn.embedded.packing import Turn
from vlmattn.embedded.scenes import PATCH_SIZE
from vlmattn.embedded.text import IMAGE_TOKENS, build_image_processor

IMAGE_TOKEN = "<image>"
RESERVED = "<reponame>"  # a token that SmolLM2 reserved; it becomes the image token, so the vocabulary keeps its size

# No system turn: SmolLM2's own template would put one in front of every prompt.
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}{% set seen = namespace(n=0) %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set seen.n = seen.n + 1 %}\
{% if images > 1 %}Image {{ seen.n }}: {% endif %}<image>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def written(sentence: str) -> str:
    """A sentence of the word tokenizer's language as people write it: ``"is there a cup ?"`` -> ``"Is there a cup?"``."""
    for mark in ".,?!":
        sentence = sentence.replace(f" {mark}", mark)
    return sentence[:1].upper() + sentence[1:]


def prefix(tokenizer: Any, images: int) -> list[int]:
    """Token ids of a prompt up to its question."""
    labels = [f"Image {i + 1}: " if images > 1 else "" for i in range(images)]
    text = "<|im_start|>user\n" + "".join(f"{label}{IMAGE_TOKEN * IMAGE_TOKENS}\n" for label in labels)
    return list(tokenizer.encode(text, add_special_tokens=False))


def turn(tokenizer: Any, question: str, answer: str) -> Turn:
    """A turn with the weights of its answer: a single word counts for more than each word of a caption."""
    ask = tokenizer.encode(f"{written(question)}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    reply = tokenizer.encode(f"{written(answer)}<|im_end|>", add_special_tokens=False)
    first = 1.5 if len(answer.split()) == 1 else 0.5
    return Turn(ask, reply, [first] * (len(reply) - 1) + [0.2])


def build_tokenizer(tokenizer: Any) -> Any:
    """SmolLM2's tokenizer with an image token in place of one that it reserved."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    number = vocabulary.pop(RESERVED)
    vocabulary[IMAGE_TOKEN] = number
    known = [token for token in described["added_tokens"] if token["id"] != number]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    described["added_tokens"] = sorted([*known, {"id": number, "content": IMAGE_TOKEN, **plain}], key=lambda t: t["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """Image processor of the scenes, SmolLM2's tokenizer and the chat template, in the Hugging Face form."""
    return LlavaProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(tokenizer),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def words(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """The token of each name within a sentence.

    Raises:
        ValueError: a name of several tokens.
    """
    found = [tokenizer.encode(f" {name}", add_special_tokens=False) for name in names]
    if any(len(ids) != 1 for ids in found):
        raise ValueError(f"not a single token each: {', '.join(names)}")
    return [ids[0] for ids in found]
