"""ICD: instruction contrastive decoding (arXiv 2403.18715)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding, Instead
from vlmattn.decoding.rules import Contrast
from vlmattn.options import option
from vlmattn.registry import register

CONFUSED = "You are a confused objects detector to provide a fuzzy overview or impression of the image."


@register(
    "icd",
    paper="arXiv:2403.18715 (ACL Findings 2024)",
    code="github.com/p1k0pan/ICD",
    faithful="golden",
    parts="decoding",
    cost="prefill: the prompt twice; decode: twice the rows, one forward",
    presets={"icd": ("defaults of the released command line: alpha = 1, beta = .1", {})},
)
@dataclass(frozen=True, kw_only=True)
class ICD(Decoding):
    """Subtract what a confusing instruction brings:  s = (1 + alpha) l - alpha l',  kept where p >= beta max p.

    l' comes from the same image and question under another system message, written with the model's chat template
    (``wrap(model, "icd", processor=...)``); where a template has no system message it goes before the user's turn.

    Raises:
        OptionError: an option out of range.
        InputError: a prompt in which the user's turn is not found.
    """

    alpha: float = option(
        1.0, 0, 100, "strength of the contrast", source="released command line; its code falls back to .5"
    )
    beta: float = option(0.1, 0, 1, "plausibility cut-off", source="released code")
    system: str = option(CONFUSED, about="the system message of the branch", source="released code: one of five")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        confused = Branch(name="confused", prompt=Instead(self.system))
        return ContrastiveDecoding((confused,), Contrast((self.alpha,), beta=self.beta))
