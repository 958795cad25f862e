"""What prompts of branches are made from: other system messages, positions, pixels of each row, logits of any depth."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import FAMILIES, IMAGE_TOKEN, TEXT, TOKENS_PER_IMAGE, build, generate, left_padded, prompt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlavaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2_5_VLConfig

import vlmattn
from vlmattn import Branch, Contrast, ContrastiveDecoding, InputError, Instead, OptionError
from vlmattn import request as kinds
from vlmattn.models import Turns, find_family

pytestmark = pytest.mark.usefixtures("no_grad")

# Templates as the checkpoints have them (Llama 3 shortened: without tools and dates)

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><image><|vision_end|>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PLAIN = LLAVA.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")
RAISING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %} [/INST]{% else %} {% for content in message['content'] %}{{ content['text'] }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
SPECIAL = [
    "<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]", "<pad>",
]  # fmt: skip
WHO = "You are a confused object detector; you give only a fuzzy impression."


def tokenizer(
    template: str | None, bos: str | None = "<s>", adds_bos: bool = False, words: tuple[str, ...] = ()
) -> Any:
    """One token per byte, special ones, and ``words`` in one piece with the blank before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids, merges = {letter: n for n, letter in enumerate(alphabet)}, []
    for word in words:
        piece = "\u0120"  # the blank, as byte-level tokenizers write it
        for letter in word:
            merges.append((piece, letter))
            piece += letter
            ids.setdefault(piece, len(ids))
    made = Tokenizer(models.BPE(ids, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", *SPECIAL)])
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token="</s>", pad_token="<pad>", additional_special_tokens=SPECIAL
    )
    found.chat_template = template
    return found


@dataclass
class Style:
    """A chat template with its tokenizer, and how prompts are tokenized with it."""

    template: str
    bos: str | None = "<s>"
    adds_bos: bool = False
    system: bool = True

    def __post_init__(self) -> None:
        self.tokenizer = tokenizer(self.template, self.bos, self.adds_bos)
        self.turns = Turns.of(self.tokenizer)
        self.image = self.tokenizer.convert_tokens_to_ids("<image>")

    def render(self, chat: list[dict[str, Any]], per_image: int = 3) -> Tensor:
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        doubled = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer(text, add_special_tokens=not doubled)["input_ids"]
        return torch.tensor([token for one in ids for token in [one] * (per_image if one == self.image else 1)])

    def types(self, ids: Tensor) -> Tensor:
        return torch.where(ids == self.image, kinds.IMAGE, kinds.TEXT).to(torch.uint8)

    def under(self, system: str, ids: Tensor) -> Tensor:
        return self.turns.under(system, ids, self.types(ids))

    def expected(self, chat: list[dict[str, Any]], system: str, per_image: int = 3) -> Tensor:
        """The template's own rendering; without a system message in the template it leads the user's turn."""
        rest = [message for message in chat if message["role"] != "system"]
        if self.system:
            return self.render([said("system", system), *rest], per_image)
        changed = copy.deepcopy(rest)
        plain = self.tokenizer.apply_chat_template(changed, add_generation_prompt=True, tokenize=False)
        start = plain.index("<image>") if "<image>" in plain else plain.index(rest[0]["content"][-1]["text"])
        text = f"{plain[:start]}{system} {plain[start:]}"
        with_bos = not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        ids = self.tokenizer(text, add_special_tokens=with_bos)["input_ids"]
        return torch.tensor([token for one in ids for token in [one] * (per_image if one == self.image else 1)])


STYLES = {
    "llava": Style(LLAVA, adds_bos=True),
    "llava, no bos": Style(LLAVA),
    "llava, no bos token at all": Style(LLAVA, bos=None),
    "qwen": Style(QWEN, bos=None),
    "llama 3": Style(LLAMA3),
    "llama 3, tokenizer adds bos too": Style(LLAMA3, adds_bos=True),
    "no system": Style(PLAIN, adds_bos=True, system=False),
    "raises on system": Style(RAISING, adds_bos=True, system=False),
}
every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def said(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


# Another system message


@every_style
@pytest.mark.parametrize("images", [0, 1, 2])
def test_it_is_what_the_template_writes(style, images):
    chat = [said("user", "What is on the table?", images)]
    ids = style.render(chat)
    found = style.under(WHO, ids)
    assert found.tolist() == style.expected(chat, WHO).tolist()
    assert found.dtype == ids.dtype
    assert int((found == style.image).sum()) == 3 * images == int((ids == style.image).sum())
    assert WHO in style.tokenizer.decode(found)


@every_style
def test_later_turns_stay(style):
    chat = [
        said("user", "What is it?", 1),
        said("assistant", "A dog."),
        said("user", "Another one:", 1),
        said("assistant", "A cat."),
        said("user", "Is it asleep?"),
    ]
    assert style.under(WHO, style.render(chat)).tolist() == style.expected(chat, WHO).tolist()


@pytest.mark.parametrize("name", [name for name in STYLES if STYLES[name].system])
@pytest.mark.parametrize("mine", ["Answer in one word.", "", "You talk to the user; the assistant is you.\n\nBe kind."])
def test_the_users_own_system_message_is_replaced(name, mine):
    style = STYLES[name]
    chat = [said("system", mine), said("user", "What is it?", 1)]
    found = style.under(WHO, style.render(chat))
    assert found.tolist() == style.expected(chat, WHO).tolist()
    assert "one word" not in style.tokenizer.decode(found)


@every_style
def test_it_may_be_said_again(style):
    """The prompt of a branch is a prompt: another message replaces it where the template has a place for it."""
    chat = [said("user", "What is it?", 1)]
    once = style.under("Be vague.", style.render(chat))
    if style.system:
        assert style.under(WHO, once).tolist() == style.under(WHO, style.render(chat)).tolist()
    else:  # it is a part of what the user says now
        assert "Be vague." in style.tokenizer.decode(style.under(WHO, once))


@every_style
def test_the_first_token_is_not_doubled(style):
    begin = style.tokenizer.convert_tokens_to_ids("<s>")
    ids = style.render([said("user", "What is it?", 1)])
    found = style.under(WHO, ids)
    assert int((found == begin).sum()) == int((ids == begin).sum()) <= 1
    assert (int(found[0]) == begin) == (int(ids[0]) == begin)


@every_style
@pytest.mark.parametrize("system", ["a", 'It\'s  "odd":\n\t{{ x }} <b>', "Größe 目"])
def test_odd_messages(style, system):
    """Nothing is lost, doubled or read as a template."""
    chat = [said("user", "What is it?", 1)]
    found = style.under(system, style.render(chat))
    assert system in style.tokenizer.decode(found)
    assert found.tolist() == style.expected(chat, system).tolist()


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_message_with_the_word_text_in_quotes(name):
    chat = [said("user", "What is it?", 1)]
    style = STYLES[name]
    system = "Read the 'text' in the image."
    assert style.under(system, style.render(chat)).tolist() == style.expected(chat, system).tolist()


def test_words_that_carry_their_blank():
    """``USER: What`` is ``USER``, ``:``, `` What`` for most tokenizers; what is said must not get a second blank."""
    made = tokenizer(LLAVA, words=("What", "is"))
    turns, chat = Turns.of(made), [said("user", "What is it?")]
    ids = torch.tensor(made(made.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))["input_ids"])
    wanted = made.apply_chat_template([said("system", WHO), *chat], add_generation_prompt=True, tokenize=False)
    assert made.decode(ids).count(" What") == 1
    found = turns.under(WHO, ids, torch.zeros_like(ids, dtype=torch.uint8))
    assert made.decode(found) == wanted


@pytest.mark.parametrize("system", [WHO + "\n", " " + WHO])
def test_a_message_that_the_template_trims(system):
    """A text block of YAML ends in a new line."""
    style, chat = STYLES["llama 3"], [said("user", "What is it?", 1)]
    assert style.under(system, style.render(chat)).tolist() == style.expected(chat, WHO).tolist()


def test_prompts_without_a_users_turn_are_refused():
    style = STYLES["llava"]
    for text in ("", "What is it?", "ASSISTANT: a dog"):
        ids = torch.tensor(style.tokenizer(text)["input_ids"])
        with pytest.raises(InputError, match=r"^another system message needs a user's turn in the prompt, and 'USER:'"):
            style.under(WHO, ids)


def test_images_outside_of_the_users_turn_are_refused():
    style = STYLES["qwen"]
    chat = [said("system", "Look:", 1), said("user", "What is it?", 1)]
    with pytest.raises(InputError, match=r"^another system message would take images away"):
        style.under(WHO, style.render(chat))


def test_a_cut_prompt():
    """It ends within what the user says."""
    style = STYLES["qwen"]
    chat = [said("user", "What is it?", 1)]
    cut = 12
    assert style.under(WHO, style.render(chat)[:-cut]).tolist() == style.expected(chat, WHO)[:-cut].tolist()


# The same on a model: rows with padding


def bigger(family: str, style: Style) -> PreTrainedModel:
    """A tiny model with the tokenizer's vocabulary."""
    text = {**TEXT, "vocab_size": len(style.tokenizer)}
    token = style.tokenizer.convert_tokens_to_ids
    if family == "llava":
        vision = dict(
            model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4, projection_dim=32,
        )  # fmt: skip
        text["model_type"] = "llama"
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=style.image, image_seq_length=16)
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        vision = dict(
            depth=2, hidden_size=32, out_hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4,
            spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
        )  # fmt: skip
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=style.image, video_token_id=len(style.tokenizer) - 1,
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
    return build(family, config=config)


