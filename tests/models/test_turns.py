"""Where the turns of a prompt are: markers of chat templates, and the role of every token."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import vlmattn
from vlmattn import GIFT, MMA, InputError, OptionError, embedded
from vlmattn.models import Turns
from vlmattn.request import ANSWER, IMAGE, MARKER, SYSTEM, TEXT, USER
from vlmattn.wrapping import record_of

# --- Templates as the checkpoints have them (Llama 3 shortened: without tools and dates)

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}SYSTEM_PROMPT{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_PLAIN = LLAMA3.replace("SYSTEM_PROMPT", "")
LLAMA3_SYSTEM = LLAMA3.replace(
    "SYSTEM_PROMPT", "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023<|eot_id|>"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer(template: str | None, special: list[str], listed: bool = True, bos: str = "<s>", eos: str = "</s>"):
    """A real fast tokenizer with one token per byte and some special ones; unlisted are only special in the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    more = {"additional_special_tokens": special} if listed else {}
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, **more)
    found.chat_template = template
    assert all((text in found.all_special_tokens) == listed for text in special)
    return found


IM = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
LLAMA3_ENDS = dict(bos="<|begin_of_text|>", eos="<|end_of_text|>")
FOUND = {
    "llava": (tokenizer(LLAVA, ["<image>"]), "USER:", "ASSISTANT:"),
    "qwen": (tokenizer(QWEN, IM, eos="<|im_end|>"), "<|im_start|>user", "<|im_end|><|im_start|>assistant"),
    "llama 3": (
        tokenizer(LLAMA3_PLAIN, LLAMA3_SPECIAL, **LLAMA3_ENDS),
        "<|start_header_id|>user<|end_header_id|>",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    ),
    "llama 3 with a system prompt": (
        tokenizer(LLAMA3_SYSTEM, LLAMA3_SPECIAL, **LLAMA3_ENDS),
        "<|start_header_id|>user<|end_header_id|>",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    ),
    "mistral": (tokenizer(MISTRAL, ["[INST]", "[/INST]"]), "[INST]", "[/INST]"),
    "mistral, older": (tokenizer(MISTRAL, []), "[INST]", "[/INST]"),
}
every_template = pytest.mark.parametrize("name", FOUND)


@every_template
def test_markers_are_read_off_the_template(name):
    made, user, answer = FOUND[name]
    found = Turns.of(made)
    assert (found.user, found.answer) == (user, answer)


def test_markers_of_header_tokens_that_the_tokenizer_does_not_list():
    """Llama 3 lists only bos and eos as special; its header tokens are special in the vocabulary."""
    made = tokenizer(LLAMA3_SYSTEM, LLAMA3_SPECIAL, listed=False, **LLAMA3_ENDS)
    found = Turns.of(made)
    assert found.user == "<|start_header_id|>user<|end_header_id|>"
    assert found.answer == "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"


