"""DoLa: decoding by contrasting layers (arXiv 2309.03883)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.decoding.contrast import ContrastiveDecoding, Decoding
from vlmattn.decoding.rules import plausible, possible
from vlmattn.options import MANY, option, some_layers
from vlmattn.registry import register

_HALF = 20  # layers of a half in the released commands for 60 and 80 layers


@dataclass(frozen=True)
class FarthestLayer:
    """Subtract the early layer j farthest from the last:  s = lp - lp_j,  max_j KL(m|p) + KL(m|p_j),  m = (p + p_j)/2.

    The divergences run from the middle, as in the released code.
    """

    beta: float

    def __call__(self, main: Tensor, others: Sequence[Tensor], t: Tensor) -> Tensor:
        last, early = main.log_softmax(-1), torch.stack(list(others)).log_softmax(-1)
        middle = torch.logaddexp(last, early) - math.log(2)
        apart = torch.where(possible(middle) & possible(last) & possible(early), 2 * middle - last - early, 0.0)
        far = (middle.exp() * apart).sum(-1)  # [layer, row, position]
        chosen = far.argmax(0)[None, ..., None].expand(1, *main.shape)
        scores = last - early.gather(0, chosen)[0]
        return scores.masked_fill(~(plausible(main, self.beta) & possible(main)), -torch.inf)


@register(
    "dola",
    paper="arXiv:2309.03883 (ICLR 2024)",
    code="github.com/voidism/DoLa",
    faithful="golden",
    parts="decoding",
    cost="one head per early layer and token",
    presets={
        "dola_low": ("every second layer of the lower half, of the first 20 at most", {}),
        "dola_high": ("every second layer of the upper half, of the last 20 at most", {"layers": "high"}),
    },
)
@dataclass(frozen=True, kw_only=True)
class DoLa(Decoding):
    """Subtract what an early layer would say:  s = lp_N - lp_j,  kept where p >= beta max p.

    j is the layer of ``layers`` that is farthest from the last one (``FarthestLayer``), chosen anew for every token and
    row; the released code chooses one for a whole batch. Layer i means the residual stream that enters layer i, through
    the head without the final norm, as there; models with tied embeddings should leave out layer 0. The authors use
    ``repetition_penalty=1.2`` beside it, in ``generate``.

    Raises:
        OptionError: an option out of range, no layer left.
    """

    beta: float = option(0.1, 0, 1, "plausibility cut-off", source="released code")
    layers: str = option(
        "low",
        about="candidate layers; low and high: every second one of a half, of 20 layers at most",
        source="released commands for 32, 40, 60 and 80 layers",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._layers(MANY)

    def _layers(self, count: int) -> tuple[int, ...]:
        """Candidate layers of a decoder of ``count`` layers."""
        ranges = {"low": f"0:{min(count // 2, _HALF)}:2", "high": f"{max(count // 2, count - _HALF)}::2"}
        return some_layers(ranges.get(self.layers, self.layers), count, "dola.layers")

    def contrast(self, anatomy: Anatomy) -> ContrastiveDecoding:
        return ContrastiveDecoding((), FarthestLayer(self.beta), self._layers(anatomy.layers), normed=False)
