"""Attention Sorting: what a question looks at most is moved next to it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.errors import InputError, OptionError, quoted
from vlmattn.inspection.maps import last_row
from vlmattn.inspection.measuring import prepared_one
from vlmattn.models import Family, find_family, marker_ids_of
from vlmattn.request import TEXT

Message = Mapping[str, Any]
"""One message of a chat:
``{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", ...}]}``."""

Units = tuple[tuple[int, ...], ...]

_VISUAL = ("image", "image_url", "video")
_MARK = 0xF0000  # private characters stand around the text of units while the template shows where it puts them
_MARKED = re.compile("([\U000f0000-\U000ffffd])(.*?)\\1", re.DOTALL)
_TELL = "say which parts belong together, by their numbers in the content: units=[[0, 1], [2, 3]]"


@dataclass(frozen=True, eq=False)
class Sorted:
    """A prompt whose units stand in the order of the attention that they get.

    Attributes:
        order: number of the unit that now stands at each place; the last one got most. An answer that counts places,
            like "image 2", means the unit ``order[1]``.
        scores: for each iteration the score of every unit, by its number.
        units: the parts of every unit, by their numbers in the content that was given.
        messages: the chat in the new order.
        inputs: what the processor makes of it, on the model's device: ``model.generate(**found.inputs)``.
    """

    order: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    units: Units
    messages: list[Message]
    inputs: dict[str, Any]


@torch.no_grad()
def sort_context(
    model: PreTrainedModel,
    processor: Any,
    messages: Sequence[Message],
    units: Sequence[Sequence[int]] | None = None,
    *,
    iterations: int = 1,
) -> Sorted:
    """Sort the images or documents of a prompt by the attention of its last row, which predicts the answer.

        score(unit) = mean over layers, heads and tokens j of the unit of a_j,   a the attention of the last prompt row

    Ascending and stable, so the unit with the highest score comes last, next to the question (Attention Sorting, arXiv
    2310.01427, which uses 1 to 5 iterations; its code, adamlerer/synthwiki, sums over a unit's tokens where the text
    and this function average, the same order for units of one length). Stops early once an order stays as it is. Each
    iteration reads the prompt once; no matrix of query x key is made. Edits of a wrapped model do not act meanwhile.

    The tokens of a unit are those of its images and of its text, not those that the template writes around them.

    Args:
        processor: the model's processor, with a chat template.
        messages: a chat that ends with the user's turn, images in it (``{"type": "image", "image": picture}``, or a
            ``url`` or ``path``).
        units: numbers of the parts of the last message that move together, each unit a run of neighbours; other parts
            keep their places. None: each image moves, with its caption where the same number of text parts follows
            every image; without images each text part moves. The last text part is the question and stays.
        iterations: how often to sort, at most.

    Raises:
        OptionError: fewer than one iteration.
        InputError: fewer than two units, units that cannot be told or do not fit the message, a processor without chat
            template, a template or tokenizer that does not show where a unit's text is.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    if type(iterations) is not int or iterations < 1:
        raise OptionError(f"iterations must be a whole number from 1 on, got {quoted(iterations)}")
    family, content = find_family(model), _content(messages)
    chosen = default_units(content) if units is None else _checked(units, len(content))
    if len(chosen) < 2:
        raise InputError(f"sorting needs at least two units, and the last message has {len(chosen)}; {_TELL}")
    order, scores = tuple(range(len(chosen))), []
    chat, owners = _arranged(messages, chosen, order)
    inputs = chat_inputs(model, processor, chat)
    for _ in range(iterations):
        found = _scores(model, inputs, _owners(model, family, processor, chat, owners, inputs))
        scores.append(found)
        before, order = order, tuple(sorted(order, key=found.__getitem__))
        if order == before:
            break
        chat, owners = _arranged(messages, chosen, order)
        inputs = chat_inputs(model, processor, chat)
    return Sorted(order, tuple(scores), chosen, chat, inputs)


def chat_inputs(model: PreTrainedModel, processor: Any, messages: Sequence[Message]) -> dict[str, Any]:
    """What the processor makes of one chat, images and all, on the model's device and in its dtype.

    Raises:
        InputError: a processor without chat template, an image part without image.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{type(processor).__name__} has no chat template; give a processor of a chat model")
    for message in messages:
        for part in message.get("content") or ():
            if _is_visual(part) and len(part) < 2:
                raise InputError(
                    f'an {part["type"]} part has no {part["type"]}; give it: {{"type": "image", "image": picture}}'
                )
    settings = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    return prepared_one(model, processor.apply_chat_template([dict(message) for message in messages], **settings))


def user_turn(images: Any, text: str) -> Message:
    """A message of the user: one image or a list of them, then the text."""
    pictures = images if isinstance(images, (list, tuple)) else [images]
    content = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def default_units(content: Sequence[Message]) -> Units:
    """Which parts move together when nobody says it.

    The last part, if it is text, is the question. Without images every other part is a unit. Without text between the
    images each image is one. If the same number of text parts follows every image but the last, these are captions, of
    the last image too.

    Raises:
        InputError: text parts that could belong to one image or another.
    """
    images = [number for number, part in enumerate(content) if part["type"] in _VISUAL]
    asked = len(content) - (content[-1]["type"] == "text")  # where the question begins
    if not images:
        return tuple((number,) for number in range(asked))
    following = [b - a - 1 for a, b in pairwise(images)]
    captions = following[0] if following else 0
    if set(following) - {captions} or (captions and (images[0] > 0 or images[-1] + captions >= asked)):
        raise InputError(f"the text parts could be captions of one image or another; {_TELL}")
    return tuple(tuple(range(image, image + captions + 1)) for image in images)


def _content(messages: Sequence[Message]) -> Sequence[Message]:
    """The parts of the last message."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if last.get("role") != "user" or not isinstance(content, (list, tuple)) or not content:
        raise InputError(
            "the chat must end with a user's message in parts:"
            ' {"role": "user", "content": [{"type": "text", ...}, ...]}'
        )
    return content


def _checked(units: Sequence[Sequence[int]], parts: int) -> Units:
    """Units in the order of their places."""
    wrong = (
        f"units must be runs of neighbours among the parts 0..{parts - 1}, none twice, as in [[0, 1], [2, 3]];"
        f" got {units}"
    )
    try:
        found = tuple(sorted(tuple(unit) for unit in units))
        runs = all(unit and unit == tuple(range(unit[0], unit[0] + len(unit))) for unit in found)
    except TypeError:
        raise InputError(wrong) from None
    every = [number for unit in found for number in unit]
    if not runs or len(set(every)) < len(every) or not set(every) <= set(range(parts)):
        raise InputError(wrong)
    return found


def _arranged(messages: Sequence[Message], units: Units, order: Sequence[int]) -> tuple[list[Message], list[int]]:
    """The chat with unit ``order[n]`` at place n, and the unit of every part of its last message, -1 for none."""
    content, places = messages[-1]["content"], {unit[0]: n for n, unit in enumerate(units)}
    moved = {number for unit in units for number in unit}
    parts: list[Message] = []
    owners: list[int] = []
    for number, part in enumerate(content):
        if number in places:
            unit = order[places[number]]
            parts += [content[n] for n in units[unit]]
            owners += [unit] * len(units[unit])
        elif number not in moved:
            parts.append(part)
            owners.append(-1)
    return [*messages[:-1], {**messages[-1], "content": parts}], owners


def _owners(
    model: PreTrainedModel,
    family: Family,
    processor: Any,
    chat: Sequence[Message],
    owners: Sequence[int],
    inputs: Mapping[str, Any],
) -> Tensor:
    """The unit of every token of the prompt ``[tokens]``, -1 for none; on the cpu."""
    ids = inputs["input_ids"]
    types = family.token_types(model, ids)
    numbers = family.image_numbers(model, inputs, types, marker_ids_of(family, processor))[0].long().cpu()
    earlier = sum(_is_visual(part) for message in chat[:-1] for part in message.get("content") or ())
    content = chat[-1]["content"]
    by_image = [-1] * earlier + [unit for part, unit in zip(content, owners, strict=True) if _is_visual(part)]
    if int(numbers.max()) + 1 != len(by_image):
        raise InputError(
            f"the chat has {len(by_image)} images and its prompt {int(numbers.max()) + 1}; does the chat template place"
            " each?"
        )
    found = torch.tensor([*by_image, -1])[numbers]  # text has number -1, the last entry
    texts = {n: unit for n, unit in enumerate(owners) if unit >= 0 and not _is_visual(content[n])}
    if texts:
        spans = _text_spans(model, family, processor, chat, sorted(texts), ids[0].cpu())
        for number, slots in spans.items():
            found[slots] = texts[number]
    for unit in set(owners) - {-1}:
        if not bool((found == unit).any()):
            raise InputError(f"unit {unit} has no tokens in the prompt; leave empty parts out")
    return found


def _is_visual(part: Any) -> bool:
    return not isinstance(part, str) and part["type"] in _VISUAL


def _text_spans(
    model: PreTrainedModel, family: Family, processor: Any, chat: Sequence[Message], parts: Sequence[int], ids: Tensor
) -> dict[int, Tensor]:
    """Which tokens of a prompt ``[tokens]`` hold the text of some parts of the last message: part -> slots.

    The template is asked with private characters around these texts, the tokenizer for the characters of every token;
    the processor repeats placeholders of images, so only text tokens are compared.
    """
    text = str(processor.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False))
    marked = str(processor.apply_chat_template(_marked(chat, parts), add_generation_prompt=True, tokenize=False))
    found = list(_MARKED.finditer(marked))
    tokenizer = processor.tokenizer
    bos = getattr(tokenizer, "bos_token", None)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{type(tokenizer).__name__} does not tell where its tokens are; use a fast tokenizer")
    coded = tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)), return_offsets_mapping=True)
    said, own = torch.tensor(coded["input_ids"]), torch.tensor(coded["offset_mapping"])
    mine, given = (family.token_types(model, some) == TEXT for some in (said, ids))
    shown = _MARKED.sub(lambda match: match[2], marked) == text
    if not shown or len(found) != len(parts) or not torch.equal(said[mine], ids[given]):
        raise InputError("the chat template does not show where the text of units is; give units of images only")
    slots, (begin, end) = given.nonzero().flatten(), own[mine].T
    spans = {}
    for number, match in enumerate(found):
        first = match.start() - 2 * number  # of the text without the marks before it
        within = (begin < first + len(match[2])) & (end > first) & (end > begin)
        spans[ord(match[1]) - _MARK] = slots[within]
    return spans


def _marked(chat: Sequence[Message], parts: Sequence[int]) -> list[Message]:
    """The chat with a private character before and after the text of some parts, within the white space around it."""
    content = list(chat[-1]["content"])
    for number in parts:
        text, mark = content[number]["text"], chr(_MARK + number)
        core = text.strip()
        before, after = text.split(core, 1) if core else (text, "")
        content[number] = {**content[number], "text": f"{before}{mark}{core}{mark}{after}"}
    return [*chat[:-1], {**chat[-1], "content": content}]


def _scores(model: PreTrainedModel, inputs: Mapping[str, Any], owners: Tensor) -> tuple[float, ...]:
    """The score of every unit by the bare model, from the unit of every token (-1 for none)."""
    row = last_row(model, inputs)
    return tuple(float(row[owners == unit].mean()) for unit in range(int(owners.max()) + 1))
