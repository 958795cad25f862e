"""SmolLM2 with images: its tokenizer with an image token, the chat template and the processor that go with it."""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor

from vlmattn.embedded.scenes import PATCH_SIZE
from vlmattn.embedded.tower import build_image_processor

IMAGE_TOKEN = "<image>"
RESERVED = "<reponame>"  # a token that SmolLM2 reserved; it becomes the image token, so the vocabulary keeps its size

# No system turn: SmolLM2's own template would put one in front of every prompt.
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}\
{% set seen = namespace(n=0) %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set seen.n = seen.n + 1 %}\
{% if images > 1 %}Image {{ seen.n }}: {% endif %}<image>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


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
