"""Attention Sorting against eager attention matrices, with the tokens of every unit counted by hand."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES, IMAGE_TOKEN, TOKENS_PER_IMAGE, build
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlmattn
from vlmattn import InputError, OptionError, UnsupportedError
from vlmattn.inspection.sorting import default_units, sort_context

HOWTO = Path(__file__).parents[2] / "docs" / "howto-helpers.md"
TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'BOT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}BOT:{% endif %}"
)
IMAGES_FIRST = (  # as LLaVA-1.5 has it
    "{% for message in messages %}USER: {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "<image>\n{% endfor %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] | trim }} {% endfor %}{% endfor %}BOT:"
)


def build_tokenizer():
    """Words w3..w90 with these ids, ``yes`` and ``no``, and the special tokens of the tiny models."""
    words = {f"w{n}": n for n in range(3, 91)} | {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        "yes": 91,
        "no": 92,
        "USER:": 93,
        "BOT:": 94,
    }
    words |= {"<unk>": 95, "<|vision_end|>": 96, "<|vision_start|>": 97, "<video>": 98, "<image>": 99}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "USER:", "BOT:", "<|vision_end|>", "<|vision_start|>", "<video>", "<image>"]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


class QwenProcessor:
    """What Qwen2_5_VLProcessor does with text and images; the real one needs torchvision for videos."""

    def __init__(self):
        self.tokenizer, self.chat_template = build_tokenizer(), TEMPLATE.replace(
            "<image>\n", "<|vision_start|><image><|vision_end|>"
        )  # fmt: skip
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        )

    def apply_chat_template(
        self, chat, add_generation_prompt=False, tokenize=False, return_dict=False, return_tensors=None
    ):
        text = self.tokenizer.apply_chat_template(
            chat, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        if not tokenize:
            return text
        parts = [part for message in chat if not isinstance(message["content"], str) for part in message["content"]]
        pictures, coded = [part["image"] for part in parts if part["type"] == "image"], {}
        if pictures:
            coded = dict(self.image_processor(images=pictures, return_tensors="pt"))
            counts = (coded["image_grid_thw"].prod(-1) // 4).tolist()
            text = re.sub("<image>", lambda _: "<image>" * counts.pop(0), text)
        coded |= dict(self.tokenizer(text, return_tensors="pt"))
        coded.pop("token_type_ids", None)
        return {**coded, "mm_token_type_ids": (coded["input_ids"] == IMAGE_TOKEN).int()}


@lru_cache
def processor(family):
    if family != "llava":
        return QwenProcessor()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=build_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@lru_cache
def bundled():
    return vlmattn.load("embedded")


def picture(seed, width=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, width, 3), dtype=np.uint8))


def image(seed, width=16):
    return {"type": "image", "image": picture(seed, width)}


def text(words):
    return {"type": "text", "text": words}


def chat(*content):
    return [{"role": "user", "content": list(content)}]


CAPTIONS = ("w10 w11", "w20", "w30 w31 w32")


def captioned(seed=0):
    """Three images with captions, and a question."""
    parts = [part for n, words in enumerate(CAPTIONS) for part in (image(10 * seed + n), text(words))]
    return chat(*parts, text("w40 w41"))


def by_hand(family, model, inputs, captions):
    """Mean attention of the last row ``[units]``, units in the order of the prompt; captions are made of words of their own."""
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    row = torch.stack([layer[0, :, -1] for layer in attentions]).mean((0, 1))
    ids = inputs["input_ids"][0].tolist()
    images = torch.tensor([n for n, token in enumerate(ids) if token == IMAGE_TOKEN])
    scores = []
    for chunk, words in zip(images.split(TOKENS_PER_IMAGE[family]), captions, strict=True):
        slots = [*chunk.tolist(), *(ids.index(int(word[1:])) for word in words.split())]
        scores.append(float(row[slots].mean()))
    return scores


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_eager_attention_on_images_and_captions(family, seed):
    eager, messages = build(family, "eager", seed), captioned(seed)
    inputs = processor(family).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = by_hand(family, eager, inputs, CAPTIONS)
    assert np.std(expected) > 1e-4
    for attn in ("sdpa", "eager"):
        found = sort_context(build(family, attn, seed), processor(family), messages)
        close(found.scores[0], expected)
        assert found.order == tuple(np.argsort(expected, kind="stable"))
        assert found.units == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_move_with_their_captions(family):
    model, messages = build(family, seed=2 * (family == "qwen3_vl")), captioned()  # one that would have them otherwise
    before = copy.deepcopy(messages)
    found = sort_context(model, processor(family), messages)
    assert found.order != (0, 1, 2)
    assert [part.get("text") for part in messages[0]["content"]] == [part.get("text") for part in before[0]["content"]]
    said = [word for unit in found.order for word in CAPTIONS[unit].split()]
    ids = found.inputs["input_ids"][0]
    words = ids[(ids > 2) & (ids < 91)].tolist()
    assert words == [int(word[1:]) for word in [*said, "w40", "w41"]]
    alone = [
        processor(family).image_processor(images=[picture(n)], return_tensors="pt")["pixel_values"] for n in found.order
    ]
    assert torch.equal(found.inputs["pixel_values"], torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])
    content = found.messages[0]["content"]
    assert [part["type"] for part in content] == ["image", "text"] * 3 + ["text"]
    assert [content[2 * n]["image"] for n in range(3)] == [messages[0]["content"][2 * n]["image"] for n in found.order]
    out = model.generate(**found.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == len(ids) + 3


def test_images_of_any_size_take_their_grids_along():
    messages = chat(image(0, 16), image(1, 48), image(2, 32), text("w40"))
    for seed in range(4):
        found = sort_context(build("qwen2_5_vl", seed=seed), processor("qwen2_5_vl"), messages)
        assert found.inputs["image_grid_thw"][:, 2].tolist() == [(4, 12, 8)[unit] for unit in found.order]
        starts, total = found.inputs["image_grid_thw"].prod(-1).cumsum(0), len(found.inputs["pixel_values"])
        assert int(starts[-1]) == total
        if found.order != (0, 1, 2):
            return
    pytest.fail("no order changed")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_order_ascends_by_the_last_scores(family):
    for seed in range(4):
        found = sort_context(build(family, seed=seed), processor(family), captioned(seed), iterations=5)
        ordered = [found.scores[-1][unit] for unit in found.order]
        assert ordered == sorted(ordered)
        assert sorted(found.order) == [0, 1, 2]
        assert 1 <= len(found.scores) <= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_iterations_are_calls_one_after_another(family):
    model, messages = build(family, seed=1), captioned(3)
    twice = sort_context(model, processor(family), messages, iterations=2)
    first = sort_context(model, processor(family), messages)
    second = sort_context(model, processor(family), first.messages)
    assert first.order != (0, 1, 2)
    assert twice.order == tuple(first.order[unit] for unit in second.order)
    close(twice.scores[1], [second.scores[0][first.order.index(unit)] for unit in range(3)])
    assert torch.equal(twice.inputs["input_ids"], second.inputs["input_ids"])


def test_it_stops_when_the_order_stays(monkeypatch):
    from vlmattn.inspection import sorting

    model, seen = build("llava"), []
    answers = iter([(3.0, 1.0, 2.0), (3.0, 1.0, 2.0), (0.0, 0.0, 0.0)])
    monkeypatch.setattr(sorting, "_scores", lambda *_: seen.append(1) or next(answers))
    found = sort_context(model, processor("llava"), captioned(), iterations=5)
    assert (found.order, len(found.scores), len(seen)) == ((1, 2, 0), 2, 2)
    monkeypatch.setattr(sorting, "_scores", lambda *_: (1.0, 1.0, 1.0))  # stable: nothing moves among equals
    assert sort_context(model, processor("llava"), captioned(), iterations=5).order == (0, 1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_without_images(family):
    """Two documents say the same: places are told apart, not words."""
    documents = ("w10 w11 w12", "w20", "w10 w11 w12")
    messages = chat(*map(text, documents), text("w10 w41"))
    eager = build(family, "eager")
    with torch.no_grad():
        inputs = processor(family).apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs.pop("mm_token_type_ids", None)
        attentions = eager(**inputs, output_attentions=True).attentions
    row = torch.stack([layer[0, :, -1] for layer in attentions]).mean((0, 1))
    ids = inputs["input_ids"][0].tolist()
    first = ids.index(10)
    assert ids[first : first + 8] == [10, 11, 12, 20, 10, 11, 12, 10]
    expected = [float(row[first + a : first + b].mean()) for a, b in ((0, 3), (3, 4), (4, 7))]
    for wrapped in (False, True):
        model = build(family)
        if wrapped:
            vlmattn.wrap(model, "pai")
        found = sort_context(model, processor(family), messages)
        close(found.scores[0], expected)
        assert [part["text"] for part in found.messages[0]["content"]] == [
            *(documents[unit] for unit in found.order), "w10 w41"
        ]  # fmt: skip


@pytest.mark.parametrize("template", [TEMPLATE, IMAGES_FIRST, TEMPLATE.replace("part['text']", "part['text'] | trim")])
def test_text_is_found_wherever_the_template_puts_it(template):
    made = copy.copy(processor("llava"))
    made.chat_template = template
    captions = ("  w10 w11\n", "w20 ", " w30")
    parts = [part for n, words in enumerate(captions) for part in (image(n), text(words))]
    messages = chat(*parts, text("w40"))
    inputs = made.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found = sort_context(build("llava"), made, messages)
    close(found.scores[0], by_hand("llava", build("llava", "eager"), inputs, captions))


def test_the_bundled_tokenizer_changes_words_and_still_they_are_found():
    """It lower-cases, and does not know most words."""
    model, made = bundled()
    messages = chat(text("A Zebra, surely"), text("DOG dog"), text("Is there a dog?"))
    messages[0]["content"][:0] = [image(5)]
    found = sort_context(model, made, messages, units=[[1], [2]])
    eager, _ = vlmattn.load("embedded", attn_implementation="eager")
    inputs = made.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        row = torch.stack([layer[0, :, -1] for layer in eager(**inputs, output_attentions=True).attentions]).mean(
            (0, 1)
        )
    ids, dog = inputs["input_ids"][0].tolist(), made.tokenizer.convert_tokens_to_ids("dog")
    second = ids.index(dog)  # a <unk> , <unk> dog dog
    close(found.scores[0], [float(row[second - 4 : second].mean()), float(row[second : second + 2].mean())])


def test_units_of_ones_own_and_parts_that_stay():
    messages = chat(text("w3"), image(0), image(1), text("w4"), image(2), text("w20"), text("w5"), text("w6"))
    model = build("llava")
    found = sort_context(model, processor("llava"), messages, units=[range(4, 6), [1], [2]])
    assert found.units == ((1,), (2,), (4, 5))
    assert found.order != (0, 1, 2)
    expected = [text("w3")]
    for place, unit in enumerate(found.order):
        expected += [messages[0]["content"][n] for n in found.units[unit]] + ([text("w4")] if place == 1 else [])
    assert found.messages[0]["content"] == [*expected, text("w5"), text("w6")]


@pytest.mark.parametrize("family", FAMILIES)
def test_earlier_turns_and_their_images_stay(family):
    messages = [
        {"role": "user", "content": [image(7), text("w50")]},
        {"role": "assistant", "content": "w51 w52"},
        *captioned(),
    ]
    found = sort_context(build(family), processor(family), messages)
    assert found.messages[:2] == messages[:2]
    inputs = processor(family).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = by_hand(family, build(family, "eager"), inputs, ("w50", *CAPTIONS))
    close(found.scores[0], expected[1:])


def test_which_parts_are_units_by_default():
    i, t = {"type": "image"}, {"type": "text"}
    for content, units in (
        ((i, i, t), ((0,), (1,))),
        ((i, i), ((0,), (1,))),
        ((t, i, i, t, t), ((1,), (2,))),
        ((i, t, i, t, t), ((0, 1), (2, 3))),
        ((i, t, t, i, t, t, t), ((0, 1, 2), (3, 4, 5))),
        ((i, t, i, t, t, t), ((0, 1), (2, 3))),
        ((t, t, t), ((0,), (1,))),
        ((i, t), ((0,),)),
        ((t,), ()),
    ):
        assert default_units(content) == units
    for content in ((t, i, t, i, t), (i, t, i, t), (i, t, i, i, t), (i, t, i), (i, t, t, i, t, t), (t, i, t, i, t, t)):
        with pytest.raises(InputError, match=r"units=\[\[0, 1\]"):
            default_units(content)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_as_it_was(family):
    model, messages = build(family), captioned()
    inputs = sort_context(model, processor(family), messages).inputs  # transformers adds hooks of its own at first
    with torch.no_grad():
        plain, state, count = model(**inputs).logits, copy.deepcopy(model.state_dict()), hooks(model)
    if family != "llava":
        model.model.rope_deltas = torch.tensor([[-3]])
    found = sort_context(model, processor(family), messages, iterations=3)
    if family != "llava":
        assert model.model.rope_deltas.tolist() == [[-3]]
    assert hooks(model) == count
    assert "vlmattn" not in model.__dict__
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with vlmattn.applied(model, "vhr", alpha=5.0):
        with torch.no_grad():
            edited = model(**inputs).logits
        assert not torch.equal(edited, plain)
        handle, report = model.vlmattn, model.vlmattn.report()
        assert sort_context(model, processor(family), messages, iterations=3).scores == found.scores
        assert (model.vlmattn, handle.report(), handle.enabled) == (handle, report, True)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, edited)
        handle.disable()
        assert sort_context(model, processor(family), messages, iterations=3).scores == found.scores
        assert not handle.enabled
    assert hooks(model) == count


@pytest.mark.parametrize("wrapped", [False, True])
def test_after_an_error_too(wrapped, monkeypatch):
    from vlmattn.inspection import measuring

    model, messages = build("llava"), captioned()
    sort_context(model, processor("llava"), messages)
    if wrapped:
        vlmattn.wrap(model, "pai")
    count, handle = hooks(model), model.__dict__.get("vlmattn")
    report = handle.report() if wrapped else None

    def fail(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(measuring.Measure, "on_attention", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        sort_context(model, processor("llava"), messages)
    assert hooks(model) == count
    assert model.__dict__.get("vlmattn") is handle
    if wrapped:
        assert handle.report() == report


def test_no_attention_of_query_by_key_is_made():
    from tiny import Largest

    model, messages = build("llava"), chat(*(image(n) for n in range(20)), text("w40"))
    with Largest() as largest:
        sort_context(model, processor("llava"), messages)
    tokens = 20 * 16 + 3
    assert largest.numel < tokens * tokens


def test_what_cannot_be_sorted_is_said():
    model, made = build("llava"), processor("llava")
    bare = SimpleNamespace(tokenizer=made.tokenizer, chat_template=None)
    slow = copy.copy(made)
    slow.tokenizer = SimpleNamespace(is_fast=False, bos_token="<s>")
    slow.apply_chat_template = made.apply_chat_template
    upper = copy.copy(made)
    upper.chat_template = TEMPLATE.replace("part['text']", "part['text'][:2]")
    once = QwenProcessor()
    once.chat_template = once.chat_template.replace("<image>", "{{ '<image>' if loop.first else '' }}")
    pair = chat(image(0), image(1), text("w40"))
    one, blank, no_image = (
        chat(image(0), text("w3")),
        chat(*map(text, (" ", "w3", "w4"))),
        chat({"type": "image"}, image(1)),
    )
    for match, processor_, messages, units in (
        ("at least two units, and the last message has 1", made, one, None),
        (r"units=\[\[0, 1\]", made, pair, [[0]]),
        ("runs of neighbours", made, pair, [[0], [0, 1]]),
        ("runs of neighbours", made, pair, [[0, 2], [1]]),
        ("runs of neighbours", made, pair, [[0], [3]]),
        ("runs of neighbours", made, pair, [[0], []]),
        ("runs of neighbours", made, pair, [0, 1]),
        ("no chat template", bare, pair, None),
        ("fast tokenizer", slow, captioned(), None),
        ("does not show where", upper, captioned(), None),
        ("no tokens", made, blank, None),
        ("has no image; give it", made, no_image, None),
        ("end with a user's message", made, [], None),
        ("end with a user's message", made, [{"role": "user", "content": "w3"}], None),
        ("end with a user's message", made, [{"role": "assistant", "content": [text("w3")]}], None),
    ):
        with pytest.raises(InputError, match=match):
            sort_context(model, processor_, messages, units)
    for iterations in (0, 1.5, True):
        with pytest.raises(OptionError, match="iterations"):
            sort_context(model, made, pair, iterations=iterations)
    with pytest.raises(UnsupportedError, match="not a transformers"):
        sort_context(torch.nn.Linear(1, 1), made, pair)
    with pytest.raises(InputError, match="2 images and its prompt 1"):
        sort_context(build("qwen2_5_vl"), once, pair)
    assert len(sort_context(model, slow, pair).order) == 2  # images only: nothing to look up in the text


def test_the_examples_of_the_page_run():
    blocks = re.findall(r"```python\n(.*?)```", HOWTO.read_text(), re.DOTALL)
    assert len(blocks) == 2
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, check=True)
    assert re.search(r"\([0-2], [0-2], [0-2]\)", done.stdout)
    assert "paths" in done.stdout
