"""The language of the bundled model: vocabulary, processor, questions and captions about scenes."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmattn.embedded.scenes import CATEGORIES, COLOURS, CONTEXTS, IMAGE_SIZE, PATCH_SIZE, SYNONYMS, Scene, Thing

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
DESCRIBE = "Describe the image."
_OTHER_WORDS = [
    "plain",
    "striped",
    "yes",
    "no",
    "there",
    "is",
    "are",
    "a",
    "an",
    "the",
    "and",
    "in",
    "image",
    "images",
    "picture",
    "pictures",
    "of",
    "this",
    "these",
    "describe",
    "what",
    "color",
    "colour",
    "object",
    "objects",
    "can",
    "you",
    "see",
    "does",
    "contain",
    "how",
    "many",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "which",
    "where",
    "on",
    "left",
    "right",
    "top",
    "bottom",
    "side",
    "with",
    "it",
    "not",
    "shown",
    "at",
    "i",
    "do",
    "any",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
    ":",
    ",",
    ".",
    "?",
    "!",
    "please",
    "answer",
    "or",
    "question",
    "short",
    "briefly",
    "detail",
    "scene",
    "background",
    "nothing",
    "something",
    "word",
    "using",
]
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

# One image: "USER: <image> question ASSISTANT:"; several: "USER: image 1 : <image> image 2 : <image> question ASSISTANT:".
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}\
{% if message['content'] is string %}{{ message['content'] }} {% else %}\
{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}{% set seen = namespace(n=0) %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set seen.n = seen.n + 1 %}\
{% if images > 1 %}image {{ seen.n }} : {% endif %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer with the whole vocabulary of the scenes."""
    synonyms = [word for words in SYNONYMS.values() for word in words]
    words = dict.fromkeys([*SPECIAL_TOKENS, *CATEGORIES, *synonyms, *COLOURS, *CONTEXTS, *_OTHER_WORDS])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor() -> CLIPImageProcessorPil:
    """Pixels of a scene as CLIP's processor makes them (PIL backend: no torchvision)."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        do_convert_rgb=True,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer, image processor and chat template in the Hugging Face form."""
    return LlavaProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def with_article(words: str) -> str:
    """``"apple" -> "an apple"``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def existence_question(category: str) -> str:
    """The question of POPE: "Is there a cup in the image?"."""
    return f"Is there {with_article(category)} in the image?"


_ASK_EXISTENCE = ("is there {} in the image ?",) * 6 + ("does the image contain {} ?", "can you see {} ?")


def _noun(rng: np.random.Generator, category: str, p: float) -> str:
    return SYNONYMS[category][0] if category in SYNONYMS and rng.random() < p else category


def _pick(rng: np.random.Generator, things: tuple[Thing, ...]) -> Thing:
    return things[int(rng.integers(len(things)))]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Names every thing once, in the order of ``CATEGORIES``; a synonym stands in 15 % of the places it can."""
    parts = []
    for thing in scene.things:
        words = f"{'striped ' if thing.striped else ''}{thing.colour} {_noun(rng, thing.category, 0.15)}"
        parts.append(with_article(words))
    return "there is " + (" , ".join(parts[:-1]) + " and " if len(parts) > 1 else "") + parts[-1] + " ."


def turns(scene: Scene, rng: np.random.Generator, questions: int = 7) -> list[tuple[str, str]]:
    """A caption and ``questions`` short turns about one image, as (question, answer)."""
    out = [("describe the image .", caption(scene, rng))]
    for _ in range(questions):
        kind, thing = rng.random(), _pick(rng, scene.things)
        if kind < 0.66:
            present = rng.random() < 0.5
            if not present:
                category = str(rng.choice([c for c in CATEGORIES if c not in scene.categories]))
            else:
                category = thing.category
            ask = _ASK_EXISTENCE[int(rng.integers(len(_ASK_EXISTENCE)))]
            out.append((ask.format(with_article(_noun(rng, category, 0.05))), "yes" if present else "no"))
        elif kind < 0.78:
            out.append((f"what color is the {thing.category} ?", thing.colour))
        elif kind < 0.87:
            true = rng.random() < 0.5
            colour = thing.colour if true else str(rng.choice([c for c in COLOURS if c != thing.colour]))
            out.append((f"is the {thing.category} {colour} ?", "yes" if true else "no"))
        elif kind < 0.95:
            side = "left" if rng.random() < 0.5 else "right"
            true = (thing.x < IMAGE_SIZE / 2) == (side == "left")
            out.append((f"is the {thing.category} on the {side} side ?", "yes" if true else "no"))
        else:
            out.append(("how many objects are there ?", _NUMBERS[len(scene.things)]))
    return out


def multi_image_turns(scenes: list[Scene], rng: np.random.Generator, questions: int = 9) -> list[tuple[str, str]]:
    """Short turns about several images: which image, existence in image i, colour in image i."""
    names = [name for scene in scenes for name in scene.categories]
    unique = [(name, i) for i, scene in enumerate(scenes) for name in scene.categories if names.count(name) == 1]
    out = []
    for _ in range(questions):
        kind, i = rng.random(), int(rng.integers(len(scenes)))
        if kind < 0.5 and unique:
            name, where = unique[int(rng.integers(len(unique)))]
            out.append((f"in which image is the {name} ?", str(where + 1)))
        elif kind < 0.85:
            name = str(rng.choice(names)) if rng.random() < 0.7 else str(rng.choice(CATEGORIES))
            answer = "yes" if name in scenes[i].categories else "no"
            out.append((f"is there {with_article(name)} in image {i + 1} ?", answer))
        else:
            thing = _pick(rng, scenes[i].things)
            out.append((f"what color is the {thing.category} in image {i + 1} ?", thing.colour))
    return out
