"""RBD: re-balancing contrastive decoding (arXiv 2409.06485)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding
from vlmattn.decoding.noise import STEPS, Noise
from vlmattn.decoding.rules import Contrast
from vlmattn.decoding.tokens import TopAttended
from vlmattn.options import MANY, option, parse_layers
from vlmattn.registry import register


@register(
    "rbd",
    paper="arXiv:2409.06485",
    code="not available",
    faithful="experimental (formula and constants not verified)",
    parts="decoding",
    cost="prefill: the prompt twice; decode: three times the rows, one forward",
    presets={"rbd": ("experimental: two branches as in the abstract, constants are ours", {})},
)
@dataclass(frozen=True, kw_only=True)
class RBD(Decoding):
    """Subtract what the text suggests, add what the significant image tokens say:

        s = (1 + text - visual) l - text l_text + visual l_visual,   kept where p >= beta max p

    l_text: the same prompt with a noised image. l_visual: from the last prompt token on only the ``share`` of the image
    tokens is seen that this token attends to most (mean over heads and ``layers``). ``visual`` 0 is VCD.

    The paper's formula, constants and way to choose tokens are not verified (only its abstract was): experimental.

    Raises:
        OptionError: an option out of range.
    """

    text: float = option(1.0, 0, 100, "weight of the branch that is subtracted", source="ours")
    visual: float = option(0.5, 0, 100, "weight of the branch that is added", source="ours")
    beta: float = option(0.1, 0, 1, "plausibility cut-off", source="ours, as VCD")
    step: int = option(500, 0, STEPS - 1, "diffusion step of the noise", source="ours, as VCD")
    share: float = option(0.3, 0, 1, "share of the image tokens that the visual branch sees", source="ours")
    layers: str = option("1/4:3/4", about="decoder layers whose attention chooses them", source="ours")
    seed: int = option(0, 0, 2**63 - 1, "of the noise")
    edits: str = option(
        "visual", about="branches that the recipe's attention edits act in", choices=("both", "visual", "none")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_layers(self.layers, MANY, "rbd.layers")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        text = Branch(
            name="text", image=Noise(self.step, self.seed), edits="inherit" if self.edits == "both" else "off"
        )
        chosen = TopAttended(self.share, self.layers, name="rbd.layers")
        visual = Branch(name="visual", tokens=chosen, edits="off" if self.edits == "none" else "inherit")
        return ContrastiveDecoding((text, visual), Contrast((self.text, -self.visual), beta=self.beta))
