"""AGLA: assembly of global and local attention (arXiv 2406.12718)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding
from vlmattn.decoding.rules import Contrast
from vlmattn.decoding.tokens import TopAttended
from vlmattn.options import MANY, option, parse_layers
from vlmattn.registry import register


@register(
    "agla",
    paper="arXiv:2406.12718 (CVPR 2025)",
    code="github.com/Lackel/AGLA",
    faithful="golden (the first token; later ones as the paper has them)",
    parts="decoding",
    cost="prefill: the prompt twice; decode: twice the rows, one forward",
    presets={
        "agla": ("released constants: alpha = 2, beta = .5; needs the augmented image with every call", {}),
        "agla_attention": (
            "experimental: features of image tokens that draw little attention are zeroed instead",
            {"augment": "attention"},
        ),
    },
)
@dataclass(frozen=True, kw_only=True)
class AGLA(Decoding):
    """Add what the model says about the part of the image that matters:  s = l + alpha l',  kept where p >= beta max p.

    l' comes from an augmented image. The paper masks it by the question, with a GradCAM of BLIP-ITM; bring yours:
    ``generate(..., branch_inputs={"augmented": {"pixel_values": ...}})``. With ``augment`` "attention" no image is
    needed: the model's own attention keeps ``share`` of the image tokens and zeroes the features of the others (ours).

    The released code reuses the main cache for the branch from the second token on, so that it adds alpha l there; here
    every token gets the true rule.

    Raises:
        OptionError: an option out of range.
        InputError: no augmented image in the call.
    """

    alpha: float = option(2.0, 0, 100, "weight of the augmented image", source="released code")
    beta: float = option(0.5, 0, 1, "plausibility cut-off", source="released code")
    augment: str = option("given", about="where the augmented image comes from", choices=("given", "attention"))
    share: float = option(0.5, 0, 1, "share of the image tokens that stay, for augment = attention", source="ours")
    layers: str = option("1/4:3/4", about="decoder layers whose attention chooses them", source="ours")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layers(self.layers, MANY, "agla.layers")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        augmented = Branch(name="augmented", image="given")
        if self.augment == "attention":
            augmented = Branch(
                name="augmented", tokens=TopAttended(self.share, self.layers, blank=True, name="agla.layers")
            )
        return ContrastiveDecoding((augmented,), Contrast((self.alpha,), beta=self.beta, plus=True))
