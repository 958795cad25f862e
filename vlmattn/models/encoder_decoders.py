"""Models whose images are not among the decoder's tokens, or whose attention cannot be reached: why nothing acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family

_NEVER_RUN = "nothing acts on it, so there is nothing to run"


@register_family
class Florence2(Family):
    model_types: ClassVar[Mapping[str, str]] = {"florence2": "florence-community/Florence-2-large"}
    unsupported: ClassVar[str] = (
        "it is an encoder-decoder: its image tokens are in the encoder, and the decoder reads them by cross-attention,"
        " where no method acts"
    )


@register_family
class Blip(Family):
    model_types: ClassVar[Mapping[str, str]] = {"blip": "Salesforce/blip-image-captioning-base"}
    untested: ClassVar[str] = _NEVER_RUN
    unsupported: ClassVar[str] = (
        "its decoder reads the image by cross-attention that it computes itself, not by transformers' attention"
        " interface, so no edit reaches it; blip-2 and instructblip with OPT or Vicuna run"
    )


@register_family
class Pix2Struct(Family):
    model_types: ClassVar[Mapping[str, str]] = {"pix2struct": "google/pix2struct-base"}
    untested: ClassVar[str] = _NEVER_RUN
    unsupported: ClassVar[str] = (
        "it is an encoder-decoder: its patches are in the encoder, and the decoder reads them by cross-attention, where"
        " no method acts; for documents use a decoder-only model, like qwen2_5_vl"
    )


@register_family
class Udop(Family):
    model_types: ClassVar[Mapping[str, str]] = {"udop": "microsoft/udop-large"}
    untested: ClassVar[str] = _NEVER_RUN
    unsupported: ClassVar[str] = (
        "it is an encoder-decoder: patches and words are mixed in the encoder, and the decoder reads both by"
        " cross-attention, where no method acts; for documents use a decoder-only model, like qwen2_5_vl"
    )


@register_family
class VisionEncoderDecoder(Family):
    model_types: ClassVar[Mapping[str, str]] = {"vision-encoder-decoder": "naver-clova-ix/donut-base"}
    untested: ClassVar[str] = _NEVER_RUN
    unsupported: ClassVar[str] = (
        "it joins any vision encoder to any text decoder, which reads the image by cross-attention, where no method"
        " acts; its prompts have no image tokens; use a decoder-only model, like qwen2_5_vl"
    )


@register_family
class PPFormulaNet(Family):
    model_types: ClassVar[Mapping[str, str]] = {"pp_formulanet": "PaddlePaddle/PP-FormulaNet_plus-L_safetensors"}
    untested: ClassVar[str] = _NEVER_RUN
    unsupported: ClassVar[str] = (
        "it is an encoder-decoder that writes a formula from one picture: the image is in the encoder, there is no"
        " prompt, and no method acts on cross-attention; use a decoder-only model, like qwen2_5_vl"
    )


@register_family
class Git(Family):
    model_types: ClassVar[Mapping[str, str]] = {"git": "microsoft/git-base-coco"}
    untested: ClassVar[str] = _NEVER_RUN
    unsupported: ClassVar[str] = (
        "its attention is computed by code of its own, not by transformers' attention interface, so no edit reaches"
        " it; for captions use a model like llava"
    )


@register_family
class Idefics(Family):
    model_types: ClassVar[Mapping[str, str]] = {"idefics": "HuggingFaceM4/idefics-9b-instruct"}
    untested: ClassVar[str] = _NEVER_RUN
    unsupported: ClassVar[str] = (
        "its gated layers of cross-attention to images are numbered apart from its decoder layers, with the same"
        " numbers, so edits could not tell them apart; use idefics2, or mllama, which reads images the same way"
    )