def test_markers_of_the_bundled_processor():
    _, processor = embedded.load()
    for one in (processor, processor.tokenizer):
        if getattr(one, "chat_template", None):
            found = Turns.of(one)
            assert (found.user, found.answer) == ("USER:", "ASSISTANT:")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] }}|{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_that_do_not_tell_are_refused(template):
    with pytest.raises(InputError, match="chat template"):
        Turns.of(tokenizer(template, []))


# --- Roles of tokens


@dataclass
class Words:
    """A tokenizer of known pieces; ids are their numbers."""

    pieces: list[str] = field(default_factory=list)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


STYLES = {  # what opens a user's turn, what lies between it and the answer, what ends an answer; with their white space
    "llava": ("USER: ", " ASSISTANT: ", "</s>"),
    "qwen": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    "llama 3": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "mistral": ("[INST] ", " [/INST] ", "</s>"),
}
PICTURE = "\ufffc"  # one image token in the text of a test
Segment = tuple[str, int, int]  # text, role, turn


def segments(style: str, system: str, said: list[tuple[str, str]], ends_with: str) -> list[Segment]:
    """A conversation by construction, up to the answer to the last user, or ending within what the user says."""
    user, answer, stop = STYLES[style]
    out: list[Segment] = [("<s>" + system, SYSTEM, -1)]
    for turn, (asked, answered) in enumerate(said):
        out += [(user, SYSTEM, -1), (asked, USER, turn)]
        last = turn == len(said) - 1
        if last and ends_with == "question":
            break
        out.append((answer, MARKER, turn))
        if not last or ends_with == "answer":
            out.append((answered + stop, ANSWER, -1))
    return out


def cut(conversation: list[Segment], sizes: list[int]) -> tuple[list[str], list[tuple[int, int] | None]]:
    """Pieces of at most ``sizes`` characters, cycled through, and the role and turn of each.

    A piece is what its first visible character is; blanks between two stretches may be either (None). Pictures are
    pieces of their own.
    """
    text = "".join(t for t, _, _ in conversation)
    facts = [(role, turn) for t, role, turn in conversation for _ in t]
    pieces, wanted, at, n = [], [], 0, 0
    while at < len(text):
        size = 1 if text[at] == PICTURE else sizes[n % len(sizes)]
        stop = min(at + size, len(text))
        if PICTURE in text[at + 1 : stop]:
            stop = text.index(PICTURE, at + 1)
        visible = [k for k in range(at, stop) if not text[k].isspace()]
        if visible:
            fact = facts[visible[0]]
        else:
            before = [facts[k] for k in range(at) if not text[k].isspace()][-1:]
            after = [facts[k] for k in range(stop, len(text)) if not text[k].isspace()][:1]
            fact = before[0] if before and before == after else None
        pieces.append(text[at:stop])
        wanted.append(fact)
        at, n = stop, n + 1
    return pieces, wanted


def label(style: str, rows: list[list[str]], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Roles and turns of rows of pieces, left padded."""
    user, answer, _ = STYLES[style]
    words = Words(["<pad>"])
    length = max(map(len, rows)) + padding
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    types = torch.zeros(len(rows), length, dtype=torch.uint8)
    for b, pieces in enumerate(rows):
        for n, piece in enumerate(pieces, length - len(pieces)):
            words.pieces.append("USER: ASSISTANT: [INST]" if piece == PICTURE else piece)  # image ids are never decoded
            ids[b, n], types[b, n] = len(words.pieces) - 1, IMAGE if piece == PICTURE else TEXT
    found = Turns("".join(user.split()), "".join(answer.split()), words)
    return found.roles(ids, types, ids > 0)


LETTERS = "ab cd\nef.,:?!()<|>/éß日本🙂\t " + PICTURE
texts = st.text(LETTERS, min_size=1, max_size=25)


@settings(max_examples=150)
@given(
    style=st.sampled_from(sorted(STYLES)),
    conversations=st.lists(
        st.tuples(
            st.text("You are helpful.\n ", max_size=15),
            st.lists(st.tuples(texts, texts.map(lambda t: t.replace(PICTURE, ""))), min_size=1, max_size=3),
            st.sampled_from(["marker", "answer", "question"]),
        ),
        min_size=1,
        max_size=2,
    ),
    sizes=st.lists(st.integers(1, 14), min_size=1, max_size=9),
    padding=st.integers(0, 3),
)
def test_conversations_at_random_cuts(style, conversations, sizes, padding):
    cuts = [cut(segments(style, *conversation), sizes) for conversation in conversations]
    roles, turns = label(style, [pieces for pieces, _ in cuts], padding)
    for b, (pieces, wanted) in enumerate(cuts):
        first = roles.shape[1] - len(pieces)
        assert roles[b, :first].tolist() == [SYSTEM] * first
        assert turns[b, :first].tolist() == [-1] * first
        found = list(zip(roles[b, first:].tolist(), turns[b, first:].tolist(), strict=True))
        for piece, got, expected in zip(pieces, found, wanted, strict=True):
            assert expected in (None, got), f"{piece!r} of {pieces}: {got} instead of {expected}"


def test_tokens_that_straddle_are_what_they_begin_with():
    pieces = [
        "<s>sys US",
        "ER: what",
        " is",
        " it AS",
        "SIST",
        "ANT: a",
        " cat</s>US",
        "ER:",
        " more",
        "ASSISTANT",
        ":",
    ]
    roles, turns = label("llava", [pieces])
    assert roles[0].tolist() == [SYSTEM, SYSTEM, USER, USER, MARKER, MARKER, ANSWER, SYSTEM, USER, MARKER, MARKER]
    assert turns[0].tolist() == [-1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1]


@pytest.mark.parametrize("style", STYLES)
def test_blanks_at_the_end_of_what_the_user_says_belong_to_the_turn(style):
    """A tokenizer may make a token of the space or line break before the marker."""
    user, answer, _ = STYLES[style]
    roles, turns = label(style, [["<s>", user.strip(), "what", " ", "is", "\n", " ", *answer.split()]])
    inside = slice(2, 7)
    assert turns[0, inside].tolist() == [0] * 5
    assert set(roles[0, inside].tolist()) <= {USER, MARKER}
    assert roles[0, inside][:3].tolist() == [USER] * 3


def test_without_a_marker_there_is_no_turn():
    roles, turns = label("llava", [["<s>", "what", " is", " this"], ["ASSISTANT", ":", "USER", " :"]])
    assert (roles[0] == SYSTEM).all()
    assert (turns[0] == -1).all()
    assert roles[1].tolist() == [SYSTEM] * 4, "the white space in 'USER :' is left out, and nothing follows it"


def test_images_within_a_turn_belong_to_it():
    text = ["<s>", "USER:", PICTURE, PICTURE, "\n", "what", "ASSISTANT:", "a", "USER:", "and", PICTURE, "ASSISTANT:"]
    roles, turns = label("llava", [text, ["USER:", PICTURE]])
    assert turns[0].tolist() == [-1, -1, 0, 0, 0, 0, 0, -1, -1, 1, 1, 1]
    assert roles[0].tolist() == [SYSTEM, SYSTEM, USER, USER, USER, USER, MARKER, ANSWER, SYSTEM, USER, USER, MARKER]
    assert turns[1].tolist() == [-1] * 11 + [0], "a prompt that stops within the user's turn"


# --- Real tokenizers end to end


CHAT = [
    ("user", "describe the image, please.\nBe brief"),
    ("assistant", "A cat: 3 o'clock"),
    ("user", " and now? Straße, 日本, 🙂"),
]


@every_template
def test_rendered_and_tokenised_conversations(name):
    """Byte-level tokens: every token of the user's words is in the user's turn, the markers are markers."""
    made, _, answer = FOUND[name]
    as_parts = name == "llava"
    chat = [{"role": who, "content": [{"type": "text", "text": t}] if as_parts else t} for who, t in CHAT]
    text = made.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([made(text, add_special_tokens=False).input_ids])
    pieces = [made.decode([i]) for i in ids[0].tolist()]
    real = torch.ones_like(ids, dtype=torch.bool)
    roles, turns = Turns.of(made).roles(ids, torch.zeros_like(ids, dtype=torch.uint8), real)

    def of(chosen: Tensor) -> str:
        return made.decode(ids[0][chosen[0]].tolist())

    def squeeze(text: str) -> str:
        return "".join(text.split())

    for turn, said in ((0, CHAT[0][1]), (1, CHAT[2][1])):
        assert squeeze(of((roles == USER) & (turns == turn))) == squeeze(said)
        assert squeeze(of((roles == MARKER) & (turns == turn))) == answer
    assert squeeze(of(roles == ANSWER)).startswith(squeeze(CHAT[1][1]))
    assert ((turns >= 0) == ((roles == USER) | (roles == MARKER))).all()
    assert len(pieces) > 60, "the premise: many small tokens"


@pytest.fixture(scope="module")
def bundled():
    return embedded.load()


def chat_of(*said: str) -> list[dict]:
    speakers = ["user", "assistant"] * len(said)
    return [
        {"role": who, "content": [*([{"type": "image"}] if n == 0 else []), {"type": "text", "text": text}]}
        for n, (who, text) in enumerate(zip(speakers, said, strict=False))
    ]


def asked(processor, chats: list[list[dict]]) -> dict[str, Tensor]:
    from PIL import Image

    text = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    images = [Image.new("RGB", (56, 56), (40 * n, 90, 200)) for n in range(len(chats))]
    return dict(processor(text=text, images=images, return_tensors="pt", padding=True))


def test_the_bundled_processor(bundled):
    model, processor = bundled
    questions = ["is there a red dog ?", "how many dog ?", "and a cat ?"]
    inputs = asked(processor, [chat_of(questions[0]), chat_of(questions[1], "two", questions[2])])
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    types = (ids == model.config.image_token_id).to(torch.uint8)
    roles, turns = Turns.of(processor).roles(ids, types, real)
    text = lambda row, chosen: processor.tokenizer.decode(ids[row][chosen])  # noqa: E731
    for row, turn, said in ((0, 0, questions[0]), (1, 0, questions[1]), (1, 1, questions[2])):
        words = (turns[row] == turn) & (roles[row] == USER) & (types[row] == TEXT)
        assert text(row, words).split() == said.split()
        assert text(row, (turns[row] == turn) & (roles[row] == MARKER)).split() == ["ASSISTANT:"]
    assert (turns[0][types[0] == IMAGE] == 0).all()
    assert (turns[1][types[1] == IMAGE] == 0).all()
    assert "two" in text(1, roles[1] == ANSWER)
    assert (roles[~real] == SYSTEM).all()


@torch.no_grad()
def test_a_second_turn_on_the_cache_of_generate(bundled):
    """What was generated in between came one token at a time; its ids are not in the prompt."""
    model, processor = bundled
    inputs = asked(processor, [chat_of("is there a red dog ?")])
    with vlmattn.applied(model, MMA(layers="0:"), processor=processor):
        out = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        more = processor.tokenizer("USER: and a cat ? ASSISTANT:", add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([out.sequences, more.input_ids], 1)
        second = dict(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=out.past_key_values)
        cache = model.generate(
            **second, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        ).past_key_values
        request = cache._vlmattn_request
        turns = request.turns(ids.shape[1], torch.device("cpu"))[0]
        roles = request.roles(ids.shape[1], torch.device("cpu"))[0]
    assert processor.tokenizer.decode(ids[0][(turns == 1) & (roles == USER)]).split() == ["and", "a", "cat", "?"]
    assert processor.tokenizer.decode(ids[0][(turns == 1) & (roles == MARKER)]).split() == ["ASSISTANT:"]
    generated = slice(inputs["input_ids"].shape[1], out.sequences.shape[1])
    assert (turns[generated] == -1).all()


@torch.no_grad()
def test_prompts_without_a_turn_are_refused(bundled):
    model, processor = bundled
    inputs = asked(processor, [chat_of("is there a red dog ?")])
    keep = inputs["input_ids"][0] != processor.tokenizer.convert_tokens_to_ids("USER:")
    bad = dict(inputs, input_ids=inputs["input_ids"][:, keep], attention_mask=inputs["attention_mask"][:, keep])
    for method in (MMA(), GIFT()):
        with vlmattn.applied(model, method, processor=processor):
            with pytest.raises(InputError, match=r"row 0 .* has none"):
                model(**bad)
            model(**inputs)


@torch.no_grad()
def test_embeddings_alone_do_not_tell_the_turns(bundled):
    model, processor = bundled
    inputs = asked(processor, [chat_of("is there a red dog ?")])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with vlmattn.applied(model, MMA(), processor=processor), pytest.raises(InputError, match="input_ids"):
        model(**inputs)


def test_the_processor_is_found_beside_the_model_or_asked_for(bundled, tmp_path):
    model, processor = bundled
    with vlmattn.applied(model, MMA()):
        assert record_of(model).turns == Turns.of(processor)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    with pytest.raises(OptionError, match="processor=processor"):
        vlmattn.wrap(other, MMA())
    assert "vlmattn" not in other.__dict__
    vlmattn.wrap(other, MMA(), processor=processor.tokenizer if processor.tokenizer.chat_template else processor)


# --- content words


class Pieces:
    """Decodes pieces as SentencePiece does: a mark begins a word, and the first blank of a text is dropped."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids).replace("\u2581", " ").removeprefix(" ")


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (["\u2581Is", "\u2581there", "\u2581a", "\u2581red", "\u2581d", "og", "\u2581in", "\u2581it", "?"], ["\u2581red", "\u2581d", "og"]),
        (["\u2581the", "ory", "\u2581of", "\u2581The", "\u2581sea", ",", "\u2581isn", "'", "t", "\u2581it"], ["\u2581the", "ory", "\u2581sea"]),
        (["\u2581", "Count", "\u2581", "3", "4", "\n", "\u2581cats", "\n", "of", "\n"], ["Count", "3", "4", "\u2581cats"]),
        (["\u2581Who", "\u2581is", "\u2581that", "?"], []),
    ],
)  # fmt: skip
def test_content_words_are_found_whole(pieces, kept):
    ids = torch.arange(len(pieces))[None]
    found = Turns("U", "A", Pieces(pieces)).content(ids, torch.full_like(ids, USER, dtype=torch.uint8))
    assert [piece for piece, is_kept in zip(pieces, found[0], strict=True) if is_kept] == kept


def test_only_what_the_user_says_has_content():
    ids = torch.tensor([[0, 1, 2, -1]])
    roles = torch.tensor([[SYSTEM, USER, ANSWER, USER]], dtype=torch.uint8)
    found = Turns("U", "A", Pieces(["\u2581dog", "\u2581cat", "\u2581cow"])).content(ids, roles)
    assert found.tolist() == [[False, True, False, False]]
