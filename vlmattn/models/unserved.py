"""Model types that no method runs on, each with what stands against it and what works instead."""

from __future__ import annotations

from collections.abc import Mapping

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family

_LIKE = "take a decoder-only model like qwen2_5_vl or gemma3"
_CROSS = f"it is an encoder-decoder, which reads the image by cross-attention, where no method acts; {_LIKE}"
_HEADS = (
    "its layers differ in their number of heads, and methods choose heads by one number for all layers; take a model"
    " with the same heads everywhere like qwen3_vl"
)
_DISTANCE = (
    "inside its attention a learned bias of distance is added to the scores, which vlmattn's kernels do not know; take"
    " a model with rotary positions like qwen3_vl"
)

_OWN = "its attention is computed by code of its own, not by transformers' attention interface, so no edit reaches it"
_TWICE = (
    "its layers of cross-attention to images are numbered apart from its decoder layers, with the same numbers, so"
    " edits could not tell them apart; take idefics2, or mllama, which reads images the same way"
)

#: Model type -> (a checkpoint, why).
UNSERVED: Mapping[str, tuple[str, str]] = {
    "florence2": ("florence-community/Florence-2-large", _CROSS),
    "blip": ("Salesforce/blip-image-captioning-base", _CROSS),
    "git": ("microsoft/git-base-coco", f"{_OWN}; {_LIKE}"),
    "idefics": ("HuggingFaceM4/idefics-9b", _TWICE),
    "pix2struct": ("google/pix2struct-base", _CROSS),
    "udop": ("microsoft/udop-large", _CROSS),
    "vision-encoder-decoder": ("microsoft/trocr-base-handwritten", _CROSS),
    "pp_formulanet": ("PaddlePaddle/PP-FormulaNet-L_safetensors", _CROSS),
    "t5gemma2": ("google/t5gemma-2-270m-270m", _CROSS),
    "evolla": (
        "westlake-repl/Evolla-10B-hf",
        f"it reads proteins by cross-attention and no pictures; {_LIKE} for pictures",
    ),
    "pi0": (
        "lerobot/pi0_base",
        "it writes actions of a robot, not text, so there is no answer to edit; take its language model, paligemma",
    ),
    "diffusion_gemma": (
        "google/diffusiongemma-26B-A4B-it",
        "it writes blocks of tokens by diffusion, in a loop of its own that has no step of one token; take gemma4",
    ),
    "mistral4": (
        "mistralai/Mistral-Small-4-119B-2603",
        "its class in this list has no vision tower, it reads text only; take mistral3 or mistral_large4",
    ),
    "dots3_note": ("dots-studio/dots3-note-prev", _HEADS),
    "glm5_next": (
        "zai-org/GLM-5.3-Flash",
        "its residual stream is several streams that every layer mixes anew, most layers have linear attention, and the"
        " others see the keys that an indexer chooses; take glm46v",
    ),
    "inkling2": ("thinkingmachines/Inkling-2-Small-MXFP8", _DISTANCE),
    "inkling2_loop": ("", _DISTANCE),
    "inkling_mm_model": ("thinkingmachines/Inkling", _DISTANCE),
}

for _name, (_checkpoint, _why) in UNSERVED.items():
    said = {"model_types": {_name: _checkpoint}, "unsupported": _why, "untested": "nothing acts on it", "__doc__": _why}
    register_family(type("Unserved", (Family,), said))
