"""PAI's second part: classifier-free guidance by the image (arXiv 2407.21771)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding
from vlmattn.decoding.rules import Contrast
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "pai_guidance",
    paper="arXiv:2407.21771 (ECCV 2024)",
    code="github.com/LALBJ/PAI",
    faithful="golden (rule)",
    parts="decoding",
    cost="prefill: the text of the prompt once more; decode: twice the rows, one forward",
    presets={
        "pai_guidance": (
            "README of the released code: gamma = 1.1; with its attention part: pai_official+pai_guidance",
            {},
        ),
        "pai_guidance_cli": ("default of the released command line: gamma = 2", {"gamma": 2.0}),
    },
)
@dataclass(frozen=True, kw_only=True)
class PAIGuidance(Decoding):
    """Move away from what the prompt says without its image:

        s = gamma (lp - lp_u) + lp_u,   kept where p >= beta max p,   lp = log-softmax

    lp_u comes from the prompt without image tokens, and attention edits of the recipe do not act on it. gamma 1 is the
    model's own distribution, without a cut-off, as in the released code. With beams the released scores are not
    normalised; here the library normalises them.

    Raises:
        OptionError: an option out of range.
    """

    gamma: float = option(1.1, 0, 100, "guidance; 1 is none", source="README commands of the released code")
    beta: float = option(0.1, 0, 1, "plausibility cut-off", source="released code")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        beta = self.beta if self.gamma != 1 else 0.0
        unseen = Branch(name="unseen", image="drop", edits="off")
        return ContrastiveDecoding((unseen,), Contrast((self.gamma - 1,), "logprobs", beta))
