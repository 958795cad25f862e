"""The language in which the bundled models were taught: vocabulary, processor, captions, questions, patch labels.

Of "tiny" in full; of "smol", whose tokenizer and processor ``vlmattn.embedded.smol.text`` builds, how a turn is
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from tools.bundled.packing import Turn
from vlmattn.embedded.scenes import CATEGORIES, COLOURS, CONTEXTS, IMAGE_SIZE, PATCH_SIZE, SYNONYMS, Scene, Thing
from vlmattn.embedded.smol.text import IMAGE_TOKEN
from vlmattn.embedded.text import with_article
from vlmattn.embedded.tower import IMAGE_TOKENS, build_image_processor

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
_OTHER_WORDS = """
plain striped yes no there is are a an the and in image images picture pictures of this these describe what
color colour object objects can you see does contain how many zero one two three four five six which where on
left right top bottom side with it not shown at i do any 1 2 3 4 5 6 7 8 9 : , . ? ! please answer or question
short briefly detail scene background nothing something word using
""".split()  # noqa: SIM905  (a line of it says more than a column)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


# One image: "USER: <image> question ASSISTANT:"; several: "USER: image 1 : <image> image 2 : <image> question
# ASSISTANT:".
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


def written(sentence: str) -> str:
    """A sentence of the word tokenizer as people write it: ``"is there a cup ?"`` -> ``"Is there a cup?"``."""
    for mark in ".,?!":
        sentence = sentence.replace(f" {mark}", mark)
    return sentence[:1].upper() + sentence[1:]


def smol_prefix(tokenizer: Any, images: int) -> list[int]:
    """Token ids of a prompt up to its question."""
    labels = [f"Image {i + 1}: " if images > 1 else "" for i in range(images)]
    text = "<|im_start|>user\n" + "".join(f"{label}{IMAGE_TOKEN * IMAGE_TOKENS}\n" for label in labels)
    return list(tokenizer.encode(text, add_special_tokens=False))


def smol_turn(tokenizer: Any, question: str, answer: str) -> Turn:
    """A turn with the weights of its answer: a single word counts for more than each word of a caption."""
    ask = tokenizer.encode(f"{written(question)}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    reply = tokenizer.encode(f"{written(answer)}<|im_end|>", add_special_tokens=False)
    first = 1.5 if len(answer.split()) == 1 else 0.5
    return Turn(ask, reply, [first] * (len(reply) - 1) + [0.2])


def single_tokens(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """The token of each name within a sentence.

    Raises:
        ValueError: a name of several tokens.
    """
    found = [tokenizer.encode(f" {name}", add_special_tokens=False) for name in names]
    if any(len(ids) != 1 for ids in found):
        raise ValueError(f"not a single token each: {', '.join(names)}")
    return [ids[0] for ids in found]
