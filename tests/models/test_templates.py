"""Turns of conversations in the forms that checkpoints have: what is said is told apart from markers and from each other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from models.test_turns import tokenizer
from transformers.models.llama4.processing_llama4 import chat_template as LLAMA4
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as SMOLVLM

from vlmattn.models import Turns
from vlmattn.request import ANSWER, IMAGE, SYSTEM, TEXT, USER

SAID = [
    ("system", "Be brief."),
    ("user", "How many dogs are in it?"),
    ("assistant", "Two, I think."),
    ("user", "And cats?"),
]


@dataclass(frozen=True)
class Form:
    """What stands around the words of each speaker, as the cards of the checkpoints show it."""

    user: tuple[str, str]
    answer: tuple[str, str]
    system: tuple[str, str] | None = None
    begins: str = ""
    image: str = "<image>"
    special: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        """The same as a chat template of parts."""
        places = {"user": self.user, "assistant": self.answer} | ({"system": self.system} if self.system else {})
        cases = "".join(
            f"{{% if message['role'] == '{who}' %}}{opens}{{{{ ns.said }}}}{closes}{{% endif %}}"
            for who, (opens, closes) in places.items()
        )
        said = (
            "{% set ns = namespace(said='') %}{% for part in message['content'] %}"
            f"{{% set ns.said = ns.said + (part['text'] if part['type'] == 'text' else '{self.image}') %}}{{% endfor %}}"
        )
        prompt = f"{{% if add_generation_prompt %}}{self.answer[0]}{{% endif %}}"
        return f"{self.begins}{{% for message in messages %}}{said}{cases}{{% endfor %}}{prompt}"


def chatml(image: str, **more: str) -> Form:
    return Form(
        ("<|im_start|>user\n", "<|im_end|>\n"), ("<|im_start|>assistant\n", "<|im_end|>\n"),
        ("<|im_start|>system\n", "<|im_end|>\n"), image=image, special=("<|im_start|>", "<|im_end|>"), **more,
    )  # fmt: skip


def headers(opens: str, closes: str, end: str, begins: str = "", image: str = "<|image|>") -> Form:
    around = {who: (f"{opens}{who}{closes}\n\n", end) for who in ("user", "assistant", "system")}
    return Form(around["user"], around["assistant"], around["system"], begins, image, (opens, closes, end))


FORMS = {
    "internvl": chatml("<IMG_CONTEXT>"),
    "qwen2_5_vl": chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    "lfm2_vl": chatml("<image>", begins="<|startoftext|>"),
    "molmo2": chatml("<|image|>"),
    "mllama": headers("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    "vicuna": Form(("USER: ", " "), ("ASSISTANT: ", "</s>"), ("", " ")),
    "vipllava": Form(("###Human: ", ""), ("###Assistant: ", ""), ("", "")),
    "mistral": Form(("[INST]", "[/INST]"), ("", "</s>"), ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "<s>", "[IMG]", ("[INST]", "[/INST]")),
    "gemma3": Form(
        ("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n"), None, "<bos>", "<start_of_image>",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "gemma4": Form(("<|turn>user\n", "<turn|>\n"), ("<|turn>model\n", "<turn|>\n"), ("<|turn>system\n", "<turn|>\n"), "<bos>", "<|image|>"),
    "aya_vision": Form(
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"), "<BOS_TOKEN>",
    ),
    "glm4v": Form(
        ("<|user|>\n", ""), ("<|assistant|>\n", ""), ("<|system|>\n", ""), "[gMASK]<sop>", "<|begin_of_image|><|image|><|end_of_image|>",
        ("<|user|>", "<|assistant|>"),
    ),
    "kimi_k25": Form(
        ("<|im_user|>user<|im_middle|>", "<|im_end|>"), ("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
        ("<|im_system|>system<|im_middle|>", "<|im_end|>"),
    ),
    "granite4_vision": Form(
        ("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n"), ("<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>\n"),
        ("<|start_of_role|>system<|end_of_role|>", "<|end_of_text|>\n"),
    ),
    "deepseek_vl": Form(
        ("User: ", "\n\n"), ("Assistant: ", "<｜end▁of▁sentence｜>"), ("", "\n\n"), "<｜begin▁of▁sentence｜>",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ),
    "ernie4_5_vl_moe": Form(("User: ", "\n"), ("Assistant: ", "<|end_of_sentence|>"), ("", "\n"), "<|begin_of_sentence|>"),
    "exaone4_5": Form(("[|user|]\n", "\n"), ("[|assistant|]\n", "[|endofturn|]\n"), ("[|system|]\n", "[|endofturn|]\n")),
    "idefics2": Form(("User:", "<end_of_utterance>\n"), ("Assistant:", "<end_of_utterance>\n"), ("System:", "<end_of_utterance>\n")),
}  # fmt: skip
SHIPPED = {"smolvlm": (SMOLVLM, "<image>"), "llama4": (LLAMA4, "<|image|>")}


def labelled(made, image: str, speakers) -> tuple[str, list[int], list[int]]:
    """A conversation as it is written, with the role and turn of every character."""
    chat, first = [], True
    for who, said in speakers:
        pictured = first and who == "user"
        first = first and who != "user"
        parts = [{"type": "image"}] if pictured else []
        chat.append({"role": who, "content": [*parts, {"type": "text", "text": said}]})
    text = made.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    at = text.index(image)
    ids, types = [], []
    for piece, kind in ((text[:at], TEXT), (image, IMAGE), (text[at + len(image) :], TEXT)):
        found = [0] * 3 if kind == IMAGE else made(piece, add_special_tokens=False)["input_ids"]
        ids, types = [*ids, *found], [*types, *[kind] * len(found)]
    ids, types = torch.tensor([ids]), torch.tensor([types])
    roles, turns = Turns.of(made).roles(ids, types, torch.ones_like(ids, dtype=torch.bool))
    letters = [("\ufffc" if t == IMAGE else made.decode([i])) for i, t in zip(ids[0].tolist(), types[0], strict=True)]
    written = "".join(letters)
    sizes = [len(letter) for letter in letters]
    return (
        written,
        [int(role) for role, size in zip(roles[0], sizes, strict=True) for _ in range(size)],
        [int(turn) for turn, size in zip(turns[0], sizes, strict=True) for _ in range(size)],
    )


def templates():
    yield from ((name, form.template, form.image, form.special) for name, form in FORMS.items())
    yield from ((name, template, image, ()) for name, (template, image) in SHIPPED.items())


@pytest.mark.parametrize(("name", "template", "image", "special"), templates(), ids=lambda v: v if len(v) < 20 else "")
@pytest.mark.parametrize("system", [True, False])
def test_what_is_said_has_its_role_and_turn(name, template, image, special, system):
    if system and name in FORMS and FORMS[name].system is None:
        pytest.skip("no system message")
    speakers = SAID if system else SAID[1:]
    text, roles, turns = labelled(tokenizer(template, list(special)), image, speakers)
    at, turn = 0, 0
    for who, said in speakers:
        at = text.index(said, at)
        wanted = {"system": SYSTEM, "user": USER, "assistant": ANSWER}[who]
        found = roles[at : at + len(said)]
        assert found == [wanted] * len(said), f"{name}: {who} says {said!r}"
        if who == "user":
            assert turns[at : at + len(said)] == [turn] * len(said)
            turn += 1
        at += len(said)
    assert roles[text.index("\ufffc")] == USER
    said = sum(len(said) for who, said in speakers if who == "user")
    assert sum(role == USER for role in roles) <= said + 4 + len(
        image
    )  # and the image with its markers, and white space
    assert roles[0] != USER
