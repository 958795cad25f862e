"""SoFA: soft attention between images in both directions (arXiv 2503.13792)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.interventions.base import Intervention
from vlmattn.kernels import AttentionEdit, MaskPart
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext


@register(
    "sofa",
    paper="arXiv:2503.13792 (CVPR 2025)",
    code="github.com/xytian1008/sofa (not read)",
    faithful="paper text",
    parts="mask",
    cost="prefill: dense rows in every second layer; decode: nothing",
    presets={
        "sofa": ("sigma = .5, the middle of the range the paper tried; it tunes sigma per task", {}),
        "sofa_mix": ("a mixture of two softmaxes instead of a soft mask (ours, experimental)", {"mode": "mix"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class SoFA(Intervention):
    """Let the tokens of an image see later images too, softly, so that no position among the images is favoured.

    With C the causal edges and E the edges from image tokens to tokens of later images:

        mode "mask" (paper):  softmax with the mask (1 - sigma) 1_C + sigma 1_(C + E): a key of E counts sigma times
        mode "mix" (ours):    (1 - sigma) softmax_C + sigma softmax_(C + E)

    sigma = 0 is the bare model and sigma = 1 full attention between images, in both modes. Text rows stay causal; the
    rows of the last image have no E. Only the prompt is edited; later steps feel it through the cache. Counts image
    tokens that see a later image. ``vlmattn tune`` chooses sigma on a validation set, as the paper does with 32
    samples.

    Raises:
        OptionError: sigma outside 0..1.
    """

    sigma: float = option(0.5, 0, 1, "weight of a key of a later image", source="middle of the paper's .25 to .75")
    mode: str = option("mask", about="soft mask or mixture", source="paper: mask", choices=("mask", "mix"))
    layers: str = option("0:-1:2", about="decoder layers", source="paper: every second; the last would have no effect")

    def opens(self) -> frozenset[str]:
        return frozenset({"image-other image"})

    def edit(self, context: LayerContext) -> AttentionEdit:
        if not self.sigma or not context.step.is_prompt:
            return AttentionEdit()
        images = context.images
        rows = context.of_rows(images, -1)
        context.count("sofa", ((rows >= 0) & (rows < images.amax(1, keepdim=True))).sum())
        return AttentionEdit(mask=(MaskPart(rows, images, self.sigma, "different", mix=self.mode == "mix"),))
