"""AvisC: attentional vision calibration (arXiv 2405.17820)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding
from vlmattn.decoding.rules import Contrast
from vlmattn.decoding.tokens import BlindTokens
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "avisc",
    paper="arXiv:2405.17820 (ACL Findings 2025)",
    code="github.com/sangminwoo/AvisC",
    faithful="golden",
    parts="decoding",
    cost="prefill: the prompt twice; decode: twice the rows, one forward",
    presets={
        "avisc": ("the released POPE script: alpha = 1, gamma = .5, lambda = 1", {}),
        "avisc_amber": ("the released AMBER script: alpha = 2.5", {"alpha": 2.5}),
    },
)
@dataclass(frozen=True, kw_only=True)
class AvisC(Decoding):
    """Subtract what blind tokens say:  s = (1 + alpha) l - alpha l',  kept where p >= beta max p.

    Blind tokens: image tokens whose attention, from the row before the first new token, is at least mean +
    ``deviations`` std, as a mean over the layers that hold ``mass`` of all attention on the image. l' comes from the
    prompt in which the features of all other image tokens are zero.

    Raises:
        OptionError: an option out of range.
    """

    alpha: float = option(1.0, 0, 100, "strength of the contrast", source="released scripts")
    beta: float = option(0.1, 0, 1, "plausibility cut-off", source="released code")
    mass: float = option(
        0.5, 0, 1, "share of the attention on the image that the chosen layers hold", source="released scripts"
    )
    deviations: float = option(1.0, -10, 10, "stds above the mean that make a token blind", source="released scripts")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        blind = Branch(name="blind", tokens=BlindTokens(self.mass, self.deviations))
        return ContrastiveDecoding((blind,), Contrast((self.alpha,), beta=self.beta))
