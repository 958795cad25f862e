"""Attention Buckets: several rotary bases, so that no position falls into a trough of attention (arXiv 2312.04455)."""

from __future__ import annotations

from dataclasses import dataclass

from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding
from vlmattn.decoding.rules import Mixture
from vlmattn.interventions.registry import Sizes, option, register


@register(
    "buckets",
    paper="arXiv:2312.04455",
    code="not read",
    faithful="experimental (bases and weights recalled, not verified)",
    parts="decoding",
    cost="prefill: the prompt once per base; decode: rows times bases, one forward",
    presets={"buckets": ("experimental: six bases, 1 to 2.5 times the model's own", {})},
)
@dataclass(frozen=True, kw_only=True)
class Buckets(Decoding):
    """Read the prompt under several rotary bases and mix what they say:

        p = sum_i w_i p_i,   w = softmax_i(max_v p_i(v))

    ``factors`` times the model's own base are the further ones (for Llama-2's 10,000: 17,500 .. 25,000). Every other base
    is a branch. Bases and weights were recalled, not verified: experimental.

    Raises:
        OptionError: a factor that is not positive.
    """

    factors: tuple[float, ...] = option(
        (1.75, 1.8, 1.9, 2.0, 2.5), about="further bases, in units of the model's own", source="recalled for Llama-2"
    )

    def contrast(self, sizes: Sizes) -> ContrastiveDecoding:
        return ContrastiveDecoding(
            tuple(Branch(name=f"base x{factor:g}", rope=factor) for factor in self.factors if factor != 1), Mixture()
        )
