"""One setting or more of every registered method, each of which acts on the tiny models, and prompts with turns."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny import IMAGE_TOKEN, TOKENS_PER_IMAGE, build
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.interventions import (
    GIFT,
    MMA,
    PAI,
    PAINT,
    VAF,
    VAR,
    VHR,
    VISTA,
    VTI,
    Bidirectional,
    Calibration,
    Directions,
    FocusDirections,
    HeadProfile,
    Heads,
    HeadsGuided,
    Intervention,
    Isolation,
    Knockout,
    Nullu,
    SinkKnockout,
    SoFA,
    Steer,
)
from vlmattn.interventions.focus import save_directions
from vlmattn.models import find_family

BOS, USER, ASSISTANT, STOP = 1, 10, 11, 15  # STOP ends a document
SINKS: dict[str, Any] = dict(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0)
_FEW: dict[str, Any] = dict(tau=1.0, dims=(3, 17), layers="0:")  # some image tokens are sinks, and some are none
SETTINGS: dict[str, Intervention] = {
    "var": VAR(**SINKS),
    "var_extend": VAR(**SINKS, extend=True),
    "var_either": VAR(**SINKS, sinks="either", extend=True),
    "pai": PAI(layers="0:"),
    "vhr": VHR(layers="0:"),
    "paint": PAINT(layers="0:"),
    "gift": GIFT(saliency="1", layers="2:"),
    "gift_ahead": GIFT(saliency="2", layers="0:"),
    "vaf": VAF(enhance=1.5, suppress=0.7, layers="1:"),
    "vaf_heads": VAF(enhance=1.5, suppress=0.7, heads=0.5, layers="1:"),
    "heads_guided": HeadsGuided(layers="0:"),
    "heads_block": Heads(operation="block", heads="1.2,2.0"),
    "heads_block_all": Heads(operation="block", heads="1.2,2.0", rows="all"),
    "heads_mean": Heads(operation="block", heads="1.2,2.0", ablation="mean"),
    "heads_amplify": Heads(operation="amplify", heads="1.2,2.0"),
    "heads_cut": Heads(operation="cut", heads="1.2,2.0"),
    "mma": MMA(),
    "mma_soft": MMA(sigma=0.5),
    "sofa": SoFA(layers="0:-1"),
    "sofa_mix": SoFA(mode="mix", layers="0:-1"),
    "bidirectional_image": Bidirectional(span="image"),
    "bidirectional_images": Bidirectional(span="images", sigma=0.5),
    "bidirectional_prompt": Bidirectional(span="prompt"),
    "bidirectional_prompt_soft": Bidirectional(span="prompt", sigma=0.5),
    "knockout_image_text": Knockout(source="image", target="text"),
    "knockout_image_image": Knockout(source="image", target="image"),
    "knockout_image_last": Knockout(source="image", target="last"),
    "knockout_image_generated": Knockout(source="image", target="generated"),
    "knockout_text_text": Knockout(source="text", target="text"),
    "knockout_text_image": Knockout(source="text", target="image"),
    "knockout_text_last": Knockout(source="text", target="last"),
    "knockout_text_generated": Knockout(source="text", target="generated"),
    "sink_knockout": SinkKnockout(**_FEW),
    "sink_knockout_any": SinkKnockout(**_FEW, hide="any"),
    "sink_knockout_others": SinkKnockout(**_FEW, hide="others"),
    "isolate_images": Isolation(between="images"),
    "isolate_documents": Isolation(between="documents"),
    "isolate_separated": Isolation(between="documents", separator=(STOP,)),
    "calibration": Calibration(basket=8, layers="0:"),
    "calibration_documents": Calibration(segments="documents", separator=(STOP,), layers="0:", strength=1.0),
    "focus": FocusDirections(alpha=1.0, layers="1:3"),
    "steer": Steer(alpha=0.5),
    "steer_text": Steer(alpha=0.5, rows="text", layers="1:3"),
    "vti": VTI(alpha=4.0),
    "vista": VISTA(alpha=0.5),
    "nullu": Nullu(rank=2, layers="1:"),
}
BETWEEN_IMAGES = {"sofa", "sofa_mix", "isolate_images", "isolate_documents", "isolate_separated"}

# What does nothing by its definition: no edge to another image, no earlier document, no pooling row while decoding.
IDENTITIES: dict[str, Intervention] = {
    "var": VAR(**SINKS, keep=1.0),
    "pai": PAI(alpha=0.0, layers="0:"),
    "vhr": VHR(alpha=1.0, layers="0:"),
    "paint": PAINT(alpha=0.0, beta=0.0, layers="0:"),
    "gift": GIFT(alpha=0.0, saliency="1", layers="2:"),
    "gift_ahead": GIFT(alpha=0.0, saliency="2", layers="0:"),
    "vaf": VAF(enhance=1.0, suppress=1.0, layers="0:"),
    "heads_guided": HeadsGuided(alpha=0.0, layers="0:"),
    "heads_amplify": Heads(operation="amplify", heads="1.2,2.0", gain=1.0),
    "mma": MMA(sigma=0.0),
    "sofa": SoFA(sigma=0.0, layers="0:"),
    "sofa_mix": SoFA(sigma=0.0, mode="mix", layers="0:"),
    "bidirectional": Bidirectional(sigma=0.0, span="prompt"),
    "calibration": Calibration(strength=0.0, basket=8, layers="0:"),
    "focus": FocusDirections(alpha=0.0, layers="1:3"),
    "steer": Steer(alpha=0.0),
    "vti": VTI(alpha=0.0),
    "vista": VISTA(alpha=0.0),
    "nullu": Nullu(strength=0.0, layers="1:"),
}


@functools.cache
def anatomy(family: str) -> Anatomy:
    model = build(family)
    return find_family(model).anatomy(model)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vlmattn-tests-")


@functools.cache
def directions(family: str) -> str:
    """A file of focus directions for layers 1 and 2: head 3, and head 1."""
    sizes, generator = anatomy(family), torch.Generator().manual_seed(4)
    query = {layer: torch.zeros(sizes.heads, sizes.head_dim) for layer in (1, 2)}
    for layer, head in ((1, 3), (2, 1)):
        query[layer][head] = torch.randn(sizes.head_dim, generator=generator)
    return str(save_directions(query, Path(_folder().name) / f"{family}.safetensors", sizes))


@functools.cache
def steering(family: str) -> str:
    """A file of two random directions for every layer."""
    sizes, generator = anatomy(family), torch.Generator().manual_seed(6)
    drawn = {layer: torch.randn(2, sizes.hidden_size, generator=generator) for layer in range(sizes.layers)}
    return str(Directions(drawn, sizes.fingerprint).save(Path(_folder().name) / f"{family}-steering.safetensors"))


@functools.cache
def head_profile(family: str) -> str:
    """A HeadProfile with scores that grow with the number of the head, and random mean outputs."""
    sizes, generator = anatomy(family), torch.Generator().manual_seed(5)
    scores = tuple(tuple(float(n * sizes.heads + h) for h in range(sizes.heads)) for n in range(sizes.layers))
    means = torch.randn(sizes.layers, sizes.heads, sizes.head_dim, generator=generator).tolist()
    found = HeadProfile(fingerprint=sizes.fingerprint, scores={"causal": scores}, means=means)
    return str(found.save(Path(_folder().name) / f"{family}-heads.json"))


def fitted(method: Intervention, family: str) -> Intervention:
    """The method with the files that it needs for a family."""
    if isinstance(method, FocusDirections):
        return replace(method, file=directions(family))
    if isinstance(method, Steer | VTI | Nullu):
        return replace(method, file=steering(family))
    if isinstance(method, Heads) and method.ablation == "mean":
        return replace(method, profile=head_profile(family))
    return method


class Speech:
    """A processor whose template is ``USER: ... ASSISTANT: ...``; token 10 is the one marker and 11 the other."""

    chat_template = "USER: {question} ASSISTANT: {answer}"

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(decode=self.decode, all_special_tokens=[])

    @staticmethod
    def decode(ids: list[int]) -> str:
        assert all(token >= 0 for token in ids), f"no token ids: {ids}"  # as real tokenizers do
        return " ".join({USER: "USER:", ASSISTANT: "ASSISTANT:"}.get(token, f"w{token}") for token in ids)

    @staticmethod
    def apply_chat_template(chat: list[dict], add_generation_prompt: bool, tokenize: bool) -> str:
        assert not tokenize
        marker = {"user": "USER:", "assistant": "ASSISTANT:"}
        said = " ".join(f"{marker[turn['role']]} {turn['content'][0]['text']}" for turn in chat)
        return said + " ASSISTANT:" * add_generation_prompt


def picture(family: str, kind: int = IMAGE_TOKEN) -> list[int]:
    """Placeholders of one image (98: of one video frame pair)."""
    tokens = [kind] * TOKENS_PER_IMAGE[family]
    return tokens if family == "llava" else [97, *tokens, 96]


def inputs_of(family: str, ids: list[int], seed: int) -> dict[str, Tensor]:
    """What a processor would return for these tokens; random images."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([ids])
    images = ids.count(IMAGE_TOKEN) // TOKENS_PER_IMAGE[family]
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if family == "llava":
        return dict(inputs, pixel_values=torch.randn(images, 3, 16, 16, generator=generator))
    return dict(
        inputs,
        mm_token_type_ids=(tokens == IMAGE_TOKEN).int(),
        pixel_values=torch.randn(16 * images, 96, generator=generator),
        image_grid_thw=torch.tensor([[1, 4, 4]] * images, dtype=torch.long).view(-1, 3),
    )


def dialogue(family: str, images: int = 1, words: int = 4, seed: int = 1, adjacent: bool = False) -> dict[str, Tensor]:
    """``<s> USER: two words, images (each with a word and STOP after it unless adjacent), words ASSISTANT:``."""
    generator = torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(20, 90, (n,), generator=generator).tolist()  # noqa: E731
    ids = [BOS, 16, USER, *text(2)]
    for _ in range(images):
        ids += picture(family) + ([] if adjacent else [*text(1), STOP])
    return inputs_of(family, [*ids, *text(words), ASSISTANT], seed)


def dialogues(family: str) -> list[dict[str, Tensor]]:
    """Prompts of different lengths with one, two and three images; in the second nothing is between the images."""
    return [
        dialogue(family, words=9, seed=3),
        dialogue(family, images=2, words=3, seed=7, adjacent=True),
        dialogue(family, images=3, words=2, seed=6),
    ]