def inputs_of(family: str, style: Style, chats: list[tuple[list[dict[str, Any]], int]]) -> dict[str, Tensor]:
    rows = []
    for number, (chat, images) in enumerate(chats):
        ids = style.render(chat, TOKENS_PER_IMAGE[family])[None]
        one = {**prompt(family, images, seed=number), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family != "llava":
            one["mm_token_type_ids"] = (ids == style.image).int()
        rows.append(one)
    return left_padded(rows)


def calls_of(model: PreTrainedModel, run: Any) -> list[dict[str, Any]]:
    """Keyword arguments of every forward of the model."""
    seen: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize(("family", "name"), [("llava", "llava"), ("llava", "llama 3"), ("qwen2_5_vl", "qwen")])
def test_the_branch_reads_it_row_by_row(family, name):
    style = STYLES[name]
    chats = [
        ([said("user", "What is on the table? Say it.", 1)], 1),
        ([said("user", "And here?", 2)], 2),
        ([said("user", "Hm", 1), said("assistant", "Yes."), said("user", "No?")], 1),
    ]
    if style.system:
        chats.append(([said("system", "Be short."), said("user", "Is it?", 1)], 1))
    model = vlmattn.wrap(bigger(family, style), "icd", processor=style.tokenizer, system=WHO)
    inputs = inputs_of(family, style, chats)
    main, branch, *_ = calls_of(model, lambda: generate(model, inputs, new=2))
    assert torch.equal(main["input_ids"], inputs["input_ids"])
    longest = 0
    for row, (chat, _) in enumerate(chats):
        wanted = style.expected(chat, WHO, TOKENS_PER_IMAGE[family])
        seen = branch["attention_mask"][row].bool()
        assert branch["input_ids"][row][seen].tolist() == wanted.tolist()
        assert seen.sort().values.equal(seen), "padding is on the left"
        longest = max(longest, len(wanted))
    assert branch["input_ids"].shape[1] == longest
    if "mm_token_type_ids" in inputs:
        assert torch.equal(branch["mm_token_type_ids"], (branch["input_ids"] == style.image).int())


def test_a_row_without_a_users_turn_stops_all():
    style = STYLES["qwen"]
    model = vlmattn.wrap(bigger("qwen2_5_vl", style), "icd", processor=style.tokenizer)
    inputs = inputs_of("qwen2_5_vl", style, [([said("user", "What?", 1)], 1), ([said("assistant", "It is", 1)], 1)])
    with pytest.raises(InputError, match="another system message needs a user's turn"):
        generate(model, inputs, new=2)


def test_a_message_that_brings_an_image_token_is_refused():
    style = STYLES["llava"]
    model = vlmattn.wrap(bigger("llava", style), "icd", processor=style.tokenizer, system="Look at <image>!")
    with pytest.raises(InputError, match="branch 'confused': its prompts must keep the image tokens"):
        generate(model, inputs_of("llava", style, [([said("user", "What?", 1)], 1)]), new=2)


def test_the_bundled_processor():
    model, processor = vlmattn.load("embedded")
    content = [{"type": "image"}, {"type": "text", "text": "Is there a cup in the image?"}]
    chat = [{"role": "user", "content": content}]
    texts = [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in (chat, [{"role": "system", "content": [{"type": "text", "text": WHO}]}, *chat])
    ]
    from vlmattn.embedded.scenes import make_scene

    made, wanted = (
        processor(text=text, images=make_scene(12, 0)[1], return_tensors="pt", add_special_tokens=False)
        for text in texts
    )
    vlmattn.wrap(model, "icd", processor=processor, system=WHO)
    _, branch, *_ = calls_of(model, lambda: generate(model, dict(made), new=2))
    assert branch["input_ids"].tolist() == wanted["input_ids"].tolist()


def test_processors_that_do_not_tell_are_refused_at_wrap():
    model = build("llava")
    for made in (tokenizer(None), tokenizer("{{ messages[-1]['content'] }}")):
        with pytest.raises(InputError, match="chat template"):
            vlmattn.wrap(model, "icd", processor=made)
    with pytest.raises(OptionError, match=r"^icd must know where the user's turn ends; give the processor: wrap\("):
        vlmattn.wrap(model, "icd")
    assert not hasattr(model, "vlmattn")


# Positions


def batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """``left_padded``, for rows without images too: grids stay whole numbers."""
    made = left_padded(rows)
    return {name: value.long() if name.endswith("thw") else value for name, value in made.items()}


def captured(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Position ids of the first forward of generate()."""
    found = calls_of(model, lambda: generate(model, inputs, new=1))[0]["position_ids"]
    return found.expand(*found.shape[:-2], *inputs["input_ids"].shape)


def batches(family: str) -> dict[str, dict[str, Tensor]]:
    text = prompt(family, images=0, words=5)
    text = {name: value for name, value in text.items() if "pixel" not in name and "grid" not in name}
    made = {
        "one": prompt(family),
        "text only": text,
        "padded": left_padded([prompt(family, words=2), prompt(family, words=7, seed=2)]),
        "several images": left_padded([prompt(family, images=2, words=1), prompt(family, images=1, words=9, seed=3)]),
        "a row without": batch([prompt(family), prompt(family, images=0, words=3, seed=4), prompt(family, images=3)]),
    }
    if family != "llava":
        wide = prompt(family, words=3, seed=5)
        ids = torch.tensor([[1, 7, 97, *[IMAGE_TOKEN] * 12, 96, 8, 9, 97, *[IMAGE_TOKEN] * 2, 96, 8]])
        wide = dict(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
            pixel_values=torch.randn(48 + 8, 96), image_grid_thw=torch.tensor([[1, 8, 6], [1, 2, 4]]),
        )  # fmt: skip
        made["grids"] = left_padded([prompt(family), wide])
        made["video"] = video(3, family)
    return made


def video(frames: int, family: str) -> dict[str, Tensor]:
    """A prompt with an image and a video of 4 x 4 patches a frame; Qwen3-VL has a time before every frame."""
    film = [97, *[98] * 4 * frames, 96] if family == "qwen2_5_vl" else [50, 97, *[98] * 4, 96] * frames
    ids = torch.tensor([[1, 7, 97, *[IMAGE_TOKEN] * 4, 96, 8, *film, 8, 9]])
    types = (ids == IMAGE_TOKEN).int() + 2 * (ids == 98).int()
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types,
        pixel_values=torch.randn(16, 96), image_grid_thw=torch.tensor([[1, 4, 4]]),
        pixel_values_videos=torch.randn(16 * frames, 96), video_grid_thw=torch.tensor([[frames, 4, 4]]),
        **({"second_per_grid_ts": torch.tensor([0.5])} if family == "qwen2_5_vl" else {}),
    )  # fmt: skip


CASES = [(family, name) for family in FAMILIES for name in batches(family)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_positions_are_those_of_generate(family, name):
    model, inputs = build(family), batches(family)[name]
    wanted = captured(model, inputs)
    found = find_family(model).positions(model, inputs)
    real = inputs["attention_mask"].bool()
    assert found.shape[-2:] == inputs["input_ids"].shape
    spread = wanted.expand(found.shape) if found.ndim >= wanted.ndim else wanted
    assert torch.equal(found.expand(spread.shape)[..., real], spread[..., real])
    assert torch.equal(found[..., -1:], spread[..., -1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_leave_no_trace(family):
    model, other = build(family), batches(family)["several images"]
    generate(model, prompt(family))
    before = getattr(model.model, "rope_deltas", None)
    kept = None if before is None else before.clone()
    given = {name: value.clone() for name, value in other.items()}
    find_family(model).positions(model, other)
    after = getattr(model.model, "rope_deltas", None)
    assert after is before
    assert kept is None or torch.equal(after, kept)
    assert all(torch.equal(given[name], value) for name, value in other.items())


@pytest.mark.parametrize("rule", ["vcd", "m3id", "rbd"])
def test_a_rule_leaves_the_deltas_of_the_main_prompt(rule):
    """Qwen keeps them on the model, and a later forward on a cache of one's own uses them."""
    model, inputs = build("qwen2_5_vl"), batches("qwen2_5_vl")["grids"]
    generate(model, inputs)
    bare = model.model.rope_deltas.clone()
    generate(model, prompt("qwen2_5_vl"))
    vlmattn.wrap(model, rule)
    generate(model, inputs)
    assert torch.equal(model.model.rope_deltas, bare)


# Pixels of each row


def llava_rows(images: list[int]) -> dict[str, Tensor]:
    return left_padded([prompt("llava", count, words=2 + number, seed=number) for number, count in enumerate(images)])


@pytest.mark.parametrize("images", [[1], [2], [0, 1], [1, 0], [2, 0, 1], [0, 0, 3, 0], [1, 1, 1], [3, 1]])
def test_pixels_of_llava_rows(images):
    model, inputs = build("llava"), llava_rows(images)
    assert find_family(model).pixels(model, inputs) == {"pixel_values": images}


def qwen_rows(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Rows with images of (height, width) in patches."""
    prompts = []
    for number, images in enumerate(rows):
        ids = [1, *range(5, 7 + number)]
        for high, wide in images:
            ids += [97, *[IMAGE_TOKEN] * (high * wide // 4), 96]
        row = torch.tensor([[*ids, 8]])
        prompts.append(
            dict(
                input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=(row == IMAGE_TOKEN).int(),
                pixel_values=torch.randn(sum(high * wide for high, wide in images), 96),
                image_grid_thw=torch.tensor([[1, high, wide] for high, wide in images], dtype=torch.long).view(-1, 3),
            )
        )  # fmt: skip
    return batch(prompts)


@pytest.mark.parametrize(
    "rows",
    [
        [[(4, 4)]],
        [[(4, 4), (2, 6)]],
        [[(2, 2)], [(8, 6)]],
        [[], [(4, 4)], [], [(2, 4), (6, 2)]],
        [[(2, 2)] * 4, []],
    ],
)
def test_pixels_of_qwen_rows(rows):
    model, inputs = build("qwen2_5_vl"), qwen_rows(rows)
    wanted = [sum(high * wide for high, wide in images) for images in rows]
    assert find_family(model).pixels(model, inputs) == {"pixel_values": wanted}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_pixels_of_videos(family):
    model, inputs = build(family), video(3, family)
    assert find_family(model).pixels(model, inputs) == {"pixel_values": [16], "pixel_values_videos": [48]}
    assert find_family(model).pixels(model, {"input_ids": inputs["input_ids"]}) == {}


@pytest.mark.parametrize(("family", "images"), [("llava", 1), ("llava", 3), ("qwen2_5_vl", 1), ("qwen2_5_vl", 6)])
def test_images_that_do_not_fit_are_refused(family, images):
    """Two prompts of two images each. (Twice as many images for LLaVA could be images of half as many tokens.)"""
    model, inputs = build(family), left_padded([prompt(family, 2), prompt(family, 2)])
    other = prompt(family, images)
    inputs |= {name: other[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    with pytest.raises(InputError, match=r"^the images do not fit the image tokens of the prompts; give each prompt"):
        find_family(model).pixels(model, inputs)


def test_images_that_end_within_a_row_are_refused():
    """As many tokens as pixels in all, but not row by row."""
    model, inputs = build("qwen2_5_vl"), qwen_rows([[(4, 4)], [(2, 2)]])
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 2], [1, 4, 4]])
    with pytest.raises(InputError, match="the images do not fit"):
        find_family(model).pixels(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_function_sees_one_row_at_a_time(family):
    """All of its images, none of other rows', and rows without images are left out."""
    images = [2, 0, 1]
    rows = [prompt(family, count, words=2 + number, seed=number) for number, count in enumerate(images)]
    model, seen = build(family), []
    rule = ContrastiveDecoding(
        (Branch(name="b", image=lambda pixels: seen.append(pixels) or -pixels),), Contrast((1.0,))
    )
    vlmattn.wrap(model, "none")
    inputs = batch(rows)
    calls = calls_of(model, lambda: model.generate(**inputs, preset=rule, max_new_tokens=1, do_sample=False))
    assert len(seen) == 2
    assert all(torch.equal(one, row["pixel_values"]) for one, row in zip(seen, (rows[0], rows[2]), strict=True))
    assert torch.equal(calls[1]["pixel_values"], -inputs["pixel_values"])


# Ids and logits


def test_ids_that_are_there_for_images_only():
    assert find_family(model := build("llava")).image_ids(model) == (IMAGE_TOKEN,)
    assert sorted(find_family(model := build("qwen2_5_vl")).image_ids(model)) == [96, 97, 98, 99]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_image_leaves_its_text(family):
    model = vlmattn.wrap(build(family), "m3id")
    rows = [prompt(family, 2, words=3), prompt(family, 1, words=6, seed=2)]
    _, branch, *_ = calls_of(model, lambda: generate(model, left_padded(rows), new=1))
    marker_ids = torch.tensor([96, 97, 98, 99]) if family != "llava" else torch.tensor([IMAGE_TOKEN])
    for row, one in enumerate(rows):
        seen = branch["attention_mask"][row].bool()
        ids = one["input_ids"][0]
        assert branch["input_ids"][row][seen].tolist() == ids[~torch.isin(ids, marker_ids)].tolist()
    assert not any(name.startswith(("pixel", "image_", "video_")) for name in branch)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_last_residual_stream(family):
    model, inputs, hidden = build(family), prompt(family), []
    found = find_family(model)
    hook = found.decoder(model).norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    logits = model(**inputs).logits
    hook.remove()
    assert torch.equal(found.logits(model, hidden[0]), logits)
    assert not torch.allclose(found.logits(model, hidden[0] + torch.randn_like(hidden[0])), logits)


def test_instead_needs_no_turns_where_it_is_not_asked_for():
    """Only a rule that writes another prompt asks for the processor."""
    vlmattn.wrap(build("llava"), "vcd")
    rule = ContrastiveDecoding((Branch(name="b", prompt=Instead("x")),), Contrast((0.0,)))
    vlmattn.wrap(build("llava"), rule)
