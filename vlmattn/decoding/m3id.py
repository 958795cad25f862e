"""M3ID: multi-modal mutual information decoding (arXiv 2403.14003)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding
from vlmattn.decoding.rules import Contrast, Growth
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "m3id",
    paper="arXiv:2403.14003 (CVPR 2024)",
    code="not available; github.com/sangminwoo/AvisC has its own version",
    faithful="another code (golden)",
    parts="decoding",
    cost="prefill: the text of the prompt once more; decode: twice the rows, one forward",
    presets={"m3id": ("lambda = .02, as AvisC's version has it", {})},
)
@dataclass(frozen=True, kw_only=True)
class M3ID(Decoding):
    """Move away from the prompt without its image, the more so the longer the answer:

        s = lp + (exp(rate t) - 1) (lp - lp_u),   kept where p >= beta max p,   t = 1, 2, ...

    The weight is .02 at the first token, 1.7 at the 50th and 54 at the 200th; ``cap`` bounds it. The paper applies the
    rule only where max p is below a threshold: ``unsure_below``; the known code does not, so 1 is the default.

    Raises:
        OptionError: an option out of range.
    """

    rate: float = option(0.02, 0, 10, "growth of the weight per token", source="AvisC's version")
    beta: float = option(0.1, 0, 1, "plausibility cut-off", source="AvisC's version")
    cap: float = option(1e3, 0, 1e9, "largest weight", source="ours")
    unsure_below: float = option(
        1.0, 0, 1, "tokens with at least this max p are left alone; 1 = none are", source="AvisC's version"
    )

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        weight = Growth(self.rate, self.cap) if self.rate and self.cap else 0.0
        rule = Contrast((weight,), "logprobs", self.beta, unsure_below=self.unsure_below)
        return ContrastiveDecoding((Branch(name="unseen", image="drop"),), rule)
