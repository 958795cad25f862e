"""Attention Buckets: several rotary bases, so that no position falls into a trough of attention (arXiv 2312.04455)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding
from vlmattn.decoding.rules import Mixture
from vlmattn.errors import OptionError
from vlmattn.options import option
from vlmattn.registry import register


@register(
    "buckets",
    paper="arXiv:2312.04455",
    code="github.com/AlibabaResearch/DAMO-ConvAI",
    faithful="golden",
    parts="decoding",
    cost="prefill: the prompt once per base; decode: rows times bases, one forward",
    presets={"buckets": ("six bases, 1 to 2.5 times the model's own, as released for Llama-2 and tools", {})},
)
@dataclass(frozen=True, kw_only=True)
class Buckets(Decoding):
    """Read the prompt under several rotary bases and mix what they say:

        s = sum_i w_i l_i,   w = softmax_i(max_v l_i(v))

    ``factors`` times the model's own base are the further ones (for Llama-2's 10,000: 17,500 .. 25,000). Every other
    base is a branch.

    Raises:
        OptionError: a factor that is not positive.
    """

    factors: tuple[float, ...] = option(
        (1.75, 1.8, 1.9, 2.0, 2.5),
        about="further bases, in units of the model's own",
        source="released code, for Llama-2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.factors)) < len(self.factors) or not all(0 < factor <= 1e6 for factor in self.factors):
            raise OptionError(f"buckets.factors must be different positive numbers, got {self.factors}")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        return ContrastiveDecoding(
            tuple(Branch(name=f"base x{factor:g}", rope=factor) for factor in self.factors if factor != 1),
            Mixture(space="logits"),
        )
