"""VCD: visual contrastive decoding (arXiv 2311.16922)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding
from vlmattn.decoding.noise import STEPS, Noise
from vlmattn.decoding.rules import Contrast
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "vcd",
    paper="arXiv:2311.16922 (CVPR 2024)",
    code="github.com/DAMO-NLP-SG/VCD",
    faithful="golden",
    parts="decoding",
    cost="prefill: the prompt twice; decode: twice the rows, one forward",
    presets={
        "vcd": ("defaults of the released eval: alpha = 1, beta = .1, noise step 500", {}),
        "vcd_pope": ("the released POPE script: beta = .2", {"beta": 0.2}),
    },
)
@dataclass(frozen=True, kw_only=True)
class VCD(Decoding):
    """Subtract what a noised image brings:  s = (1 + alpha) l - alpha l',  kept where p >= beta max p.

    l' comes from the same prompt with diffusion noise on the preprocessed pixels (``Noise``). The noise of a row
    depends on ``seed`` only, not on the batch. The released code works with sampling alone; here greedy search and
    beams follow the same rule, and processors of the library (penalties, temperature, top-p) see the combined scores.

    Raises:
        OptionError: an option out of range.
    """

    alpha: float = option(1.0, 0, 100, "strength of the contrast", source="released eval; its sampler falls back to .5")
    beta: float = option(0.1, 0, 1, "plausibility cut-off", source="released code; its POPE script has .2")
    step: int = option(500, 0, STEPS - 1, "diffusion step of the noise", source="released eval")
    seed: int = option(0, 0, 2**63 - 1, "of the noise")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        noised = Branch(name="noised", image=Noise(self.step, self.seed))
        return ContrastiveDecoding((noised,), Contrast((self.alpha,), beta=self.beta))
