"""How the logits of several views of one prompt become one distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmattn.errors import OptionError, quoted

Rule = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]
"""``rule(main, others, t)``: logits ``[row, position, vocabulary]`` in float32 of the main prompt and of everything
beside it (branches, then layers); ``t`` int64 ``[position]`` is the 1-based number of the generated token that a
position predicts. Returns the logits to choose from, in the shape of ``main``."""

Weight = float | Callable[[Tensor], Tensor]
"""A number, or a function of ``t``."""


def plausible(main: Tensor, beta: float) -> Tensor:
    """Adaptive plausibility, bool as ``main``: keep v where p(v) >= beta max p, so l[v] >= log(beta) + max l.

    ``beta`` 0 keeps everything; the most likely token always stays.
    """
    if beta <= 0:
        return torch.ones_like(main, dtype=torch.bool)
    return main >= math.log(beta) + main.amax(-1, keepdim=True)


def possible(logits: Tensor) -> Tensor:
    """Tokens that a view does not rule out, by -inf or by the smallest number there is; bool, in ``logits``' shape."""
    return logits > torch.finfo(logits.dtype).min / 2


@dataclass(frozen=True)
class Growth:
    """A weight that grows with the answer:  w(t) = exp(rate t) - 1, at most ``cap``."""

    rate: float
    cap: float = 1e12

    def __post_init__(self) -> None:
        for name in ("rate", "cap"):
            if not isinstance(getattr(self, name), (int, float)) or not math.isfinite(getattr(self, name)):
                raise OptionError(f"{name} of a Growth must be a finite number, got {quoted(getattr(self, name))}")

    def __call__(self, t: Tensor) -> Tensor:
        return torch.expm1(self.rate * t.float()).clamp(max=self.cap)


@dataclass(frozen=True)
class Contrast:
    """Linear in the logits:  s = (1 + sum_k w_k) l - sum_k w_k l_k,  then adaptive plausibility on l.

    A positive weight moves away from a branch, a negative one towards it; coefficients sum to 1, so a branch that says
    the same as the main prompt changes nothing.

    Attributes:
        weights: w_k, one per branch.
        space: "logits", or "logprobs" (log-softmax of each view first).
        beta: 0..1, tokens less likely than ``beta`` times the most likely one are dropped; 0 keeps all.
        plus: add instead,  s = l + sum_k w_k l_k  (coefficients do not sum to 1).
        unsure_below: 0..1, rows whose most likely token has at least this probability are left alone; 1 leaves none.

    Raises:
        OptionError: a value out of range.
    """

    weights: tuple[Weight, ...]
    space: Literal["logits", "logprobs"] = "logits"
    beta: float = 0.0
    plus: bool = False
    unsure_below: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.weights, list):
            object.__setattr__(self, "weights", tuple(self.weights))
        if not isinstance(self.weights, tuple) or not all(
            callable(w) or isinstance(w, (int, float)) for w in self.weights
        ):
            raise OptionError(
                f"weights must be numbers or functions of t, one for each branch, got {quoted(self.weights)}"
            )
        if self.space not in ("logits", "logprobs"):
            raise OptionError(f"space must be logits or logprobs, got {quoted(self.space)}")
        for name in ("beta", "unsure_below"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} must be a number within 0..1, got {quoted(getattr(self, name))}")
        if any(not callable(w) and not math.isfinite(w) for w in self.weights):
            raise OptionError(f"weights must be finite numbers or functions of t, got {quoted(self.weights)}")

    @property
    def is_identity(self) -> bool:
        """The answer is the model's own."""
        return not self.beta and not any(self.weights)

    def __call__(self, main: Tensor, others: Sequence[Tensor], t: Tensor) -> Tensor:
        own = self._in_space(main)
        weights = [w(t)[:, None] if callable(w) else w for w in self.weights]
        total = torch.as_tensor(0.0, device=main.device)
        for weight in weights:
            total = total + weight
        scores: Tensor = own if self.plus else (1 + total) * own
        for weight, other in zip(weights, others, strict=True):
            term: Tensor = weight * torch.where(possible(other), self._in_space(other), own)  # no contrast there
            scores = scores + term if self.plus else scores - term
        keep = plausible(main, self.beta) & possible(main)  # what no view allows would give nan
        scores = scores.masked_fill(~keep, -math.inf)
        if self.unsure_below < 1:
            sure = main.softmax(-1).amax(-1, keepdim=True) >= self.unsure_below
            scores = torch.where(sure, main, scores)
        return scores

    def _in_space(self, logits: Tensor) -> Tensor:
        return logits if self.space == "logits" else logits.log_softmax(-1)


@dataclass(frozen=True)
class Mixture:
    """Weighted mean of all views, the surest weighing most, main prompt included.

    Attributes:
        space: "probs", the logarithm of  p = sum_i w_i p_i,  w = softmax_i(max_v p_i(v) / temperature);  or "logits",
            s = sum_i w_i l_i,  w = softmax_i(max_v l_i(v) / temperature).
        temperature: above 0; large ones weigh all views alike.
    """

    temperature: float = 1.0
    space: Literal["probs", "logits"] = "probs"

    def __post_init__(self) -> None:
        number = isinstance(self.temperature, (int, float))
        if self.space not in ("probs", "logits") or not (number and self.temperature > 0):
            raise OptionError(f"a Mixture needs space probs or logits and a temperature above 0, got {quoted(self)}")

    def __call__(self, main: Tensor, others: Sequence[Tensor], t: Tensor) -> Tensor:
        if self.space == "logits":
            logits = torch.stack([main, *others])
            return ((logits.amax(-1, keepdim=True) / self.temperature).softmax(0) * logits).sum(0)
        logprobs = torch.stack([main, *others]).log_softmax(-1)
        weights = (logprobs.amax(-1, keepdim=True).exp() / self.temperature).log_softmax(0)
        return torch.logsumexp(logprobs + weights, 0)
